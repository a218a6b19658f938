"""Channels that are divided where they are written and multiplied where they are read.

A junction is a set of channels between one writer and all of its readers, with nothing in between that would notice: a norm and
the linears that read it, the values of attention, the space behind a gate. Like a rotation it is folded into weights while they
are read, before any rotation, and nothing is left of it in a checkpoint but other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from bitlathe.arch import Linear
from bitlathe.model.edit import Edit, Turn
from bitlathe.model.skeleton import Skeleton
from bitlathe.plan import Plan


@dataclass(frozen=True)
class Junction:
    """writer: a norm, or the linear of which the channels are the last outputs. readers: every linear that reads them. width:
    how many the writer writes. heads: (key-value heads, heads that read each of them) for values, which several heads read;
    (1, 1) for others."""

    writer: str
    readers: tuple[str, ...]
    width: int
    heads: tuple[int, int] = (1, 1)

    def read(self, written: Tensor) -> Tensor:
        """Numbers of the channels as they are written [width], in the order in which they are read [inputs]."""
        heads, readers = self.heads
        return written.view(heads, 1, -1).expand(-1, readers, -1).flatten()

    def written(self, read: Tensor) -> Tensor:
        """The mean over all heads that read a channel: [inputs] to [width]."""
        heads, readers = self.heads
        return read.view(heads, readers, -1).mean(1).flatten()


def junctions_of(skeleton: Skeleton, plan: Plan) -> dict[str, list[Junction]]:
    """Block -> its junctions that a plan leaves room for: with a reader that it quantizes.

    None at a norm whose gain a folded rotation moves on, which would undo it, nor at those of a family in which norms write the
    residual stream: their gains are not only what multiplies.
    """
    turned = any(rotation.space == "residual" for rotation in plan.rotations)
    at_norms = skeleton.arch.folds("residual") and not turned
    found: dict[str, list[Junction]] = {}
    for block in skeleton.blocks:
        rows = {name: row for name, row in skeleton.rows.items() if name.startswith(f"{block}.")}
        made = [*(_at_norms(rows, skeleton) if at_norms else ()), *_inside(rows, skeleton)]
        found[block] = [junction for junction in made if any(name in plan.quantized for name in junction.readers)]
    return found


def _at_norms(rows: Mapping[str, Linear], skeleton: Skeleton) -> list[Junction]:
    readers: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row.norm is not None:
            readers.setdefault(row.norm, []).append(name)
    return [Junction(norm, tuple(names), skeleton.model.config.hidden_size) for norm, names in readers.items()]


def _inside(rows: Mapping[str, Linear], skeleton: Skeleton) -> list[Junction]:
    """Between linears of one attention, one MLP or one expert. Of a matrix that holds several the values, or what is not gated,
    come last; of several matrices, too."""
    found = []
    config = skeleton.model.config
    heads = (config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads)
    for name, row in rows.items():
        writes = {"value": ("value", "qkv"), "mid": ("gate_up",)}.get(row.reads)
        if writes is None:
            continue
        parent = name.rpartition(".")[0]
        writers = [other for other, its in rows.items() if its.writes in writes and other.rpartition(".")[0] == parent]
        shape = heads if row.reads == "value" else (1, 1)
        found.append(Junction(writers[-1], (name,), skeleton.linears[name][1] // shape[1], shape))
    return found


def smoothed(edits: Mapping[str, Edit], skeleton: Skeleton, plan: Plan, factors: Mapping[str, Tensor]) -> dict[str, Edit]:
    """The same edits, done to weights of which first every junction in `factors`, by its writer, is smoothed: what is written
    is divided by its numbers [channels], and the columns that read it are multiplied."""
    edits = dict(edits)
    for block in junctions_of(skeleton, plan).values():
        for junction in block:
            if junction.writer in factors:
                edits |= _at(junction, factors[junction.writer], edits, skeleton)
    return edits


def _at(junction: Junction, factors: Tensor, edits: Mapping[str, Edit], skeleton: Skeleton) -> dict[str, Edit]:
    made = {}
    shapes = skeleton.shapes
    for name in (f"{junction.writer}.weight", f"{junction.writer}.bias"):
        if name in shapes:
            edit = edits.get(name, Edit())
            rows = _after(partial(_scaled, by=1 / factors), edit.rows)
            made[name] = replace(edit, rows=rows, start=shapes[name][0] - junction.width)
    for reader in junction.readers:
        name = f"{reader}.weight"
        edit = edits.get(name, Edit())
        made[name] = replace(edit, columns=_after(partial(_scaled, by=junction.read(factors)), edit.columns))
    return made


def _scaled(x: Tensor, *, by: Tensor) -> Tensor:
    return x * by.to(x)


def _after(first: Turn, then: Turn | None) -> Turn:
    return first if then is None else partial(_both, first=first, then=then)


def _both(x: Tensor, *, first: Turn, then: Turn) -> Tensor:
    return then(first(x))
