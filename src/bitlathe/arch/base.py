"""What is known of a model family: what each linear reads and writes, which norm feeds it, what is fused when served."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# An index inside a block: the number of an expert.
_INDEX = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Linear:
    """One linear of a block.

    name: module path inside the block; "*" stands for the number of an expert. reads, writes: the spaces at its input and
    output: "residual", "value" (per head), "rope" (queries and keys before RoPE), "qkv" (those and the values, in one matrix),
    "mid" (behind the gate), "gate_up" (the last one that writes it is not gated), "branch" (what a norm scales before it is
    added to the residual stream), "routing". norm: module path, inside the block, of the norm whose output it reads; None
    where it reads a space as it is. onto: that of the norm that reads what its output is added to, if it is added as it is.
    fused: linears of a block with the same label are run as one by serving engines, so they share one scheme and one
    tensor-wide scale. router: it chooses experts or weighs them, and is never quantized; its module may be any that has a
    `weight`.
    """

    name: str
    reads: str
    writes: str
    norm: str | None = None
    onto: str | None = None
    fused: str | None = None
    router: bool = False


@dataclass(frozen=True)
class Arch:
    """The table of a family shape. linears: of one block, of which a model may lack some. attention: module path inside a
    block; experts, shared: likewise, of what holds the experts that tokens choose, and of the one that all tokens go through;
    None where there are none. The rest: inside the model."""

    linears: tuple[Linear, ...]
    attention: str = "self_attn"
    experts: str | None = None
    shared: str | None = None
    base: str = "model"
    embed: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"

    def folds(self, space: str) -> bool:
        """Whether a change of basis of `space` can be folded into weights: if linears write it. If none does, whatever stands
        between is not linear, and those who read the space must change its basis while they run."""
        return any(row.writes == space or (row.writes == "qkv" and space == "value") for row in self.linears)

    def template(self, name: str) -> str:
        """The name that the table has for a linear of a block, whose full name this is."""
        return _INDEX.sub(".*.", name.removeprefix(f"{self.blocks}.").partition(".")[2])

    def row(self, name: str) -> Linear | None:
        """The row of a linear by its full name, with all that it names in full; None for one that the table does not name."""
        if name == self.head:
            return Linear(name, "residual", "logits", norm=self.norm)
        index, _, inner = name.removeprefix(f"{self.blocks}.").partition(".")
        block, template = f"{self.blocks}.{index}", self.template(name)
        row = next((row for row in self.linears if row.name == template), None)
        if row is None or name != f"{block}.{inner}":
            return None
        norm, onto, fused = (part and f"{block}.{part}" for part in (row.norm, row.onto, row.fused))
        return replace(row, name=name, norm=norm, onto=onto, fused=fused)
