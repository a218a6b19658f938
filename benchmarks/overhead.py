"""The tuning loop of a W4A16 run against the bare forward and backward passes it consists of, in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.clock import now
from benchmarks.quality import SETTINGS
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.calib import characters_for, text_of, tokenizer_of, windows_of
from bitlathe.model.hidden import Budget
from bitlathe.model.source import computed_in, device_named, open_model, stored_dtype
from bitlathe.model.walk import Step, begin, walk
from bitlathe.model.weights import DTYPES
from bitlathe.numerics.scheme import scheme_named
from bitlathe.tune.options import SignRoundOptions
from bitlathe.tune.signround import SignRound

# The two sides take turns: so many steps each, so many times, on so many blocks.
_STEPS, _TURNS, _BLOCKS = 20, 7, 2


def table(model: str, calib: str, *, device: str) -> Iterator[str]:
    """Seconds a step of both sides, and their ratio turn by turn."""
    place = device_named(device)
    checkpoint = Checkpoint(model)
    skeleton, weights = open_model(checkpoint, device=place, dtype=computed_in(DTYPES[stored_dtype(checkpoint)], place))
    seqlen, samples, batch = SETTINGS["seqlen"], 32, SETTINGS["batch_size"]
    documents = text_of(calib, "calibration", characters=characters_for(samples, seqlen))
    tokens = windows_of(tokenizer_of(checkpoint.path), documents, seqlen=seqlen, count=samples, seed=0)
    dtype = str(weights.dtype).removeprefix("torch.")
    yield f"Steps of {batch} sequences of {seqlen} tokens in {dtype}; {_TURNS} turns of {_STEPS} steps.\n"
    yield "| block | bare, s a step | tuning, s a step | ratio, median (min to max) |"
    yield "|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        start = begin(skeleton, weights, tokens, Budget(2**32, Path(folder)), streams=2)
        for step, _ in zip(walk(skeleton, weights, start, batch_size=batch), range(_BLOCKS), strict=False):
            bare, tuned, ratios = _turns(step, batch)
            low, high = min(ratios), max(ratios)
            yield f"| {step.block.name} | {bare:.4f} | {tuned:.4f} | {median(ratios):.2f} ({low:.2f} to {high:.2f}) |"


def _turns(step: Step, batch: int) -> tuple[float, float, list[float]]:
    scheme = scheme_named("W4A16")
    linears = {name: step.block.linear(name) for name in step.block.linears}
    tuner = SignRound(iters=_STEPS, batch_size=batch, seed=0, options=SignRoundOptions())

    def tuning() -> None:
        step.block.swap(linears)
        tuner.tune(step, dict.fromkeys(linears, scheme), lambda done, steps, loss: None)

    def bare() -> None:
        for linear in linears.values():
            linear.weight.requires_grad_()
        parameters = [linear.weight for linear in linears.values()]
        for _ in range(_STEPS):
            loss = nn.functional.mse_loss(step.block(step.inputs[:batch]).float(), step.targets[:batch].float())
            torch.autograd.grad(loss, parameters)

    times: dict[str, list[float]] = {"bare": [], "tuned": []}
    for _ in range(_TURNS + 1):
        step.block.swap(linears)
        times["bare"].append(_seconds(bare))
        times["tuned"].append(_seconds(tuning))
    first, second = times["bare"][1:], times["tuned"][1:]  # the first turn warms up
    step.block.swap(linears)
    return median(first) / _STEPS, median(second) / _STEPS, [b / a for a, b in zip(first, second, strict=True)]


def _seconds(work: Callable[[], object]) -> float:
    started = now()
    work()
    return now() - started
