"""Best effort: rows that make up for each other, and scales tuned on what the whole model says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import bitlathe
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.block import Block
from bitlathe.model.fisher import gradients_of
from bitlathe.model.hidden import Budget, Hidden
from bitlathe.model.source import open_model
from bitlathe.model.walk import Step, begin, walk
from bitlathe.numerics.project import dequantize, movable, quantize, stretched
from bitlathe.numerics.scheme import SCHEMES
from bitlathe.plan import LayerPlan, Plan
from bitlathe.report import Event, Note, Searching, read_report
from bitlathe.tune import end_to_end as module
from bitlathe.tune.closed_form import ClosedForm
from bitlathe.tune.end_to_end import Quantized, changed, rescaled
from bitlathe.tune.fisher import metrics_of
from bitlathe.tune.options import ClosedFormOptions
from bitlathe.tune.rtn import Rtn
from blocks import schemes_of, turn
from families import save_model, write_text

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
# Best effort takes three times as many gradients: with these it rounds as normal effort does, and only the end is its own.
NORMAL, BEST = {"gradients": 24}, {"gradients": 8, "end_to_end": 12}


def folder(tmp_path: Path) -> dict[str, Any]:
    """What a run on a small random model is asked, but for where its result goes."""
    save_model(tmp_path / "m", num_hidden_layers=2)
    text = write_text(tmp_path / "text.txt", 1500)
    asked = {"scheme": "W2A16G32", "calib": str(text), "samples": 48, "seqlen": 32, "device": "cpu", "batch_size": 4}
    return {"model": str(tmp_path / "m"), **asked}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Event]]:
    """A folder with the results of normal and best effort, what was asked, and what the latter told."""
    tmp_path = tmp_path_factory.mktemp("made")
    asked, told = folder(tmp_path), list[Event]()
    bitlathe.quantize(out=tmp_path / "normal", closed_form=NORMAL, **asked)
    bitlathe.quantize(out=tmp_path / "best", effort="best", closed_form=BEST, listen=told.append, **asked)
    return tmp_path, asked, told


def test_only_scales_change_and_the_model_says_more_of_what_it_said(made: tuple[Path, dict[str, Any], list[Event]]) -> None:
    tmp_path, asked, told = made
    (note,) = [event.text for event in told if isinstance(event, Note) and event.text.startswith("end to end")]
    numbers = re.search(r"from ([\d.e-]+) to ([\d.e-]+)$", note)
    assert numbers is not None
    before, after = map(float, numbers.groups())
    assert 0 < after < before
    assert note in read_report(tmp_path / "best")["notes"]
    for what, counted in (("gradients", range(2)), ("scales", range(1, 13))):
        assert [event.done for event in told if isinstance(event, Searching) and event.what == what] == list(counted)
    weights = [open_model(Checkpoint(tmp_path / name), device=CPU, dtype=torch.float32)[1] for name in ("normal", "best")]
    assert weights[0].plan is not None
    for name in weights[0].plan.quantized:
        normal, best = (one.layer(name).weight for one in weights)
        assert torch.equal(normal.codes, best.codes) and normal.scale is not None and best.scale is not None
        ratio = best.scale.codes.float() / normal.scale.codes.float()
        assert not torch.equal(normal.scale.codes, best.scale.codes) and (ratio - 1).abs().max() < 0.1
    # The divergence that was told is that of what was written.
    sides = [
        bitlathe.evaluate(tmp_path / name, against=asked["model"], text=asked["calib"], seqlen=32)
        for name in ("normal", "best")
    ]
    assert sides[1]["kl_mean"]["value"] < sides[0]["kl_mean"]["value"]


@pytest.mark.parametrize("where", ["steps", "writing"])
def test_interrupted_at_the_end_and_continued_gives_the_same_bytes(
    made: tuple[Path, dict[str, Any], list[Event]], tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, asked, _ = made
    asked = {**asked, "effort": "best", "closed_form": BEST}

    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, Searching) and event.what == "scales":
            raise Stopped

    if where == "writing":
        # One shard is written anew, and the next one is not.
        monkeypatch.setattr("bitlathe.pipeline.rescaled", stopping(Stopped))
        with pytest.raises(Stopped):
            bitlathe.quantize(out=tmp_path / "q", **asked)
        monkeypatch.undo()
    else:
        with pytest.raises(Stopped):
            bitlathe.quantize(out=tmp_path / "q", listen=stop, **asked)
    bitlathe.quantize(out=tmp_path / "q", **asked)
    for file in sorted((first / "best").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "q" / file.name).read_bytes(), file.name


def stopping(error: type[Exception]) -> Any:
    """`rescaled`, which works once."""
    calls: list[int] = []

    def once(*given: Any) -> Any:
        if calls:
            raise error
        calls.append(1)
        return rescaled(*given)

    return once


def test_powers_of_two_stay(tmp_path: Path) -> None:
    asked, told = folder(tmp_path) | {"scheme": "MXFP4A16"}, list[Event]()
    bitlathe.quantize(out=tmp_path / "q", effort="best", listen=told.append, **asked)
    assert any(isinstance(event, Note) and "they stay" in event.text for event in told)
    assert not any(isinstance(event, Searching) and event.what == "scales" for event in told)


def test_gradients_by_multiples_are_differences(tmp_path: Path) -> None:
    """A scale that is a little larger and a little smaller changes the divergence by what the gradient says."""
    save_model(tmp_path / "m", dtype=torch.float32, num_hidden_layers=2)
    skeleton, weights = open_model(Checkpoint(tmp_path / "m"), device=CPU, dtype=torch.float32)
    scheme = SCHEMES["W3A16G32"]
    plan = Plan(linears=dict.fromkeys(skeleton.linears, LayerPlan(weight=scheme)) | {"lm_head": LayerPlan()}, dtype="bf16")

    def layers_of(block: Block) -> dict[str, Any]:
        schemes = dict.fromkeys(block.linears, scheme) if block.index < skeleton.depth else {}
        return Rtn(searched=False, batch_size=4).tune(Step(block, None, None), schemes, lambda *_: None).layers

    tokens = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    model = Quantized(skeleton, weights, plan, layers_of, Budget(2**30, tmp_path), 4)
    with torch.no_grad():
        run = module._Run.of(model, tokens)
        everything = slice(0, 4)
        base = run.divergence(everything)
        run.gradients(torch.arange(4))
        name = "model.layers.0.mlp.down_proj"
        gradient = run.multiples[name].grad
        assert gradient is not None and base > 0
        found = []
        for by in (1 + 2**-5, 1 - 2**-5):
            run.multiples[name].fill_(by)
            found.append(run.divergence(everything))
    measured = (found[0] - found[1]) / 2**-4
    assert gradient.sum().item() / tokens.numel() == pytest.approx(measured, rel=0.15, abs=base * 0.02)


def test_stretched_scales_are_on_their_grid() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for name in ("W4A16G32", "NVFP4A16", "FP8_CHANNEL"):
        q = quantize(w, SCHEMES[name])
        assert movable(q.scheme) and q.scale is not None
        ones = torch.ones(q.scheme.blocks(q.shape))
        same, wider = stretched(q, ones), stretched(q, ones * 1.25)
        assert same.scale is not None and wider.scale is not None
        assert torch.equal(dequantize(same, torch.float32), dequantize(q, torch.float32))
        assert wider.scale.codes.dtype == q.scale.codes.dtype and torch.equal(
            wider.codes.view(torch.uint8), q.codes.view(torch.uint8)
        )
        torch.testing.assert_close(dequantize(wider, torch.float32), 1.25 * dequantize(q, torch.float32), rtol=0.07, atol=0.0)
    assert not any(movable(SCHEMES[name]) for name in ("MXFP4A16", "FP8_TENSOR", "Q4_K", "Q4_1"))


def test_what_a_file_holds_is_what_was_found() -> None:
    step = turn(streams=0)
    scheme = schemes_of(step, "W4A16G32")
    layers = Rtn(searched=False, batch_size=4).tune(step, scheme, lambda *_: None).layers
    name = next(iter(layers))
    scales = changed(layers, {name: torch.full(scheme[name].blocks(layers[name].weight.shape), 1.1)})
    assert list(scales) == [name]
    again = rescaled(rescaled(layers, scales), scales)  # as a run that was killed does
    scale = again[name].weight.scale
    assert scale is not None and torch.equal(scale.codes, scales[name])
    assert all(again[other] is layers[other] for other in layers if other != name)


def test_metrics_are_moments_of_gradients() -> None:
    """Of the last sequences, by what each linear of the original makes."""
    step = turn(streams=2, beside=True)
    assert step.sides is not None and step.inputs is not None
    gradient = torch.randn(4, *step.inputs.shape[1:], generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    given = Step(step.block, step.inputs, None, step.sides, Hidden(gradient, CPU))
    name = step.block.stages[-1][0][0]
    (metric,) = metrics_of(given, [name], batch_size=3).values()
    # What down_proj makes goes to the block's output as it is.
    g = gradient.flatten(0, 1).float()
    back = metric.order.argsort()
    mean = (g.T @ g).diagonal().mean()
    torch.testing.assert_close(metric.h[back][:, back], g.T @ g + 0.3 * mean * torch.eye(g.shape[1]), rtol=1e-3, atol=1e-2)
    assert metrics_of(step, [name], batch_size=3) == {}


def test_what_matters_is_learned_from_gradients() -> None:
    """Of the loss that gradients stand for, codes that were found with them lose less."""
    checkpoint = Checkpoint("builtin")
    skeleton, weights = open_model(checkpoint, device=CPU, dtype=torch.bfloat16)
    tokens = torch.randint(3, 200, (12, 32), generator=torch.Generator().manual_seed(0))
    budget = Budget(2**30, Path("nowhere"))
    gradients = gradients_of(skeleton, weights, tokens, budget, batch_size=4, seed=0)
    lost = []
    for known in (False, True):
        start = begin(skeleton, weights, tokens, budget, streams=2, beside=True)
        step = next(walk(skeleton, weights, start, batch_size=12))
        given = Step(step.block, step.inputs, None, step.sides, gradients[0] if known else None)
        assert step.sides is not None
        tuned = ClosedForm(batch_size=4, options=ClosedFormOptions()).tune(given, schemes_of(step, "W4A16"), lambda *_: None)
        step.block.freeze(tuned.layers)
        with torch.no_grad():
            ours, wanted = (side(slice(0, 12)).float() for side in step.sides)
        g = gradients[0][slice(0, 12)].flatten(0, 1).float()
        error = ours - wanted
        lost.append(((error.flatten(0, 1) @ (g.T @ g)) * error.flatten(0, 1)).sum().item())
    assert lost[1] < 0.99 * lost[0]


def test_divergence_is_that_of_logits() -> None:
    log_p = F.log_softmax(torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0)), -1)
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
    F.kl_div(F.log_softmax(logits, -1), log_p, reduction="sum", log_target=True).backward()
    assert logits.grad is not None
    torch.testing.assert_close(module._less(log_p)(logits.detach()), logits.grad)
