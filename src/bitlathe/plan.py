"""The plan: one explicit row for every linear of a model, and the only place where patterns are matched.

A plan is what search writes, what tuning obeys, what formats check and what a finished checkpoint carries as plan.json.
Every linear has a row; a row without a weight scheme is kept in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from math import gcd
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bitlathe.arch import Arch, Linear
from bitlathe.errors import PlanError
from bitlathe.numerics.rotation import Rotation, largest_block, largest_fit
from bitlathe.numerics.scheme import GRIDS, PRESETS, Scheme, name_of, preset_named
from bitlathe.registry import did_you_mean

KEEP = "keep"

# What users call a rotation of each space.
ROTATION_NAMES: dict[str, str] = {"residual": "R1", "value": "R2", "qk": "R3", "mid": "R4"}
# A block below it hardly spreads anything; none is taken unless it was asked for.
_LEAST_BLOCK = 16


class LayerPlan(BaseModel):
    """What happens to one linear.

    weight: its scheme, or None to keep it in the plan's dtype. input: the scheme of its activations, a matrix [tokens, inputs],
    or None to keep those. clip: part of a range of activations that is kept before scales are made from it. online: the
    rotation of its input that runs with it, after which `input` applies; its weight has the same rotation folded in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: Scheme | None = None
    input: Scheme | None = None
    clip: float = Field(default=1.0, gt=0, le=1)
    online: Rotation | None = None

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether the blocks of weight and input divide the inputs of a linear of `shape` (outputs, inputs)."""
        return all(scheme is None or scheme.fits(shape) for scheme in (self.weight, self.input))

    def reseeded(self, by: int) -> LayerPlan:
        """The same with other random signs: see `Plan.reseeded`."""
        return self if self.online is None else self.model_copy(update={"online": _reseeded(self.online, by)})


class Plan(BaseModel):
    """Every linear of a model and what happens to it.

    linears: full module name ("model.layers.0.self_attn.q_proj") to its row, in the model's order. dtype: the 16-bit dtype of
    kept tensors, of scales, and of the forward pass of whoever loads the result. rotations: applied to the weights as they
    are read, before anything else sees them. kv: the scheme of cached keys and values, rows of one token and head; None keeps
    them. untied: the output head has a weight of its own where the original's shares that of the embeddings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    linears: dict[str, LayerPlan]
    dtype: Literal["bf16", "fp16"] = "bf16"
    rotations: tuple[Rotation, ...] = ()
    kv: Scheme | None = None
    untied: bool = False

    @property
    def quantized(self) -> dict[str, Scheme]:
        """The linears that are quantized, with their schemes."""
        return {name: row.weight for name, row in self.linears.items() if row.weight is not None}

    def reseeded(self, by: int) -> Plan:
        """The same with other random signs: every seed of a random rotation raised by `by`."""
        linears = {name: row.reseeded(by) for name, row in self.linears.items()}
        rotations = tuple(_reseeded(rotation, by) for rotation in self.rotations)
        return self.model_copy(update={"linears": linears, "rotations": rotations})


def _reseeded(rotation: Rotation, by: int) -> Rotation:
    return rotation.model_copy(update={"seed": rotation.seed + by}) if rotation.kind == "random" else rotation


def resolve(
    shapes: Mapping[str, tuple[int, int]],
    scheme: str,
    overrides: Mapping[str, str],
    *,
    dtype: Literal["bf16", "fp16"],
    kept: Mapping[str, str],
    tied: Mapping[str, str] | None = None,
) -> tuple[Plan, dict[str, str]]:
    """Settle what happens to every linear.

    shapes: linear -> (outputs, inputs), in the model's order. scheme: the name every linear gets. overrides: glob over full
    names -> scheme name or "keep"; the last that matches wins. kept: linears left alone unless an override names them, with
    the reason. tied: linears that share their weight with another module and cannot be quantized, each with what would give it
    one of its own ("" where nothing does).

    Returns the plan, and for every linear kept in 16 bits the reason. Raises RecipeError for an unknown scheme name, and
    PlanError for an override that matches nothing or a tied weight.
    """
    chosen = {name: KEEP if name in kept else scheme for name in shapes}
    reasons = dict(kept)
    for glob, wanted in overrides.items():
        matched = [glob] if glob in shapes else [name for name in shapes if fnmatchcase(name, glob)]
        if not matched:
            raise PlanError(
                f"the override {glob!r} matches none of the {len(shapes)} linears. Names look like {next(iter(shapes))!r}; "
                "a glob must match the whole name, so begin with * to match an ending"
            )
        for name in matched:
            chosen[name] = wanted
            reasons[name] = f"the override {glob}={wanted}"
    presets = {wanted: preset_named(wanted, dtype) for wanted in chosen.values() if wanted != KEEP}
    rows = {wanted: LayerPlan(weight=preset.weight, input=preset.input) for wanted, preset in presets.items()}
    rows[KEEP] = LayerPlan()
    plan = Plan(linears={name: rows[wanted] for name, wanted in chosen.items()}, dtype=dtype)
    for name, parted in (tied or {}).items():
        if name in plan.quantized:
            raise PlanError(
                f"{name} shares its weight with the embeddings, so {reasons[name]} cannot be done: leave it in 16 bits, with "
                f"--override {name}={KEEP} after that one{parted and f', or give it a weight of its own with {parted}'}"
            )
    return plan, {name: reasons[name] for name, row in plan.linears.items() if row.weight is None}


def explicit(linears: Mapping[str, str], shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
    """Raise PlanError unless `linears` (name -> scheme or "keep") names every linear of `shapes` and no other module, and gives
    those that are served as one matrix one scheme. fused: linear -> label of its group."""
    missing = [name for name in shapes if name not in linears]
    strange = [name for name in linears if name not in shapes]
    if missing or strange:
        name = (strange or missing)[0]
        which = f"names {name}, which the model does not have" if strange else f"does not name {name}, which the model has"
        more = f" ({len(missing) + len(strange) - 1} more such names)" if len(missing) + len(strange) > 1 else ""
        raise PlanError(
            f"the plan {which}{more}.{did_you_mean(name, missing if strange else [])} A plan has a line for every linear, a "
            f"scheme or {KEEP}: make it with bitlathe search for this very model"
        )
    groups: dict[str, dict[str, str]] = {}
    for name, label in fused.items():
        if name in linears:
            groups.setdefault(label, {})[linears[name]] = name
    split = [(label, found) for label, found in groups.items() if len(found) > 1]
    if split:
        label, found = split[0]
        told = ", ".join(f"{name} {scheme}" for scheme, name in found.items())
        more = f" ({len(split) - 1} more such groups)" if len(split) > 1 else ""
        raise PlanError(
            f"the plan gives the linears of {label} different schemes: {told}{more}. Engines run them as one matrix and load "
            "nothing else: give the whole group one scheme"
        )


def with_inputs(plan: Plan, *, asymmetric: bool, clip: float) -> Plan:
    """The plan with integer activations that have a zero point, and ranges of activations that are clipped.

    Raises PlanError where that changes nothing, because the plan keeps its activations.
    """
    if not asymmetric and clip == 1.0:
        return plan
    integers = [name for name, row in plan.linears.items() if row.input is not None and GRIDS[row.input.grid].kind == "int"]
    rounded = [name for name, row in plan.linears.items() if row.input is not None]
    if (asymmetric and not integers) or (clip != 1.0 and not rounded):
        what = "--act-asym is for integer activations" if asymmetric else "--act-clip is for quantized activations"
        raise PlanError(f"{what}, and the schemes asked for have none. Leave it out, or ask for a scheme such as W4A4 or W8A8")
    linears = dict(plan.linears)
    for name in rounded:
        scheme = linears[name].input
        if asymmetric and name in integers and scheme is not None:
            scheme = scheme.model_copy(update={"asymmetric": True})
        linears[name] = linears[name].model_copy(update={"input": scheme, "clip": clip})
    return plan.model_copy(update={"linears": linears})


def rotated(
    plan: Plan,
    wanted: Iterable[Rotation],
    arch: Arch,
    rows: Mapping[str, Linear],
    *,
    widths: Mapping[str, tuple[int, ...]],
    tied: bool,
) -> Plan:
    """The plan with rotations of the model.

    wanted: with block 0 for the default: the whole space, or before down_proj ("mid") the largest power of two in it, unless
    that is small. rows: linear -> its row of `arch`. widths: space -> the sizes it has in the model, of one head for "value"
    and "qk". tied: whether the output head shares its weight with the embeddings.

    A space that linears write is turned by folding. Where none does, the quantized linears that read it turn their inputs
    while they run. Raises PlanError for a block that does not divide a space, for a size without a Hadamard matrix, and for a
    rotation that would run in no linear.
    """
    linears, rotations, untied = dict(plan.linears), [], False
    for rotation in wanted:
        settled = _settled(rotation, gcd(*widths[rotation.space]))
        rotations.append(settled)
        if arch.folds(rotation.space):
            untied = untied or (tied and rotation.space == "residual")
        elif rotation.space != "qk":
            readers = [name for name in plan.quantized if name in rows and rows[name].reads == rotation.space]
            if not readers:
                _refuse_idle(rotation, rows)
            linears |= {name: linears[name].model_copy(update={"online": settled}) for name in readers}
    return plan.model_copy(update={"linears": linears, "rotations": tuple(rotations), "untied": untied})


def _settled(rotation: Rotation, width: int) -> Rotation:
    """The rotation with its block, in a space `width` wide."""
    default = largest_block(width) if rotation.space == "mid" and largest_block(width) >= _LEAST_BLOCK else width
    # Heads are small: a block meant for wider spaces covers them whole.
    asked = min(rotation.block, width) if rotation.space in ("value", "qk") else rotation.block
    settled = rotation.model_copy(update={"block": asked or default})
    try:
        settled.block_of(width)
    except PlanError as error:
        if largest_fit(width) == 1:
            raise
        raise PlanError(
            f"{error}, but of every rotation that is asked for. Or leave {ROTATION_NAMES[rotation.space]} out of --rotate"
        ) from error
    return settled


def _refuse_idle(rotation: Rotation, rows: Mapping[str, Linear]) -> None:
    name = ROTATION_NAMES[rotation.space]
    readers = [reader for reader, row in rows.items() if row.reads == rotation.space]
    raise PlanError(
        f"{name} turns what quantized linears read in the space {rotation.space!r} while they run, and all that read it are "
        f"kept in 16 bits, such as {readers[0]}: nothing would be turned. Leave {name} out of --rotate, or give them a scheme"
    )


def refuse_ragged(plan: Plan, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise PlanError where blocks do not divide a linear's inputs. shapes: linear -> (outputs, inputs)."""
    unfit = {name: row for name, row in plan.linears.items() if not row.fits(shapes[name])}
    if not unfit:
        return
    row = next(iter(unfit.values()))
    assert row.weight is not None
    ragged = [name for name, other in unfit.items() if other == row]
    shown = ", ".join(f"{name} ({shapes[name][1]} inputs)" for name in ragged[:4])
    more = f" and {len(ragged) - 4} more" if len(ragged) > 4 else ""
    served = {name: LayerPlan(**dict(preset.served_in(plan.dtype))) for name, preset in PRESETS.items()}
    fitting = [
        name
        for name, other in served.items()
        if other.weight is not None and _kind(other) == _kind(row) and all(other.fits(shapes[linear]) for linear in ragged)
    ]
    instead = f"Of its kind these fit: {', '.join(fitting)}" if fitting else "No scheme of its kind fits"
    raise PlanError(
        f"{name_of(row.weight, row.input)} puts {row.weight.run} inputs under one scale, which does not divide the inputs "
        f"of {shown}{more}. {instead}. Choose {'one of them' if fitting else 'one of another kind'} for these linears with an "
        "override, or keep them in 16 bits"
    )


def _kind(row: LayerPlan) -> tuple[object, ...]:
    """What two rows that differ in the sizes of their blocks share."""
    assert row.weight is not None
    return row.weight.grid, row.weight.asymmetric, row.weight.reader_bound, row.input
