"""Closed form: what it measures is what it ships, it beats rounding, and it falls back where it cannot solve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitlathe
from bitlathe.formats.base import QuantLayer
from bitlathe.model.hidden import Hidden
from bitlathe.model.passage import Passage
from bitlathe.model.walk import Step
from bitlathe.report import BlockReport, Event, read_report
from bitlathe.tune.base import Tuned, block_error
from bitlathe.tune.closed_form import ClosedForm
from bitlathe.tune.grams import Gram, blended, grams_of, read
from bitlathe.tune.options import ClosedFormOptions
from blocks import KINDS, SEQUENCES, TOKENS, as_written, schemes_of, turn
from families import FAMILIES, save_model, write_text

HELD = 3  # a quarter of the sequences


def tune(step: Step, scheme: str, **changes: Any) -> Tuned:
    tuner = ClosedForm(batch_size=4, options=ClosedFormOptions(**changes))
    return tuner.tune(step, schemes_of(step, scheme), lambda *_: None)


def error_of(layers: dict[str, QuantLayer], **where: Any) -> float:
    """The error of the block that runs these codes, on the first sequences."""
    step = turn(streams=2, **where)
    step.block.freeze(layers)
    assert step.inputs is not None and step.targets is not None
    return block_error(step.block, step.inputs, step.targets, batches=[slice(0, HELD)])


@pytest.mark.parametrize("scheme", KINDS)
def test_what_was_measured_is_what_ships(scheme: str) -> None:
    step = turn(streams=2, beside=True, index=1)
    tuned = tune(step, scheme)
    assert tuned.after == error_of(as_written(tuned.layers), index=1)
    assert tuned.before is not None and tuned.after is not None and tuned.after <= tuned.before
    assert tuned.after < 0.85 * tuned.before or scheme.startswith(("W8", "FP8", "MXFP8"))
    assert tuned.starved == () and (tuned.fallen is None or tuned.after == tuned.before)


def test_each_piece_lowers_the_error() -> None:
    errors = [
        tune(turn(streams=2, beside=True), "W2A16G32", passes=passes, refits=refits).after
        for passes, refits in ((0, 0), (2, 0), (2, 2))
    ]
    assert errors[0] is not None and errors[1] is not None and errors[2] is not None
    assert errors[2] < 0.98 * errors[0]


def test_later_stages_read_what_earlier_ones_make() -> None:
    """Rounding the first stage alone changes what is gathered for the last."""
    step = turn(streams=2, beside=True)
    first, last = step.block.stages[0][0], step.block.stages[-1][0][0]
    batches = [slice(0, SEQUENCES)]
    before = grams_of(step, [last], batches=batches)[last]
    assert before.lack is not None and before.lack.abs().max() == 0
    tuner = ClosedForm(batch_size=4, options=ClosedFormOptions())
    schemes = {name: scheme for name, scheme in schemes_of(step, "W2A16G32").items() if name in first}
    step.block.freeze(tuner.tune(step, schemes, lambda *_: None).layers)
    after = grams_of(step, [last], batches=batches)[last]
    assert after.lack is not None and after.lack.abs().max() > 0 and not torch.equal(after.h, before.h)
    # The moments are those of what the linear reads.
    seen: list[Tensor] = []
    assert step.inputs is not None
    with torch.no_grad(), step.block.watch([last], lambda _, x: seen.append(x)):
        step.block(step.inputs[batches[0]])
    x = seen[0].flatten(0, 1).double()
    assert after.tokens <= SEQUENCES * TOKENS
    if after.tokens == SEQUENCES * TOKENS:
        torch.testing.assert_close(after.h.double(), x.T @ x, rtol=1e-3, atol=1e-3)


def test_what_an_output_is_added_to_is_known() -> None:
    """A stream that lacks something from the start: what o_proj and down_proj are added to lacks it too."""
    step = turn(streams=2, beside=True)
    assert step.inputs is not None and step.sides is not None
    everything = slice(0, SEQUENCES)
    states = step.inputs[everything]
    lost = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.dtype) * states.std() * 0.1
    inputs, received = (Hidden(x, torch.device("cpu")) for x in (states - lost, states.clone()))
    sides = Passage(step.block, inputs), Passage(step.sides[1].block, received)
    short = Step(step.block, inputs, None, sides)
    o_proj, down_proj = step.block.stages[1][0][0], step.block.stages[3][0][0]
    grams = grams_of(short, [o_proj, down_proj], batches=[everything])
    x, theirs = (read(side, everything, [o_proj])[o_proj].x.flatten(0, 1).float() for side in sides)
    gap = (states.float() - (states - lost).float()).flatten(0, 1)
    gram, weight = grams[o_proj], step.block.weight(o_proj).float()
    assert gram.lack is not None and grams[down_proj].lack is not None and gram.tokens == len(x)
    expected = (gap + (theirs - x) @ weight.T).T @ x
    torch.testing.assert_close(gram.lack, expected, rtol=1e-3, atol=1e-3)
    missing = gram.missing(weight)
    assert missing is not None
    torch.testing.assert_close(missing, expected / len(x), rtol=1e-3, atol=1e-3)
    # Of those that are added to nothing, what they lack follows from what they read.
    first = step.block.stages[0][0][0]
    reads = grams_of(short, [first], batches=[everything])[first]
    lacks = reads.missing(torch.eye(len(reads.h)))
    assert reads.lack is None and reads.drift is not None and lacks is not None
    torch.testing.assert_close(lacks, reads.drift / reads.tokens)


def test_a_block_runs_no_further_than_it_must() -> None:
    step = turn(streams=2, beside=True)
    assert step.inputs is not None
    passage, batch = Passage(step.block, step.inputs), slice(0, 1)
    ran: list[str] = []
    first, last = step.block.stages[0][0][0], step.block.stages[-1][0][0]
    with torch.no_grad(), step.block.made([last], lambda name, _: ran.append(name)):
        assert set(read(passage, batch, [first])) == {first}
        assert ran == []
        assert set(read(passage, batch, [first, last])) == {first, last}


def test_stages_are_in_order_and_complete() -> None:
    step = turn(streams=2, beside=True)
    short = [[name.rpartition(".")[2] for group in stage for name in group] for stage in step.block.stages]
    assert short == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_what_lost_on_held_out_text_is_rounded() -> None:
    """Text to learn from that is nothing like the text that judges."""
    step = turn(streams=2, beside=True)
    assert step.inputs is not None and step.sides is not None
    generator = torch.Generator().manual_seed(0)
    states = step.inputs[slice(0, SEQUENCES)].clone()
    channels = states.shape[-1]
    states[HELD:] = 0
    states[HELD:, :, : channels // 16] = 3 * torch.randn(SEQUENCES - HELD, TOKENS, channels // 16, generator=generator).to(
        states.dtype
    )
    hidden = Hidden(states, torch.device("cpu"))
    sides = Passage(step.block, hidden), Passage(step.sides[1].block, hidden)
    tuned = tune(Step(step.block, hidden, None, sides), "W2A16G32")
    assert tuned.fallen is None or "rounded" in tuned.fallen
    assert tuned.before is not None and tuned.after is not None and tuned.after <= tuned.before


def test_moments_without_an_inverse_leave_a_linear_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    step = turn(streams=2, beside=True)
    assert step.inputs is not None
    down = step.block.stages[-1][0][0]
    monkeypatch.setattr("bitlathe.tune.closed_form.prepared", lambda h, _: None)
    tuned = tune(step, "W4A16")
    assert tuned.fallen is not None and down in tuned.fallen
    assert tuned.after == tuned.before


def test_what_is_solved_together_does_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    together = tune(turn(streams=2, beside=True), "W4A16G32")
    monkeypatch.setattr("bitlathe.tune.closed_form._AT_A_TIME", 1)
    alone = tune(turn(streams=2, beside=True), "W4A16G32")
    assert together.layers.keys() == alone.layers.keys()
    for name, layer in together.layers.items():
        # Sums of float32 come in another order.
        assert (layer.weight.codes == alone.layers[name].weight.codes).float().mean() > 0.99, name


def test_experts_of_few_tokens_borrow_from_the_others() -> None:
    square = torch.eye(4)
    grams = {
        "few": Gram(2 * square, tokens=2),
        "many": Gram(600 * square * 3, tokens=600),
        "none": Gram(square),
    }
    filled = blended(grams)
    assert set(filled) == {"few", "many"} and filled["many"] is grams["many"]
    assert filled["few"].tokens == 256
    torch.testing.assert_close(filled["few"].h, 2 * square + (1802 / 602) * 254 * square)
    assert blended({"few": grams["few"]}) == {"few": grams["few"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_tuned_and_a_stopped_run_continues(family: str, tmp_path: Path) -> None:
    model, text = tmp_path / "model", write_text(tmp_path / "text.txt", 1200)
    save_model(model, family)
    asked = {"scheme": "W3A16G32", "tuner": "closed-form", "calib": str(text), "samples": 16, "seqlen": 32, "device": "cpu"}
    bitlathe.quantize(str(model), out=tmp_path / "whole", **asked)
    blocks = read_report(tmp_path / "whole")["blocks"]
    assert all(block["loss_after"] <= block["loss_before"] for block in blocks if block["loss_after"] is not None)
    assert any(block["loss_after"] < block["loss_before"] for block in blocks if block["loss_after"] is not None)

    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, BlockReport):
            raise Stopped

    with pytest.raises(Stopped):
        bitlathe.quantize(str(model), out=tmp_path / "twice", listen=stop, **asked)
    bitlathe.quantize(str(model), out=tmp_path / "twice", **asked)
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes(), file.name


def test_little_effort_is_searched_rounding(tmp_path: Path) -> None:
    model, text = tmp_path / "model", write_text(tmp_path / "text.txt", 600)
    save_model(model)
    asked = {"scheme": "W3A16G32", "calib": str(text), "samples": 8, "seqlen": 32, "device": "cpu"}
    bitlathe.quantize(str(model), out=tmp_path / "fast", effort="fast", **asked)
    bitlathe.quantize(str(model), out=tmp_path / "rtn", tuner="rtn", **asked)
    for file in sorted((tmp_path / "rtn").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "fast" / file.name).read_bytes()
