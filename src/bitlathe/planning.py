"""From a recipe to what happens to every linear, or, for a search, to what may happen to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import ceil, floor
from typing import Literal

from bitlathe.autoscheme.options import default_schemes
from bitlathe.autoscheme.space import Space, space_of
from bitlathe.errors import FormatError, PlanError
from bitlathe.formats.base import Format
from bitlathe.formats.native import Native
from bitlathe.mixes import MIXES, expanded, told
from bitlathe.model.skeleton import Skeleton
from bitlathe.numerics.scheme import GRIDS, KV_SCHEMES, name_of, preset_named
from bitlathe.plan import KEEP, LayerPlan, Plan, explicit, refuse_ragged, resolve, rotated, with_inputs
from bitlathe.recipe import Recipe
from bitlathe.tune.signs import drawn_for

Dtype = Literal["bf16", "fp16"]

# Why a router is kept.
_ROUTER = "routers choose the experts, and are never quantized"


def planned(recipe: Recipe, skeleton: Skeleton, dtype: Dtype) -> tuple[Plan, dict[str, str], tuple[str, ...]]:
    """What happens to every linear, why some are kept, and what is to be said of it. Raises PlanError for what cannot be
    done."""
    wanted, mix = recipe.scheme, {}
    if recipe.linears:
        explicit(recipe.linears, skeleton.matrices(recipe.linears), skeleton.fused)
        recipe = recipe.model_copy(update={"overrides": _lines(recipe, skeleton)})
    if wanted in MIXES and not recipe.linears:
        shapes = skeleton.matrices({skeleton.arch.embed})
        mix = expanded(wanted, skeleton.arch, shapes, depth=skeleton.depth, tied=_shared(recipe, skeleton))
        overrides = {name: scheme for name, scheme in mix.items() if name not in recipe.overrides} | recipe.overrides
        recipe = recipe.model_copy(update={"scheme": MIXES[wanted], "overrides": overrides})
    plan, reasons = _resolved(recipe, skeleton, dtype)
    refuse_ragged(plan, skeleton.matrices(plan.quantized))
    _refuse_undrawn(recipe, skeleton, plan)
    held = {name: mix[name] for name, scheme in plan.quantized.items() if mix.get(name) == name_of(scheme)}
    return plan, reasons, told(held, wanted)


def _lines(recipe: Recipe, skeleton: Skeleton) -> dict[str, str]:
    """The lines of a plan's file that there is a choice about. Raises PlanError for a scheme where there is none."""
    routers = [name for name, row in skeleton.rows.items() if row.router]
    shared = [skeleton.arch.head] if _shared(recipe, skeleton) else []
    for name in (*routers, *shared):
        if recipe.linears.get(name, KEEP) != KEEP:
            why = _ROUTER if name in routers else f"it shares its weight with {skeleton.arch.embed}: give that the scheme"
            raise PlanError(f"the plan gives {name} {recipe.linears[name]}, and it can only have {KEEP}: {why}")
    return {name: scheme for name, scheme in recipe.linears.items() if name not in (*routers, *shared)}


def _shared(recipe: Recipe, skeleton: Skeleton) -> bool:
    """Whether head and embeddings share one weight in the result: as in the original, unless a folded R1 parts them."""
    parts = skeleton.arch.folds("residual") and any(rotation.space == "residual" for rotation in recipe.rotations())
    return bool(skeleton.tied) and not parts


def spaced(
    recipe: Recipe, skeleton: Skeleton, dtype: Dtype, *, formats: Sequence[Format], budgets: Sequence[float]
) -> tuple[Space, dict[str, str], tuple[str, ...]]:
    """What a search may choose from, why some linears are kept, and what is to be said of it.

    budgets: bits a weight. Raises PlanError for budgets beyond the options and for linears that none of them fits, FormatError
    where no option, or not all of them side by side, can be held by a format.
    """
    rows = [shape[1] for name, shape in skeleton.linears.items() if not skeleton.rows[name].router]
    options = recipe.schemes or default_schemes(budgets, recipe.formats, rows)
    plans, reasons = _plans(recipe, skeleton, dtype, options)
    names = _in_play(recipe, skeleton, plans)
    _refuse_split(recipe, skeleton, names)
    shapes, fused = skeleton.matrices({skeleton.arch.embed}), skeleton.fused
    every = space_of(plans, names, shapes=shapes, fused=fused, together=recipe.groups, formats=[Native()])
    held, notes = _held(every, formats, skeleton)
    plans = {option: plan for option, plan in plans.items() if option in held}
    space = space_of(plans, names, shapes=shapes, fused=fused, together=recipe.groups, formats=coded(formats))
    space = replace(space, table=skeleton.arch.embed)
    _refuse_beside(space, formats, skeleton)
    _refuse_beyond(space, budgets)
    _refuse_undrawn(recipe, skeleton, space.plan)
    return space, reasons, notes


def _resolved(recipe: Recipe, skeleton: Skeleton, dtype: Dtype) -> tuple[Plan, dict[str, str]]:
    wanted = recipe.rotations()
    parted = "--rotate R1" if skeleton.arch.folds("residual") else ""
    shared = {name.removesuffix(".weight"): parted for name in skeleton.tied} if _shared(recipe, skeleton) else {}
    head = skeleton.arch.head
    kept = {head: "shares its weight with the embeddings" if shared else "the output head stays in 16 bits unless asked for"}
    shapes = {name: shape for name, shape in skeleton.linears.items() if not skeleton.rows[name].router}
    table, overrides = _table(recipe.overrides, skeleton, dtype, parted=parted if shared else None)
    plan, reasons = resolve(shapes, recipe.scheme, overrides, dtype=dtype, kept=kept, tied=shared)
    rows = {name: plan.linears.get(name, LayerPlan()) for name in skeleton.linears} | table
    plan = plan.model_copy(update={"linears": rows})
    reasons |= {name: _ROUTER for name in rows if name not in shapes and name not in table}
    if not plan.quantized:
        raise PlanError("every linear is kept in 16 bits, so there is nothing to do: give a scheme, or fewer overrides")
    plan = with_inputs(plan, asymmetric=recipe.act_asymmetric, clip=recipe.act_clip)
    if recipe.kv is not None:
        plan = plan.model_copy(update={"kv": KV_SCHEMES[recipe.kv].served_in(dtype)})
    plan = rotated(plan, wanted, skeleton.arch, skeleton.rows, widths=skeleton.widths, tied=bool(skeleton.tied))
    return plan, reasons


def _table(
    overrides: Mapping[str, str], skeleton: Skeleton, dtype: Dtype, *, parted: str | None
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """The row of the embeddings, if they are quantized, and the overrides that are left for linears.

    parted: what would give a head that shares their weight one of its own, "" for nothing; None where it has one. Raises
    PlanError for a scheme with activations, which embeddings do not have.
    """
    table, wanted, left = skeleton.arch.embed, KEEP, {}
    for glob, scheme in overrides.items():
        meant = _for_table(glob, skeleton, shared=parted is not None)
        wanted = scheme if meant else wanted
        if not meant or (scheme == KEEP and not fnmatchcase(table, glob)):
            left[glob] = scheme
    if wanted == KEEP:
        return {}, left
    preset = preset_named(wanted, dtype)
    if preset.input is not None:
        also = (
            ""
            if parted is None
            else f". {skeleton.arch.head} shares its weight{parted and f', or gets one of its own with {parted}'}"
        )
        raise PlanError(
            f"{wanted} rounds activations, and {table} has none to round: ask for its weights alone, "
            f"{name_of(preset.weight)}{also}"
        )
    return {table: LayerPlan(weight=preset.weight)}, left


def _for_table(glob: str, skeleton: Skeleton, *, shared: bool) -> bool:
    """Whether an override is for the embeddings: it matches them and no linear, or the head alone where that shares (`shared`)
    their weight."""
    matched = [glob] if glob in skeleton.linears else [name for name in skeleton.linears if fnmatchcase(name, glob)]
    return (shared and matched == [skeleton.arch.head]) or (not matched and fnmatchcase(skeleton.arch.embed, glob))


def _refuse_undrawn(recipe: Recipe, skeleton: Skeleton, plan: Plan) -> None:
    if recipe.rotation_trials > 1 and not drawn_for(skeleton, plan):
        raise PlanError(
            "--rotation-trials keeps the random signs with the least error of the activations, and no linear of a block both "
            "rounds its activations and reads what a random rotation turns. Leave it out, or ask for a scheme such as W4A4 "
            "where R1, R2 or R4:random turns"
        )


def _plans(recipe: Recipe, skeleton: Skeleton, dtype: Dtype, options: Sequence[str]) -> tuple[dict[str, Plan], dict[str, str]]:
    """Option -> the plan in which every linear in play has it, and why some linears are kept."""
    schemes = {option: preset_named(option, dtype) for option in options if option != KEEP}
    if not schemes:
        raise PlanError(f"a search that may choose nothing but {KEEP} has nothing to do: name schemes in --schemes")
    asks = recipe.act_asymmetric or recipe.act_clip != 1
    rounded = {name: preset.input for name, preset in schemes.items() if preset.input is not None}
    integers = [name for name, scheme in rounded.items() if GRIDS[scheme.grid].kind == "int"]
    plans, reasons = {}, {}
    for option in schemes:
        own = {
            "scheme": option,
            "overrides": _included(recipe, skeleton, option) | recipe.overrides,
            "act_asymmetric": recipe.act_asymmetric and (option in integers or not integers),
            "act_clip": recipe.act_clip if option in rounded or (asks and not rounded) else 1.0,
        }
        plans[option], reasons = _resolved(recipe.model_copy(update=own), skeleton, dtype)
    # Rotations are drawn for those that round their activations.
    first = plans[next(iter(rounded), next(iter(plans)))]
    if KEEP in options:
        kept = {name: LayerPlan() for name in _in_play(recipe, skeleton, {"": first})}
        plans[KEEP] = first.model_copy(update={"linears": {**first.linears, **kept}})
    order = sorted(options, key=lambda option: (option not in rounded, option == KEEP))
    return {option: plans[option] for option in order}, reasons


def _in_play(recipe: Recipe, skeleton: Skeleton, plans: Mapping[str, Plan]) -> list[str]:
    """The linears that a search chooses for, and the embeddings: those that get what they are given by no override."""
    (plan, *_) = plans.values()
    shared = _shared(recipe, skeleton)
    for_table = any(_for_table(glob, skeleton, shared=shared) for glob in recipe.overrides)
    names = [
        name
        for name in plan.quantized
        if not (for_table if name == skeleton.arch.embed else any(fnmatchcase(name, glob) for glob in recipe.overrides))
    ]
    if not names:
        raise PlanError("every linear has an override, so there is nothing to search for: leave --bits out, or some overrides")
    return names


def _refuse_split(recipe: Recipe, skeleton: Skeleton, names: Sequence[str]) -> None:
    """Raise PlanError where overrides take a part of a group out of a search."""
    searched = {skeleton.fused[name] for name in names if name in skeleton.fused}
    out = [name for name, label in skeleton.fused.items() if label in searched and name not in set(names)]
    if out:
        glob = next((glob for glob in recipe.overrides if fnmatchcase(out[0], glob)), "")
        raise PlanError(
            f"the override {glob!r} takes {out[0]} out of the search, and leaves others of {skeleton.fused[out[0]]} in it: "
            "engines run them as one matrix, in one scheme. Write one that matches all of them, or leave it out"
        )


def _included(recipe: Recipe, skeleton: Skeleton, option: str) -> dict[str, str]:
    """What joins a search though it is kept unless asked for, each with what it gets where the others get `option`."""
    table = skeleton.arch.embed
    found: dict[str, str] = {}
    for glob in recipe.include:
        names = skeleton.matrices({table})
        matched = [
            name
            for name in names
            if (fnmatchcase(name, glob) or name.rpartition(".")[2] == glob)
            and (name == table or not skeleton.rows[name].router)
        ]
        if not matched:
            raise PlanError(
                f"--include {glob} matches no linear of the model. What can be included is {skeleton.arch.head} and {table}"
            )
        found |= dict.fromkeys(matched, option)
    # What the embeddings get has no activations, and where the head shares their weight, so does what is meant for the head.
    shared = _shared(recipe, skeleton)
    weights = name_of(preset_named(option).weight)
    of_table = [name for name in found if name == table or (shared and name == skeleton.arch.head)]
    return found | dict.fromkeys(of_table, weights)


def coded(formats: Iterable[Format]) -> list[Format]:
    """The formats that a budget is for: the codes that every run keeps, and those asked for that hold codes. An ordinary
    checkpoint takes 16 bits whatever is chosen."""
    return [Native(), *(format for format in formats if format.name not in ("native", "dense"))]


def _held(space: Space, formats: Iterable[Format], skeleton: Skeleton) -> tuple[list[str], tuple[str, ...]]:
    """The options that every format can hold, and what to say of the others."""
    reasons: dict[str, FormatError] = {}
    for option in space.options:
        for format in formats if option != KEEP else ():
            try:
                format.check(space.alone(option), skeleton.linears, skeleton.fused)
            except FormatError as error:
                reasons.setdefault(option, error)
    held = [option for option in space.options if option not in reasons]
    if reasons and not set(held) - {KEEP}:
        told = "; ".join(f"{option}: {error}" for option, error in reasons.items())
        raise FormatError(f"none of the schemes to choose from can be written in what --format asks for. {told}")
    return held, tuple(f"{option} is left out of the search: {error}" for option, error in reasons.items())


def _refuse_beside(space: Space, formats: Iterable[Format], skeleton: Skeleton) -> None:
    """Raise FormatError where a format cannot hold options side by side that it can hold alone."""
    mixed = {group: list(sizes)[index % len(sizes)] for index, (group, sizes) in enumerate(space.sizes.items())}
    for format in formats:
        format.check(space.planned(mixed), skeleton.linears, skeleton.fused)


def _refuse_beyond(space: Space, budgets: Iterable[float]) -> None:
    least, most = space.ends
    for bits in budgets:
        if not (least <= space.budget(bits) and bits * space.weights <= most):
            # Rounded inwards, so that what is told can be had.
            low, high = ceil(least / space.weights * 1e4) / 1e4, floor(most / space.weights * 1e4) / 1e4
            raise PlanError(
                f"{bits:g} bits a weight cannot be had: {', '.join(space.options)} take from {low:.4f} to {high:.4f}, as the "
                "file holds them. Ask for a number between these, or name other --schemes"
            )
