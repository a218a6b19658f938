"""What becomes of a parameter between the checkpoint and whoever reads it.

An edit is a function of what the checkpoint holds and of the plan. It is applied in float64 at every read anew, so a second
read gives the same weight as the first, and nothing edited is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# x [..., size of a space] to x R, in x's dtype.
Turn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Edit:
    """What becomes of one parameter [outputs, inputs], a bias [outputs], or a gain.

    gain: the norm's weight that multiplies the columns first. columns: turns the inputs; rows: turns the outputs from `start`
    on. ones: a gain that has moved elsewhere.
    """

    gain: str | None = None
    columns: Turn | None = None
    rows: Turn | None = None
    start: int = 0
    ones: bool = False

    def __call__(self, tensor: Tensor, gain: Tensor | None) -> Tensor:
        """The edited parameter, float64. gain: what `self.gain` names."""
        if self.ones:
            return torch.ones_like(tensor, dtype=torch.float64)
        edited = tensor.double()
        if gain is not None:
            edited = edited * gain.double()
        if self.columns is not None:
            edited = self.columns(edited)
        if self.rows is not None:
            written = edited[self.start :]
            turned = self.rows(written) if written.ndim == 1 else self.rows(written.T.contiguous()).T
            edited = torch.cat([edited[: self.start], turned])
        return edited
