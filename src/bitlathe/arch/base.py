"""What is known of a model family: what each linear reads and writes, which norm feeds it, what is fused when served."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """One linear of a block.

    name: module path inside the block. reads, writes: the spaces at its input and output: "residual", "value" (per head),
    "qk" (before RoPE), "qkv" (the three of them in one matrix), "mid" (behind the gate), "gate_up". norm: module path, inside
    the block, of the norm whose output it reads; None where it reads a space as it is. fused: linears of a block with the
    same label are run as one matrix by serving engines, so they share one scheme and one tensor-wide scale.
    """

    name: str
    reads: str
    writes: str
    norm: str | None = None
    fused: str | None = None


@dataclass(frozen=True)
class Arch:
    """The table of a family shape. linears: of one block; the rest: module paths inside the model."""

    linears: tuple[Linear, ...]
    base: str = "model"
    embed: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
