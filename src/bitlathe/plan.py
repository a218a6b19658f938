"""The plan: one explicit row for every linear of a model, and the only place where patterns are matched.

A plan is what search writes, what tuning obeys, what formats check and what a finished checkpoint carries as plan.json.
Every linear has a row; a row without a weight scheme is kept in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict

from bitlathe.errors import PlanError
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import SCHEMES, Scheme, name_of, scheme_named

KEEP = "keep"


class LayerPlan(BaseModel):
    """What happens to one linear. weight: its scheme, or None to keep it in the plan's dtype."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: Scheme | None = None


class Plan(BaseModel):
    """Every linear of a model and what happens to it.

    linears: full module name ("model.layers.0.self_attn.q_proj") to its row, in the model's order. dtype: the 16-bit dtype of
    kept tensors, of scales, and of the forward pass of whoever loads the result. rotations: applied to the weights as they
    are read, before anything else sees them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    linears: dict[str, LayerPlan]
    dtype: Literal["bf16", "fp16"] = "bf16"
    rotations: tuple[Rotation, ...] = ()

    @property
    def quantized(self) -> dict[str, Scheme]:
        """The linears that are quantized, with their schemes."""
        return {name: row.weight for name, row in self.linears.items() if row.weight is not None}


def resolve(
    shapes: Mapping[str, tuple[int, int]],
    scheme: str,
    overrides: Mapping[str, str],
    *,
    dtype: Literal["bf16", "fp16"],
    kept: Mapping[str, str],
    tied: Iterable[str] = (),
) -> tuple[Plan, dict[str, str]]:
    """Settle what happens to every linear.

    shapes: linear -> (outputs, inputs), in the model's order. scheme: the name every linear gets. overrides: glob over full
    names -> scheme name or "keep"; the last that matches wins. kept: linears left alone unless an override names them, with
    the reason. tied: linears that share their weight with another module and cannot be quantized at all.

    Returns the plan, and for every linear kept in 16 bits the reason. Raises RecipeError for an unknown scheme name, and
    PlanError for an override that matches nothing, a tied weight, or blocks that do not divide a linear's inputs.
    """
    chosen = {name: KEEP if name in kept else scheme for name in shapes}
    reasons = dict(kept)
    for glob, wanted in overrides.items():
        matched = [name for name in shapes if fnmatchcase(name, glob)]
        if not matched:
            raise PlanError(
                f"the override {glob!r} matches none of the {len(shapes)} linears. Names look like {next(iter(shapes))!r}; "
                "a glob must match the whole name, so begin with * to match an ending"
            )
        for name in matched:
            chosen[name] = wanted
            reasons[name] = f"the override {glob}={wanted}"
    schemes = {wanted: scheme_named(wanted, dtype) for wanted in chosen.values() if wanted != KEEP}
    plan = Plan(linears={name: LayerPlan(weight=schemes.get(wanted)) for name, wanted in chosen.items()}, dtype=dtype)
    for name in tied:
        if name in plan.quantized:
            raise PlanError(
                f"{name} shares its weight with the embeddings, so {reasons[name]} cannot be done: leave it in 16 bits, with "
                f"--override {name}={KEEP} after that one"
            )
    _refuse_ragged(plan, shapes)
    return plan, {name: reasons[name] for name, row in plan.linears.items() if row.weight is None}


def _refuse_ragged(plan: Plan, shapes: Mapping[str, tuple[int, int]]) -> None:
    scheme = next((scheme for name, scheme in plan.quantized.items() if not scheme.fits(shapes[name])), None)
    if scheme is None:
        return
    ragged = [name for name, other in plan.quantized.items() if other == scheme and not scheme.fits(shapes[name])]
    shown = ", ".join(f"{name} ({shapes[name][1]} inputs)" for name in ragged[:4])
    more = f" and {len(ragged) - 4} more" if len(ragged) > 4 else ""
    fitting = [
        name
        for name, other in SCHEMES.items()
        if (other.grid, other.asymmetric) == (scheme.grid, scheme.asymmetric)
        and all(other.fits(shapes[linear]) for linear in ragged)
    ]
    instead = f"Of its kind these fit: {', '.join(fitting)}" if fitting else "No scheme of its kind fits"
    raise PlanError(
        f"{name_of(scheme)} puts {scheme.block[1]} inputs under one scale, which does not divide the inputs of {shown}{more}. "
        f"{instead}. Choose {'one of them' if fitting else 'one of another kind'} for these linears with an override, or keep "
        "them in 16 bits"
    )
