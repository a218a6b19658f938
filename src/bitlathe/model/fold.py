"""Changes of basis, folded into weights while they are read.

An orthogonal matrix R turns every vector x of a space into x R. The weights around follow: a linear that reads the space gets
W R, one that writes it R^T W (and R^T b), and the model's function stays as it was. A norm between the residual stream and its
reader commutes with R once its gain has moved into the reader's columns. (SliceGPT, arXiv:2401.15024; QuaRot,
arXiv:2404.00456.)
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from bitlathe.arch import Linear
from bitlathe.model.edit import Edit, Turn
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.smooth import smoothed
from bitlathe.numerics.hadamard import turn
from bitlathe.numerics.rotation import Rotation
from bitlathe.plan import LayerPlan, Plan


def edits_of(skeleton: Skeleton, plan: Plan, factors: Mapping[str, Tensor] | None = None) -> dict[str, Edit]:
    """Parameter -> what its plan's rotations make of it; a parameter that stays as it is is not there.

    factors: what the model's channels are smoothed by before that; see `smooth`.
    """
    turns = {
        rotation.space: partial(turn, rotation=rotation) for rotation in plan.rotations if skeleton.arch.folds(rotation.space)
    }
    edits = fold(skeleton, turns)
    for name, row in plan.linears.items():
        if row.online is not None:
            weight = f"{name}.weight"
            edits[weight] = replace(edits.get(weight, Edit()), columns=partial(turn, rotation=row.online))
    table = plan.linears.get(skeleton.arch.embed, LayerPlan()).weight
    if table is not None:
        weight = f"{skeleton.arch.embed}.weight"
        edits[weight] = replace(edits.get(weight, Edit()), scheme=table)
    return smoothed(edits, skeleton, plan, factors or {})


def fold(skeleton: Skeleton, turns: Mapping[str, Turn]) -> dict[str, Edit]:
    """Edits that turn whole spaces: "residual", and "value" with a turn of one head. Only spaces that linears write."""
    assert all(skeleton.arch.folds(space) for space in turns)
    edits: dict[str, Edit] = {}
    there = skeleton.shapes
    for row in skeleton.rows.values():
        edits |= _of_linear(row, skeleton, turns, there)
    if "residual" in turns:
        edits[f"{skeleton.arch.embed}.weight"] = Edit(columns=turns["residual"])
    return edits


def _of_linear(row: Linear, skeleton: Skeleton, turns: Mapping[str, Turn], there: Container[str]) -> dict[str, Edit]:
    name, edits = row.name, dict[str, Edit]()
    columns = per_head(turns[row.reads], row.reads, skeleton) if row.reads in turns else None
    gain = f"{row.norm}.weight" if row.norm is not None and row.reads in turns else None
    writes = "value" if row.writes == "qkv" else row.writes
    rows = per_head(turns[writes], writes, skeleton) if writes in turns else None
    # The values are the last rows of a matrix that holds the three.
    start = skeleton.linears[name][0] - skeleton.value_width if row.writes == "qkv" else 0
    if gain is not None:
        edits[gain] = Edit(ones=True)
    if columns is not None or rows is not None:
        edits[f"{name}.weight"] = Edit(gain=gain, columns=columns, rows=rows, start=start)
    if rows is not None and f"{name}.bias" in there:
        edits[f"{name}.bias"] = Edit(rows=rows, start=start)
    return edits


def per_head(one: Turn, space: str, skeleton: Skeleton) -> Turn:
    """The turn of a whole vector of `space`: of each of its heads for "value", of which `one` is the turn, otherwise `one`."""
    return partial(_each_head, one=one, size=skeleton.head_size) if space == "value" else one


def _each_head(x: Tensor, *, one: Turn, size: int) -> Tensor:
    return one(x.unflatten(-1, (-1, size))).flatten(-2)


def rotation_of(plan: Plan, skeleton: Skeleton, name: str) -> Rotation | None:
    """What turns the input of a linear."""
    online = plan.linears[name].online
    space = skeleton.rows[name].reads
    folded = next((rotation for rotation in plan.rotations if rotation.space == space), None)
    return online if online is not None else folded if skeleton.arch.folds(space) else None
