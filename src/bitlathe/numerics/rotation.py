"""Rotations: which space of the model is turned, and by which orthogonal matrix.

No torch in this file's types, because plans hold them; the matrices come with the folding that uses them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Rotation(BaseModel):
    """One orthogonal change of basis.

    space: "residual" (R1), "value" (R2, per head), "qk" (R3, after RoPE) or "mid" (R4, before down_proj). block: size of the
    diagonal blocks, 0 for the whole space. kind: "hadamard", or "random" for a Hadamard matrix with random signs drawn from
    `seed`. Whether it is folded into weights or runs online follows from the space, and is never a flag. (QuaRot,
    arXiv:2404.00456; SpinQuant, arXiv:2405.16406.)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    space: Literal["residual", "value", "qk", "mid"]
    block: int = 0
    kind: Literal["hadamard", "random"] = "random"
    seed: int = 0
