"""search: a recipe and some budgets in, a plan for each out; and the same as a step of `quantize`."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from platformdirs import user_cache_path
from torch import Tensor

from bitlathe.autoscheme.choose import Found, Outcome, choose
from bitlathe.autoscheme.ground import Ground
from bitlathe.autoscheme.kept import Kept, Measured
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.source import open_model
from bitlathe.model.weights import Weights
from bitlathe.plan import Plan
from bitlathe.planning import coded
from bitlathe.prepare import Prepared, prepare_search
from bitlathe.recipe import Recipe, merge
from bitlathe.report import Listener, Note, Searching
from bitlathe.starting import best_signs, best_smoothing, smooths
from bitlathe.version import VERSION

_SMOOTHING = "smoothing"  # where among scores, and under what name, factors are kept
# A plan has no folder to go to; what `Recipe` asks for is not used.
_NOWHERE = "."


@dataclass(frozen=True)
class Searched:
    """What a search found: a plan and a record, as JSON, for each budget, and the uniform choices that were measured."""

    plans: tuple[Plan, ...]
    records: tuple[dict[str, Any], ...]
    uniform: tuple[dict[str, Any], ...]


def search(model: str, *, bits: float, listen: Listener | None = None, **fields: Any) -> Plan:
    """The plan with the least divergence from the original at an average of `bits` a weight.

    model: a folder or a Hub id. bits: of the linears in play, as the file holds them, and never exceeded. fields: of `Recipe`:
    schemes to choose from, include, groups, overrides, rotate, calib and the rest. listen: called with events of
    `bitlathe.report`. Give the plan to `quantize(model, plan=plan, out=...)`.

    What is found out on the way is kept in the user's cache (`scores`): a search for other bits answers soon, and one that was
    interrupted goes on. Raises a BitlatheError before any weight is read when it cannot be done.
    """
    (plan,) = sweep(
        merge({"model": model, "out": _NOWHERE, "bits": bits, **fields}), [bits], listen or (lambda event: None)
    ).plans
    return plan


def sweep(recipe: Recipe, budgets: Sequence[float], listen: Listener) -> Searched:
    """The plans for several budgets, from one scoring. The recipe's own bits do not count."""
    ready = prepare_search(recipe, budgets)
    for note in ready.notes:
        listen(Note(note))
    ready = _smoothed(ready, listen) if smooths(ready) else ready
    if recipe.rotation_trials > 1:
        with tempfile.TemporaryDirectory(prefix="bitlathe-") as folder:
            signs = best_signs(ready, Path(folder), listen)
        listen(Note(signs["told"]))
        ready = ready.reseeded(signs["draw"])
    assert ready.space is not None
    space, outcome = ready.space, mix(ready, budgets, listen)
    records = tuple(record_of(outcome, ready, place) for place in range(len(budgets)))
    plans = tuple(space.planned(record["choice"]) for record in records)
    uniform = tuple(
        {"scheme": option, "bits": bits, "kl": found.kl, "error": found.error}
        for option, (bits, found) in outcome.uniform.items()
    )
    return Searched(plans, records, uniform)


def _smoothed(ready: Prepared, listen: Listener) -> Prepared:
    """The same with channels smoothed; what they are smoothed by is kept beside the scores."""
    facts = {"smoothing": ready.plan.model_dump_json(), **_origin(ready), "calibration": _digest({"": ready.tokens})}
    with Kept(_root(ready) / _SMOOTHING, facts) as kept:
        if not kept.has(_SMOOTHING, {}):
            factors, told = best_smoothing(ready, kept.work, listen)
            listen(Note(told))
            kept.put(_SMOOTHING, {}, factors)
        return ready.smoothed(kept.tensors(_SMOOTHING))


def mix(ready: Prepared, budgets: Sequence[float], listen: Listener) -> Outcome:
    """What a search of a prepared recipe chooses for each budget."""
    ground = ground_of(ready)
    with Kept(_root(ready), _facts(ready, ground)) as kept:
        return choose(ground, kept, budgets, lambda what, done, of: listen(Searching(what, done, of)))


def ground_of(ready: Prepared) -> Ground:
    """What a search of a prepared recipe stands on."""
    space, text = ready.space, ready.text
    assert space is not None and text.scored is not None and text.held_out is not None
    return Ground(
        skeleton=ready.skeleton,
        weights=ready.weights,
        plain=_plain(ready),
        space=space,
        tokens=text.scored,
        held_out=text.held_out,
        batch_size=ready.recipe.batch_size,
        memory=ready.recipe.memory.activations,
        seed=ready.recipe.seed,
        factors=ready.factors,
    )


def _plain(ready: Prepared) -> tuple[Skeleton, Weights]:
    """The original as its checkpoint has it, in float32. A skeleton is built anew only where the head got a weight."""
    if ready.plan.untied:
        return open_model(ready.weights.checkpoint, device=ready.weights.device, dtype=torch.float32)
    return ready.skeleton, replace(ready.weights, plan=None, edits={}, dtype=torch.float32, through=None)


def record_of(outcome: Outcome, ready: Prepared, place: int = 0) -> dict[str, Any]:
    """What was found for the budget at `place`, as JSON: what was asked for, what it takes, what was measured, the choice."""
    found, space = outcome.founds[place], ready.space
    assert space is not None
    return {
        "asked": found.asked,
        "bits": found.bits,
        "bits_checkpoint": _whole(ready, space.planned(found.choice)),
        "kl": found.measured.kl,
        "error": found.measured.error,
        "schemes": space.options,
        "choice": dict(found.choice),
        "linears": space.linears(found.choice),
        "uniform": {
            option: {"bits": bits, "kl": measured.kl, "error": measured.error}
            for option, (bits, measured) in outcome.uniform.items()
        },
        "told": _told(found, outcome.uniform),
    }


def _whole(ready: Prepared, plan: Plan) -> float:
    """Average bits a number of the whole checkpoint, what is kept in 16 bits included."""
    skeleton, formats = ready.skeleton, coded(ready.formats.values())
    numbers = sum(prod(shape) for shape in skeleton.shapes.values())
    rows = {name: plan.linears[name] for name in plan.quantized}
    shapes = skeleton.matrices(rows)
    kept = numbers - sum(prod(shapes[name]) for name in rows)
    stored = sum(max(format.bits(row, shapes[name]) for format in formats) for name, row in rows.items())
    return (16 * kept + stored) / numbers


def _told(found: Found, uniform: Mapping[str, tuple[float, Measured]]) -> str:
    below = {option: (bits, measured) for option, (bits, measured) in uniform.items() if bits <= found.asked}
    words = (
        f"{found.bits:.3f} bits a weight ({found.asked:g} asked for), KL divergence {found.measured.kl:.4g} on held-out text"
    )
    if not below:
        return words
    best = min(below, key=lambda option: below[option][1].kl)
    return f"{words}; {best} for all has {below[best][1].kl:.4g} at {below[best][0]:.3f}"


def _root(ready: Prepared) -> Path:
    return ready.recipe.scores or user_cache_path("bitlathe", appauthor=False) / "scores"


def _facts(ready: Prepared, ground: Ground) -> dict[str, str]:
    """What the scores and measurements depend on."""
    return {
        **_origin(ready),
        **ground.space.facts(),
        "activations": f"asymmetric {ready.recipe.act_asymmetric}, clip {ready.recipe.act_clip}",
        "factors": _digest(ground.factors),
        "calibration": _digest({"": ground.tokens}),
        "held_out": _digest({"": ground.held_out}),
        "seed": str(ground.seed),
    }


def _origin(ready: Prepared) -> dict[str, str]:
    """What any number found about a model depends on."""
    return {
        "model": ready.weights.checkpoint.fingerprint(),
        "device": ready.weights.device.type,
        "arithmetic": str(ready.weights.dtype),
        "version": f"bitlathe {VERSION}, torch {torch.__version__}, transformers {transformers.__version__}",
    }


def _digest(tensors: Mapping[str, Tensor | None]) -> str:
    whole = hashlib.sha256()
    for name, each in tensors.items():
        whole.update(name.encode() + (b"" if each is None else each.numpy().tobytes()))
    return whole.hexdigest()
