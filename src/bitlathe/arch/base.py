"""What is known of a model family: what each linear reads and writes, which norm feeds it, what is fused when served."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """One linear of a block.

    name: module path inside the block. reads, writes: the spaces at its input and output: "residual", "value" (per head),
    "rope" (queries and keys before RoPE), "qkv" (those and the values, in one matrix), "mid" (behind the gate), "gate_up",
    "branch" (what a norm scales before it is added to the residual stream). norm: module path, inside the block, of the norm
    whose output it reads; None where it reads a space as it is. fused: linears of a block with the same label are run as one
    matrix by serving engines, so they share one scheme and one tensor-wide scale.
    """

    name: str
    reads: str
    writes: str
    norm: str | None = None
    fused: str | None = None


@dataclass(frozen=True)
class Arch:
    """The table of a family shape. linears: of one block. attention: module path inside a block; the rest: inside the model."""

    linears: tuple[Linear, ...]
    attention: str = "self_attn"
    base: str = "model"
    embed: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"

    def folds(self, space: str) -> bool:
        """Whether a change of basis of `space` can be folded into weights: if linears write it. If none does, whatever stands
        between is not linear, and those who read the space must change its basis while they run."""
        return any(row.writes == space or (row.writes == "qkv" and space == "value") for row in self.linears)
