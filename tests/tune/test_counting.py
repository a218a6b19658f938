"""Tokens of extreme norm own nothing: not the moments, not the descent, not the choice of a state, not the reported losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitlathe.formats.base import QuantLayer
from bitlathe.model import moments
from bitlathe.model.hidden import Hidden
from bitlathe.model.moments import Moments, counting
from bitlathe.model.walk import Step
from bitlathe.numerics.project import quantize
from bitlathe.tune import base, signround
from bitlathe.tune.base import Tuned, block_error, rounding_error
from bitlathe.tune.options import SignRoundOptions
from bitlathe.tune.signround import SignRound
from blocks import SEQUENCES, TOKENS, same_codes, schemes_of, turn

EXTREME = 5  # the token that is
BATCH = slice(0, 4)


def states(*norms: float, width: int = 8) -> Tensor:
    """One sequence [tokens, width] with these squared norms."""
    return torch.tensor(norms).sqrt()[:, None].expand(-1, width) / width**0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ((1, 2, 3, 4, 76), "++++-"),
        ((1, 2, 3, 4, 74), "+++++"),
        ((80, 1, 2, 3, 4), "-++++"),
        ((1, 2, 3, 51), "+++-"),  # the median of four is the second
        ((10**5, 10**5, 4 * 10**6, 10**5), "++-+"),  # squares beyond float16
        ((7,), "+"),
        ((0, 0, 0, 0), "++++"),
        ((0, 0, 0, 9, 9), "+++++"),
        ((1, float("nan"), 1, 1), "++++"),
    ],
    ids=str,
)
def test_a_token_counts_unless_it_is_over_25_times_the_median(
    norms: tuple[float, ...], expected: str, dtype: torch.dtype
) -> None:
    x = states(*norms).to(dtype)
    assert "".join("+" if counts else "-" for counts in counting(x).tolist()) == expected


def test_a_sequence_is_judged_by_its_own_median_and_by_every_state() -> None:
    small, large = states(1, 1, 1, 30), states(100, 100, 100, 1)
    assert counting(torch.stack([small, large])).tolist() == [[True, True, True, False], [True, True, True, True]]
    other = states(1, 40, 1, 1)
    assert counting(small, other).tolist() == [True, False, True, False]
    assert counting(other, small, large).tolist() == [True, False, True, False]


def test_moments_are_over_tokens_that_count() -> None:
    x = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    x[1, EXTREME] *= 100
    flat = x.flatten(0, 1)
    others = torch.cat([flat[: 16 + EXTREME], flat[16 + EXTREME + 1 :]])
    moments = Moments()
    moments.see("a", x[:2])
    moments.see("a", x[2:])
    moments.see("flat", flat)
    moments.see("others", others)
    for name in ("a", "flat", "others"):
        torch.testing.assert_close(moments.mean(name), others.square().mean(0))


def massive(*, inputs: bool, targets: bool) -> Step:
    """A turn whose token EXTREME is extreme: coming in, with the error of the blocks before, going out, or both."""
    step = turn(streams=2)
    assert step.inputs is not None and step.targets is not None
    original, generator = step.inputs[0:SEQUENCES].clone(), torch.Generator().manual_seed(0)
    if inputs:
        original[:, EXTREME] *= 40
    with torch.no_grad():
        wanted = step.block(original)
    if targets and not inputs:
        wanted[:, EXTREME] *= 40
    if inputs and not targets:
        wanted[:, EXTREME] /= 40
    received = original + 0.01 * original * torch.randn(original.shape, generator=generator).to(original.dtype)
    return Step(step.block, Hidden(received, torch.device("cpu")), Hidden(wanted, torch.device("cpu")))


def tune(step: Step, **changes: Any) -> Tuned:
    asked: dict[str, Any] = {"iters": 30, "batch_size": 4, "seed": 0} | changes
    tuner = SignRound(**asked, options=SignRoundOptions(check_every=5))
    return tuner.tune(step, schemes_of(step, "W3A16G32"), lambda *_: None)


@torch.no_grad()
def errors(step: Step, layers: dict[str, QuantLayer]) -> tuple[float, float]:
    """Mean squared error of the held-out sequences: of all tokens but EXTREME, and of that."""
    step.block.freeze(layers)
    assert step.inputs is not None and step.targets is not None
    held = slice(0, SEQUENCES // 4)
    error = (step.block(step.inputs[held]).float() - step.targets[held].float()).double().square().mean((0, 2))
    extreme = torch.arange(TOKENS) == EXTREME
    return error[~extreme].mean().item(), error[extreme].mean().item()


WHERE = pytest.mark.parametrize(
    "where",
    [{"inputs": False, "targets": True}, {"inputs": True, "targets": True}, {"inputs": True, "targets": False}],
    ids=["made here", "passed on", "taken away here"],
)


@WHERE
def test_what_an_extreme_token_should_become_changes_nothing(where: dict[str, bool]) -> None:
    step, other = massive(**where), massive(**where)
    assert step.targets is not None and other.targets is not None
    wanted = other.targets[0:SEQUENCES].clone()
    wanted[:, EXTREME] *= 1.5
    other.targets[0:SEQUENCES] = wanted
    first, second = tune(step), tune(other)
    assert same_codes(first.layers, second.layers)
    assert (first.before, first.after) == (second.before, second.after)
    everyone, extreme = errors(massive(**where), first.layers)
    assert first.after == pytest.approx(everyone, rel=1e-6)
    assert extreme > everyone


@pytest.mark.parametrize(
    ("inputs", "targets", "gain"),
    [(False, True, 5.0), (True, True, 1.01), (True, False, 1.2)],
    ids=["made here", "passed on", "taken away here"],
)
def test_the_other_tokens_gain_by_it(inputs: bool, targets: bool, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    def found() -> float:
        layers = tune(massive(inputs=inputs, targets=targets)).layers
        return errors(massive(inputs=inputs, targets=targets), layers)[0]

    without = found()
    for module in (base, moments, signround):
        monkeypatch.setattr(module, "counting", lambda *states: torch.ones(states[0].shape[:-1], dtype=torch.bool))
    assert found() > gain * without


@WHERE
def test_a_block_s_error_is_over_tokens_that_count(where: dict[str, bool]) -> None:
    step = massive(**where)
    assert step.inputs is not None and step.targets is not None
    with torch.no_grad():
        error = (step.block(step.inputs[BATCH]).float() - step.targets[BATCH].float()).double().square()
    kept = torch.arange(TOKENS) != EXTREME
    found = block_error(step.block, step.inputs, step.targets, batches=[BATCH])
    assert found == pytest.approx(error[:, kept].mean().item(), rel=1e-6)


def test_the_error_of_rounding_is_over_tokens_that_count() -> None:
    step = massive(inputs=True, targets=True)
    assert step.inputs is not None
    layers = {
        name: QuantLayer(quantize(step.block.weight(name), scheme)) for name, scheme in schemes_of(step, "W2A16G32").items()
    }
    found = rounding_error(step.block, layers, step.inputs, batches=[BATCH])
    with torch.no_grad():
        wanted = step.block(step.inputs[BATCH]).float()
        step.block.freeze(layers)
        error = (step.block(step.inputs[BATCH]).float() - wanted).double().square()
    kept = torch.arange(TOKENS) != EXTREME
    assert found == pytest.approx(error[:, kept].mean().item(), rel=1e-6)
