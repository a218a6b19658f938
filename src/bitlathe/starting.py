"""How a run begins: the text's first hidden states, the random signs that it keeps, and what is smoothed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bitlathe.errors import CheckpointError
from bitlathe.model.fisher import gradients_of
from bitlathe.model.hidden import Budget
from bitlathe.model.walk import Start, begin
from bitlathe.prepare import Prepared
from bitlathe.report import Listener, Note, Searching
from bitlathe.tune.base import Needs
from bitlathe.tune.signs import errors_of
from bitlathe.tune.smoothing import smoothing_of

# Windows of the calibration text on which draws of random signs are compared, and ways to smooth.
_DRAWN_ON, _SMOOTHED_ON = 8, 4


def start_on(
    ready: Prepared,
    folder: Path,
    tokens: Tensor,
    needs: Needs,
    listen: Listener = lambda event: None,
) -> Start:
    """The beginning of a walk over the windows `tokens`; hidden states that do not fit into memory go to `folder`."""
    refuse_infinite(ready.weights.as_held.read(ready.skeleton.parameters_of(ready.skeleton.arch.embed)), ready.plan.dtype)
    budget = Budget(ready.recipe.memory.activations, folder)
    start = begin(ready.skeleton, ready.weights, tokens, budget, streams=needs.streams, beside=needs.beside)
    if not needs.gradients:
        return start
    listen(Searching("gradients", 0, 1))
    size, seed = ready.recipe.batch_size, ready.recipe.seed
    found = gradients_of(ready.skeleton, ready.weights, tokens[-needs.gradients :], budget, batch_size=size, seed=seed)
    listen(Searching("gradients", 1, 1))
    return replace(start, gradients=found)


def refuse_infinite(tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Refuse a checkpoint whose tensors would make every prediction NaN, kept in 16 bits or not."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            wider = ", or they overflow fp16: try --dtype bf16" if dtype == "fp16" else ""
            raise CheckpointError(
                f"{name} has infinite or NaN values in {dtype}. The checkpoint is damaged{wider}. Download it again, or mend it"
            )


def best_signs(ready: Prepared, folder: Path, listen: Listener) -> dict[str, Any]:
    """Of the draws of random signs, the one with the least error of the activations, and what is told of it."""
    assert ready.tokens is not None
    plans = [ready.plan.reseeded(draw) for draw in range(ready.recipe.rotation_trials)]
    tokens = ready.tokens[:_DRAWN_ON]
    listen(Note(f"comparing {len(plans)} draws of random signs on {len(tokens)} windows of the calibration text"))
    start = start_on(ready, folder, tokens, Needs(streams=1))
    errors = errors_of(ready.skeleton, ready.weights, start, plans, batch_size=ready.recipe.batch_size)
    if not all(map(isfinite, errors)):
        told = (
            f"the {len(plans)} draws of random signs cannot be compared: what the linears read on these windows is zero, "
            f"infinite or NaN. The first one is taken, that of seed {ready.recipe.rotation_seed}"
        )
        return {"draw": 0, "told": told}
    best = min(range(len(plans)), key=errors.__getitem__)
    told = (
        f"of {len(plans)} draws of random signs the one of seed {ready.recipe.rotation_seed + best} is kept: rounding the "
        f"activations loses {errors[best]:.3%} of their squares, and {max(errors):.3%} with the worst"
    )
    return {"draw": best, "told": told}


def smooths(ready: Prepared) -> bool:
    """Whether a run looks for channels to smooth: the recipe lets it, text is read, some linear of a block is quantized."""
    blocks = f"{ready.skeleton.arch.blocks}."
    return ready.recipe.smooth and ready.tokens is not None and any(name.startswith(blocks) for name in ready.plan.quantized)


def best_smoothing(ready: Prepared, folder: Path, listen: Listener) -> tuple[dict[str, Tensor], str]:
    """The factors that channels are smoothed by, by the writers of the channels, and what is told of them."""
    assert ready.tokens is not None
    # As the checkpoint has it: rotations come after smoothing.
    original = replace(ready, weights=replace(ready.weights, plan=None, edits={}))
    start = start_on(original, folder, ready.tokens[:_SMOOTHED_ON], Needs(streams=1))
    found = smoothing_of(
        ready.skeleton,
        original.weights,
        start,
        ready.plan,
        batch_size=ready.recipe.batch_size,
        listen=lambda done, of: listen(Searching("smoothing", done, of)),
    )
    if not found.places:
        return {}, "nothing is smoothed: no place in the model has enough tokens of the text to tell by"
    if not found.factors:
        return {}, f"nothing is smoothed: it would gain too little in each of {found.places} places"
    return found.factors, (
        f"channels are smoothed in {len(found.factors)} of {found.places} places, where rounding to nearest loses "
        f"{median(found.left):.0%} of what it lost (the median)"
    )
