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
from bitlathe.plan import LayerPlan, Plan


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
    """Block -> its junctions that a plan leaves room for.

    Left out are norms whose gain a folded rotation moves on, which would undo it, and those of a family in which norms write
    the residual stream: their gains are not only what multiplies. So are values where the cache is quantized, which would
    round what they become, and experts that share one scale for a whole tensor.
    """
    turned = any(rotation.space == "residual" for rotation in plan.rotations)
    at_norms = skeleton.arch.folds("residual") and not turned
    rows: dict[str, dict[str, Linear]] = {block: {} for block in skeleton.blocks}
    for name, row in skeleton.rows.items():
        block = ".".join(name.split(".")[: skeleton.arch.blocks.count(".") + 2])
        if block in rows:
            rows[block][name] = row
    return {
        block: [*(_at_norms(within, skeleton) if at_norms else ()), *_inside(within, skeleton, plan)]
        for block, within in rows.items()
    }


def _at_norms(rows: Mapping[str, Linear], skeleton: Skeleton) -> list[Junction]:
    readers: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row.norm is not None:
            readers.setdefault(row.norm, []).append(name)
    return [Junction(norm, tuple(names), skeleton.model.config.hidden_size) for norm, names in readers.items()]


def _inside(rows: Mapping[str, Linear], skeleton: Skeleton, plan: Plan) -> list[Junction]:
    """Between linears of one attention, one MLP or one expert. Of a matrix that holds several the values, or what is not gated,
    come last; of several matrices in the order of the family's table, too."""
    order = [row.name for row in skeleton.arch.linears]
    writers: dict[tuple[str, str], str] = {}
    for name in sorted(rows, key=lambda name: order.index(skeleton.arch.template(name))):
        space = {"value": "value", "qkv": "value", "gate_up": "mid"}.get(rows[name].writes)
        if space is not None:
            writers[name.rpartition(".")[0], space] = name
    config, found = skeleton.model.config, []
    heads = (config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads)
    for name, row in rows.items():
        writer = writers.get((name.rpartition(".")[0], row.reads))
        if writer is None or (row.reads == "value" and plan.kv is not None) or (row.fused and _one_scale(plan.linears[name])):
            continue
        shape = heads if row.reads == "value" else (1, 1)
        found.append(Junction(writer, (name,), skeleton.linears[name][1] // shape[1], shape))
    return found


def _one_scale(row: LayerPlan) -> bool:
    return any(scheme is not None and scheme.block == (0, 0) for scheme in (row.weight, row.input))


def smoothed(edits: Mapping[str, Edit], skeleton: Skeleton, plan: Plan, factors: Mapping[str, Tensor]) -> dict[str, Edit]:
    """The same edits, done to weights of which first every junction in `factors`, by its writer, is smoothed: what is written
    is divided by its numbers [channels], and the columns that read it are multiplied."""
    made = dict(edits)
    if factors:
        outputs = {name: shape[0] for name, shape in skeleton.shapes.items()}
        for junction in (junction for block in junctions_of(skeleton, plan).values() for junction in block):
            if junction.writer in factors:
                made |= _at(junction, factors[junction.writer], made, outputs)
    return made


def _at(junction: Junction, factors: Tensor, edits: Mapping[str, Edit], outputs: Mapping[str, int]) -> dict[str, Edit]:
    """outputs: parameter -> how many it has."""
    made = {}
    for name in (f"{junction.writer}.weight", f"{junction.writer}.bias"):
        if name in outputs:
            edit = edits.get(name, Edit())
            rows = _after(partial(_scaled, by=1 / factors), edit.rows)
            made[name] = replace(edit, rows=rows, start=outputs[name] - junction.width)
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
