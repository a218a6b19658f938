"""What a run of ours cannot do without: the same walk over the same blocks and tokens, and nothing done to any of them."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.others.job import Job, Made, answer
from benchmarks.others.ours import recipe_of
from bitlathe.model.walk import Step, walk
from bitlathe.prepare import Prepared, prepare
from bitlathe.starting import start_on
from bitlathe.tune.base import Needs

# Tuners that go forwards and backwards through a block `iters` times.
STEPPING = ("signround",)
_STEPS = 5


def work(job: Job) -> Made:
    """Leaves seconds a block in `out`, as JSON: "pass" of one forward pass, "floor" of as many as the tuner has streams, and of
    its bare steps; null for a tuner that reads no text."""
    ready = prepare(recipe_of(job))
    found = _found(ready) if ready.text_streams else None
    Path(job.out).write_text(json.dumps(found), encoding="utf-8")
    return Made(job.out)


def _found(ready: Prepared) -> dict[str, float]:
    once = _seconds_a_block(ready, 1)
    floor = _seconds_a_block(ready, ready.text_streams) if ready.text_streams > 1 else once
    stepped = ready.recipe.iters * _seconds_a_step(ready) if ready.recipe.tuner in STEPPING else 0.0
    return {"pass": once, "floor": floor + stepped}


def _seconds_a_block(ready: Prepared, streams: int) -> float:
    """From one block's turn to the next, the first one left out, reading its weights among it."""
    assert ready.tokens is not None
    with tempfile.TemporaryDirectory() as folder:
        start = start_on(ready, Path(folder), ready.tokens, Needs(streams=streams))
        turns = [_now() for _ in walk(ready.skeleton, ready.weights, start, batch_size=ready.recipe.batch_size)]
    return (turns[-1] - turns[0]) / (len(turns) - 1)


def _seconds_a_step(ready: Prepared) -> float:
    """Of one forward and backward pass of a batch, with the gradients of the weights."""
    assert ready.tokens is not None
    with tempfile.TemporaryDirectory() as folder:
        start = start_on(ready, Path(folder), ready.tokens, Needs(streams=2))
        step = next(iter(walk(ready.skeleton, ready.weights, start, batch_size=ready.recipe.batch_size)))
        _step(step, ready.recipe.batch_size)
        started = _now()
        for _ in range(_STEPS):
            _step(step, ready.recipe.batch_size)
        return (_now() - started) / _STEPS


def _step(step: Step, batch: int) -> None:
    assert step.inputs is not None and step.targets is not None
    weights = [step.block.linear(name).weight.requires_grad_() for name in step.block.linears]
    loss = nn.functional.mse_loss(step.block(step.inputs[:batch]).float(), step.targets[:batch].float())
    torch.autograd.grad(loss, weights)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    answer(work, "bitlathe")
