"""Round to nearest: the search never loses, and what is reported is what the codes do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitlathe.formats.base import QuantLayer
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model import skeleton
from bitlathe.model.hidden import Hidden
from bitlathe.model.moments import Moments
from bitlathe.model.skeleton import Head
from bitlathe.model.source import open_model
from bitlathe.model.walk import Step
from bitlathe.numerics.project import dequantize, quantize
from bitlathe.tune.base import Tuned, block_error, rounding_error
from bitlathe.tune.rtn import Rtn
from blocks import KINDS, SEQUENCES, TOKENS, as_written, outer_scale, same_codes, schemes_of, turn

BATCH, PROBE = 4, 8


def tune(scheme: str, *, searched: bool = True, index: int = 0) -> tuple[Step, Tuned]:
    """A tuned block, and the same block as it was."""
    step = turn(streams=1 if searched else 0, index=index)
    tuned = Rtn(searched=searched, batch_size=BATCH).tune(step, schemes_of(step, scheme), lambda *_: None)
    return turn(streams=1, index=index), tuned


@torch.no_grad()
def importance(step: Step) -> dict[str, Tensor]:
    """E[x^2] of every linear's inputs, in float64."""
    seen: dict[str, list[Tensor]] = {}
    assert step.inputs is not None
    with step.block.watch(dict.fromkeys(step.block.linears), lambda name, x: seen.setdefault(name, []).append(x)):
        step.block(step.inputs[0:SEQUENCES])
    return {name: torch.cat(parts).double().flatten(0, -2).square().mean(0) for name, parts in seen.items()}


@pytest.mark.parametrize("scheme", KINDS)
def test_the_search_never_loses(scheme: str) -> None:
    step, tuned = tune(scheme)
    weighed = importance(step)
    peaks = step.block.peaks(schemes_of(step, scheme))
    gained = []
    for name, layer in tuned.layers.items():
        weight = step.block.weight(name)
        plain = quantize(weight, layer.weight.scheme, peak=peaks[name])

        def error(q: object, weight: Tensor = weight, weighed: Tensor = weighed[name]) -> float:
            return ((dequantize(q, torch.float32) - weight.float()).double().square() * weighed).sum().item()  # type: ignore[arg-type]

        # The search sums in float32, one batch after the other.
        assert error(layer.weight) <= error(plain) * (1 + 1e-5), name
        gained.append(error(layer.weight) < error(plain) * 0.99)
    # A tensor's scale is its fused group's, which no member may move; a factor of two leaves E4M3 as it was.
    assert any(gained) == (scheme not in ("FP8_TENSOR", "MXFP8A16"))


@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("searched", [True, False], ids=["searched", "plain"])
def test_the_error_reported_is_that_of_the_codes(scheme: str, searched: bool) -> None:  # noqa: FBT001
    step, tuned = tune(scheme, searched=searched, index=1)
    assert step.inputs is not None
    batches = [slice(0, BATCH), slice(BATCH, PROBE)]
    with torch.no_grad():
        targets = Hidden(torch.cat([step.block(step.inputs[batch]) for batch in batches]), torch.device("cpu"))
    peaks = step.block.peaks(tuned.layers)
    plain = {
        name: QuantLayer(quantize(step.block.weight(name), layer.weight.scheme, peak=peaks[name]))
        for name, layer in tuned.layers.items()
    }
    if not searched:
        assert same_codes(tuned.layers, plain)
        assert (tuned.before, tuned.after) == (None, None)
        return
    step.block.freeze(as_written(tuned.layers))
    assert block_error(step.block, step.inputs, targets, batches=batches) == tuned.after
    step.block.freeze(plain)
    assert block_error(step.block, step.inputs, targets, batches=batches) == tuned.before


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_the_error_is_that_of_the_same_sequences_for_every_batch_size(batch_size: int) -> None:
    step = turn(streams=1)
    tuned = Rtn(searched=True, batch_size=batch_size).tune(step, schemes_of(step, "W4A16G32"), lambda *_: None)
    # A matrix product may round differently for another number of rows; other sequences would be further off.
    _, expected = tune("W4A16G32")
    assert (tuned.before, tuned.after) == pytest.approx((expected.before, expected.after), rel=1e-3)


@pytest.mark.parametrize("scheme", ["W2A16G32", "W3A16", "W4A16G32_ASYM", "NVFP4A16"])
def test_the_search_helps_the_block(scheme: str) -> None:
    _, tuned = tune(scheme)
    assert tuned.before is not None and tuned.after is not None
    assert tuned.after < 0.97 * tuned.before


@pytest.mark.parametrize("scheme", ["FP8_TENSOR", "NVFP4A16"])
@pytest.mark.parametrize("searched", [True, False], ids=["searched", "plain"])
def test_fused_linears_share_the_tensor_s_scale(scheme: str, searched: bool) -> None:  # noqa: FBT001
    step, tuned = tune(scheme, searched=searched)
    groups: dict[str, set[float]] = {}
    for name, layer in tuned.layers.items():
        groups.setdefault(step.block.fused.get(name, name), set()).add(outer_scale(layer.weight).item())
    assert sorted(len(scales) for scales in groups.values()) == [1, 1, 1, 1]
    assert len(tuned.layers) == 7
    assert len(set.union(*groups.values())) > 1  # and that is not because all of them are alike


def test_a_group_s_scale_covers_only_those_that_are_quantized() -> None:
    step = turn(streams=0)
    names = [name for name in step.block.linears if name.endswith(("q_proj", "k_proj", "v_proj"))]
    largest = {name: step.block.weight(name).abs().max().float() for name in names}
    ordered = sorted(names, key=lambda name: largest[name].item())
    assert largest[ordered[-1]] > largest[ordered[-2]]
    assert step.block.peaks(dict.fromkeys(names)) == dict.fromkeys(names, largest[ordered[-1]])
    assert step.block.peaks(dict.fromkeys(ordered[:2])) == dict.fromkeys(ordered[:2], largest[ordered[-2]])


def test_moments_are_means_over_all_tokens() -> None:
    step, moments = turn(streams=1), Moments()
    assert step.inputs is not None
    with torch.no_grad(), step.block.watch(dict.fromkeys(step.block.linears), moments.see):
        for batch in step.inputs.batches(5):  # the last one is smaller
            step.block(step.inputs[batch])
    for name, mean in importance(step).items():
        torch.testing.assert_close(moments.mean(name).double(), mean, rtol=1e-5, atol=0)


def test_a_block_s_error_is_a_mean_over_elements() -> None:
    step = turn(streams=2)
    assert step.inputs is not None and step.targets is not None
    step.block.linear(step.block.linears[0]).weight.data.zero_()
    with torch.no_grad():
        error = (step.block(step.inputs[0:SEQUENCES]).float() - step.targets[0:SEQUENCES].float()).double().square().mean()
    batches = step.inputs.batches(5)
    found = block_error(step.block, step.inputs, step.targets, batches=batches)
    assert found == pytest.approx(error.item(), rel=1e-6)


def test_the_head_is_run_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the logits of a batch; and the error is that of all logits together."""
    part, tokens = 100, SEQUENCES * TOKENS
    monkeypatch.setattr(skeleton, "_PART", part)
    model, weights = open_model(Checkpoint("builtin"), device=torch.device("cpu"))
    shape = (SEQUENCES, TOKENS, model.model.config.hidden_size)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weights.dtype)
    inputs = Hidden(states, torch.device("cpu"))
    step = Step(model.head(weights), inputs, None)
    run, sizes = Head.__call__, list[int]()

    def counted(self: Head, x: Tensor) -> Tensor:
        sizes.append(x.shape[0] * x.shape[1])
        return run(self, x)

    monkeypatch.setattr(Head, "__call__", counted)
    tuned = Rtn(searched=True, batch_size=SEQUENCES).tune(step, schemes_of(step, "W4A16G32"), lambda *_: None)
    assert list(tuned.layers) == ["lm_head"]
    assert max(sizes) == part
    assert sum(sizes[: -(-tokens // part)]) == tokens  # the moments are those of all tokens
    head = model.head(weights)
    with torch.no_grad():
        targets = Hidden(run(head, inputs[0:PROBE]), torch.device("cpu"))
    assert tuned.after == rounding_error(head, tuned.layers, inputs, batches=[slice(0, PROBE)])
    head.freeze(tuned.layers)
    assert tuned.after == pytest.approx(block_error(head, inputs, targets, batches=[slice(0, PROBE)]), rel=1e-3)
    assert tuned.before is not None and tuned.after < tuned.before
