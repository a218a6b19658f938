"""Signed gradient descent: it helps, it keeps its best state, and what it reports is what the codes do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitlathe
from bitlathe.formats.base import QuantLayer
from bitlathe.model.hidden import Hidden
from bitlathe.model.layers import TunedLinear
from bitlathe.model.moments import moments_of
from bitlathe.model.walk import Step
from bitlathe.numerics.project import Learned, quantize, search
from bitlathe.pipeline import run
from bitlathe.recipe import merge
from bitlathe.report import BlockReport, Event, read_report
from bitlathe.tune.base import Tuned, block_error
from bitlathe.tune.options import SignRoundOptions
from bitlathe.tune.rtn import Rtn
from bitlathe.tune.signround import SignRound
from blocks import KINDS, SEQUENCES, as_written, outer_scale, same_codes, schemes_of, turn
from families import save_model, write_text

HELD = 3  # a quarter of the sequences


def tune(step: Step, scheme: str = "W2A16G32", **changes: Any) -> tuple[Tuned, list[tuple[int, int, float]]]:
    """The result of a short run, and what it said on the way."""
    asked: dict[str, Any] = {"iters": 2, "batch_size": 4, "seed": 0, "lr": 0.02} | changes
    options = {name: asked.pop(name) for name in SignRoundOptions.model_fields if name in asked}
    told: list[tuple[int, int, float]] = []
    tuner = SignRound(**asked, options=SignRoundOptions(**options))
    return tuner.tune(step, schemes_of(step, scheme), lambda *said: told.append(said)), told


def error_of(layers: dict[str, QuantLayer], held: int = HELD, **where: Any) -> float:
    """The error of the block that runs these codes, on the first sequences."""
    step = turn(streams=2, **where)
    step.block.freeze(layers)
    assert step.inputs is not None and step.targets is not None
    return block_error(step.block, step.inputs, step.targets, batches=[slice(0, held)])


def plain(scheme: str, **where: Any) -> dict[str, QuantLayer]:
    step = turn(streams=2, **where)
    schemes = schemes_of(step, scheme)
    peaks = step.block.peaks(schemes)
    return {name: QuantLayer(quantize(step.block.weight(name), scheme, peak=peaks[name])) for name, scheme in schemes.items()}


@pytest.mark.parametrize("scheme", KINDS)
def test_what_was_measured_is_what_ships(scheme: str) -> None:
    tuned, told = tune(turn(streams=2, index=1), scheme, iters=12, lr=0.01, check_every=1)
    assert tuned.before == error_of(plain(scheme, index=1), index=1)
    assert tuned.after == error_of(as_written(tuned.layers), index=1)
    assert tuned.after == min(tuned.before, *(error for _, _, error in told))
    # What eight bits lose is less than what the block's bf16 arithmetic does.
    assert tuned.after < tuned.before or scheme == "W8A16G64_ASYM"


def test_what_was_measured_is_what_ships_in_fp16() -> None:
    tuned, _ = tune(turn(streams=2, dtype=torch.float16), "W4A16G32_ASYM", iters=10, check_every=1)
    assert tuned.after == error_of(as_written(tuned.layers), dtype=torch.float16)
    assert tuned.after < error_of(plain("W4A16G32_ASYM", dtype=torch.float16), dtype=torch.float16)


@pytest.mark.parametrize(
    ("scheme", "gain"),
    [("W2A16G32", 0.4), ("W3A16_ASYM", 0.4), ("W4A16G32", 0.3), ("MXFP4A16", 0.1), ("NVFP4A16", 0.3)],
)
def test_it_lowers_the_error_of_sequences_it_does_not_learn_from(scheme: str, gain: float) -> None:
    tuned, _ = tune(turn(streams=2), scheme, iters=40, lr=None)
    assert tuned.before is not None and tuned.after is not None
    assert tuned.after < (1 - gain) * tuned.before


@pytest.mark.parametrize("lr", [0.02, 0.5])
def test_the_best_state_is_kept_and_not_the_last(lr: float) -> None:
    """Steps of half a grid step end worse than they began; the state before the first is among those to choose from."""
    tuned, told = tune(turn(streams=2), "W4A16G32", iters=6, lr=lr, check_every=1)
    errors = [error for _, _, error in told]
    assert tuned.before is not None
    assert tuned.after == min(tuned.before, *errors) == error_of(tuned.layers)
    assert (tuned.after == tuned.before) == same_codes(tuned.layers, plain("W4A16G32")) == (lr == 0.5)


@pytest.mark.parametrize("patience", [0, 1, 2])
def test_a_block_is_done_when_nothing_better_is_found(patience: int) -> None:
    """Steps of half a grid step only make it worse: nothing is better than the start."""
    tuned, told = tune(turn(streams=2), "W4A16G32", iters=8, lr=0.5, check_every=2, patience=patience)
    assert [step for step, _, _ in told] == [2, 4, 6, 8][: patience or None]
    assert tuned.after == tuned.before and same_codes(tuned.layers, plain("W4A16G32"))


def test_a_better_state_renews_the_patience() -> None:
    for patience in (0, 1):
        _, told = tune(turn(streams=2), iters=6, check_every=1, patience=patience)
        errors = [error for _, _, error in told]
        assert [step for step, _, _ in told] == list(range(1, len(told) + 1)) and errors[1] < errors[0]
        # Without patience all steps are taken; with a little, the first look that finds nothing better is the last.
        assert len(told) == 6 if patience == 0 else all(a > b for a, b in pairwise(errors[:-1]))


def test_the_same_seed_gives_the_same_codes_and_another_others() -> None:
    first, again, other = (tune(turn(streams=2), seed=seed, iters=6)[0] for seed in (3, 3, 4))
    assert same_codes(first.layers, again.layers)
    assert first.after == again.after
    assert not same_codes(first.layers, other.layers)


@pytest.mark.parametrize("scheme", ["FP8_TENSOR", "NVFP4A16"])
def test_fused_linears_share_the_tensor_s_scale(scheme: str) -> None:
    step = turn(streams=2)
    tuned, _ = tune(step, scheme, iters=10, check_every=1)
    assert not same_codes(tuned.layers, plain(scheme))
    groups: dict[str, set[float]] = {}
    for name, layer in tuned.layers.items():
        groups.setdefault(step.block.fused.get(name, name), set()).add(outer_scale(layer.weight).item())
    assert sorted(len(scales) for scales in groups.values()) == [1, 1, 1, 1]
    assert len(set.union(*groups.values())) > 1


class Watched(Hidden):
    """Hidden states that remember which sequences were asked for."""

    def __init__(self, hidden: Hidden) -> None:
        super().__init__(hidden[0 : len(hidden)], torch.device("cpu"))
        self.learned: list[list[int]] = []
        self.looked: list[slice] = []

    def __getitem__(self, batch: slice | Tensor) -> Tensor:
        if isinstance(batch, slice):
            self.looked.append(batch)
        else:
            self.learned.append(batch.tolist())
        return super().__getitem__(batch)


def watched(**changes: Any) -> tuple[Watched, Watched, Tuned, Sequence[tuple[int, int, float]]]:
    step = turn(streams=2, sequences=changes.pop("sequences", SEQUENCES))
    assert step.inputs is not None and step.targets is not None
    inputs, targets = Watched(step.inputs), Watched(step.targets)
    tuned, told = tune(Step(step.block, inputs, targets), **changes)
    return inputs, targets, tuned, told


def test_what_chooses_is_not_learned_from() -> None:
    inputs, targets, _, told = watched(iters=9, check_every=4)
    assert inputs.learned == targets.learned
    rounds = [sorted(first + second) for first, second in zip(inputs.learned[::2], inputs.learned[1::2], strict=False)]
    assert all(len(batch) == 4 for batch in inputs.learned)
    # Nine are left to learn from: two batches of four, and one sequence that waits for another order.
    assert all(len(set(each)) == 8 and set(each) <= set(range(HELD, SEQUENCES)) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert set(map(str, inputs.looked)) == {str(slice(0, HELD))}
    assert [(step, steps) for step, steps, _ in told] == [(4, 9), (8, 9), (9, 9)]


@pytest.mark.parametrize(
    ("changes", "learned", "looked"),
    [
        ({"sequences": 1}, [[0], [0]], slice(0, 1)),
        ({"sequences": 2, "batch_size": 1}, [[0], [1]], slice(0, 1)),
        ({"batch_size": 64}, [list(range(3, 12))] * 2, slice(0, 3)),
        ({"batch_size": 64, "held_out": 0}, [list(range(12))] * 2, slice(0, 1)),
        ({"batch_size": 64, "held_out": 1}, [list(range(1, 12))] * 2, slice(0, 1)),
        ({"batch_size": 64, "held_out": 100}, [list(range(3, 12))] * 2, slice(0, 3)),
        ({"sequences": 4, "batch_size": 3, "iters": 1, "check_every": 100}, [[1, 2, 3]], slice(0, 1)),
    ],
    ids=lambda part: ", ".join(f"{name} {value}" for name, value in part.items()) if isinstance(part, dict) else "",
)
def test_few_sequences_large_batches_few_steps(changes: dict[str, Any], learned: list[list[int]], looked: slice) -> None:
    steps = changes.get("iters", 2)
    inputs, _, tuned, told = watched(**changes)
    in_order = [sorted(batch) for batch in inputs.learned] if len(learned[0]) > 1 else sorted(inputs.learned)
    assert in_order == learned
    assert set(map(str, inputs.looked)) == {str(looked)}
    assert told[-1][:2] == (steps, steps)
    held, sequences = looked.stop, changes.get("sequences", SEQUENCES)
    assert tuned.after == error_of(tuned.layers, held, sequences=sequences)
    assert tuned.before is not None and tuned.after is not None and tuned.after <= tuned.before


def test_held_out_sequences_are_looked_at_in_batches() -> None:
    inputs, _, tuned, _ = watched(batch_size=2)
    assert list(map(str, inputs.looked[:4])) == [str(slice(0, 2)), str(slice(2, 3))] * 2
    step = turn(streams=2)
    step.block.freeze(tuned.layers)
    assert step.inputs is not None and step.targets is not None
    assert tuned.after == block_error(step.block, step.inputs, step.targets, batches=[slice(0, 2), slice(2, 3)])


def test_only_the_linears_asked_for_are_touched() -> None:
    step = turn(streams=2)
    schemes = {name: scheme for name, scheme in schemes_of(step, "W2A16G32").items() if name.endswith(("k_proj", "up_proj"))}
    tuned = SignRound(iters=2, batch_size=4, seed=0, options=SignRoundOptions()).tune(step, schemes, lambda *_: None)
    assert list(tuned.layers) == list(schemes)
    assert tuned.after == error_of(tuned.layers)


@pytest.mark.parametrize("scheme", [*KINDS, "W4A16G32_ASYM"])
def test_what_was_measured_from_a_searched_start_is_what_ships(scheme: str) -> None:
    start, _ = tune(turn(streams=2, index=1), scheme, iters=0, start="searched")
    tuned, told = tune(turn(streams=2, index=1), scheme, iters=12, lr=0.01, check_every=1, start="searched")
    assert tuned.after == error_of(as_written(tuned.layers), index=1) == min(start.after, *(error for _, _, error in told))
    # Of eight bits little is left to gain.
    assert tuned.after < start.after or scheme.startswith(("W8", "FP8", "MXFP8"))


def found_in(step: Step, scheme: str) -> dict[str, Learned]:
    assert step.inputs is not None
    schemes, block = schemes_of(step, scheme), step.block
    moments, peaks = moments_of(block, step.inputs, schemes, batch_size=4), block.peaks(schemes)
    return {name: search(block.weight(name), row, moments.mean(name), peaks[name]) for name, row in schemes.items()}


@pytest.mark.parametrize("scheme", ["W3A16", "W4A16G32_ASYM", "NVFP4A16"])
@pytest.mark.parametrize("start", ["plain", "searched"])
def test_ranges_stay_between_nothing_and_their_bound(scheme: str, start: str) -> None:
    """At steps of more than a whole range: the plain start is never left upwards, a searched one up to its double."""
    step = turn(streams=2)
    found = found_in(turn(streams=2), scheme)
    multiples: list[Tensor] = []

    def look(*_: Any) -> None:
        for name, learned in found.items():
            now = step.block.linear(name)
            assert isinstance(now, TunedLinear)
            for end, first in ((now.learned.low, learned.low), (now.learned.high, learned.high)):
                if end is not None and first is not None:
                    multiples.append((end.detach() / first if start == "searched" else end.detach()).flatten().clone())

    options = SignRoundOptions.model_validate({"start": start, "lr": 1.3, "check_every": 1})
    SignRound(iters=3, batch_size=4, seed=0, options=options).tune(step, schemes_of(step, scheme), look)
    reached = torch.cat(multiples)
    torch.testing.assert_close(reached.max(), torch.tensor(2.0 if start == "searched" else 1.0))
    assert reached.min() == 0
    negative = any((learned.high < 0).any() for learned in found.values() if learned.high is not None)
    assert negative == (scheme == "W3A16")  # and those were among what was looked at


def test_a_scale_that_a_tensor_shares_stays_where_it_is() -> None:
    searched, _ = tune(turn(streams=2), "FP8_TENSOR", iters=6, start="searched")
    first, _ = tune(turn(streams=2), "FP8_TENSOR", iters=6)
    assert same_codes(searched.layers, first.layers)


class _Stop(KeyboardInterrupt):
    pass


def test_a_run_from_a_searched_start_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    save_model(tmp_path / "m", num_hidden_layers=2)
    small = {"samples": 6, "seqlen": 24, "batch_size": 2, "iters": 4, "scheme": "W3A16G32"}
    asked = {"model": str(tmp_path / "m"), "calib": str(write_text(tmp_path / "text.txt", 400)), **small}
    for start in ("plain", "searched"):
        bitlathe.quantize(**asked, out=tmp_path / start, signround={"start": start})
    recipe = merge(asked | {"out": tmp_path / "continued", "signround": {"start": "searched"}})
    resumed: list[bool] = []

    def stop(event: Event) -> None:
        if isinstance(event, BlockReport):
            raise _Stop

    def listen(event: Event) -> None:
        if isinstance(event, BlockReport):
            resumed.append(event.resumed)

    with pytest.raises(_Stop):
        run(recipe, restart=False, listen=stop)
    run(recipe, restart=False, listen=listen)
    assert resumed[:2] == [True, False]
    plainly, whole, continued = (shards(tmp_path / name) for name in ("plain", "searched", "continued"))
    assert whole == continued != plainly
    assert read_report(tmp_path / "searched")["recipe"]["signround"]["start"] == "searched"
    assert torch.isfinite(bitlathe.load(tmp_path / "searched", "cpu")(torch.tensor([[3, 4, 5]])).logits).all()


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


# torch.compile itself uses what torch has deprecated.
@pytest.mark.parametrize("start", ["plain", "searched"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_is_compiled_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    graphs = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    for index in (0, 1):
        compiled, _ = tune(turn(streams=2, index=index), "W4A16G32_ASYM", iters=6, start=start, compile=True)
        eager, _ = tune(turn(streams=2, index=index), "W4A16G32_ASYM", iters=6, start=start)
        assert same_codes(compiled.layers, eager.layers)
        assert compiled.after == eager.after == error_of(compiled.layers, index=index)
    assert len(graphs) == 1


@pytest.mark.parametrize("scheme", KINDS)
def test_a_searched_start_is_what_the_search_found(scheme: str) -> None:
    tuned, _ = tune(turn(streams=2, index=1), scheme, iters=0, start="searched")
    step = turn(streams=1, index=1)
    searched = Rtn(searched=True, batch_size=4).tune(step, schemes_of(step, scheme), lambda *_: None)
    assert same_codes(tuned.layers, searched.layers)
    assert tuned.before == tuned.after == error_of(searched.layers, index=1)


@pytest.mark.parametrize("scheme", ["W2A16G32", "W4A16G32_ASYM", "MXFP4A16"])
def test_from_a_searched_start_ranges_grow_and_shrink_but_not_beyond_twice(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[TunedLinear] = []

    def kept(*args: Any, **kwargs: Any) -> TunedLinear:
        made.append(TunedLinear(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("bitlathe.tune.signround.TunedLinear", kept)
    tune(turn(streams=2, index=1), scheme, iters=12, held_out=0, start="searched", lr=0.02, check_every=1)
    bounds = {(low, high) for linear in made for _, low, high in linear.bounded()}
    assert bounds == {(-0.5, 0.5), (0.0, 2.0)}
    ranges = [(start, learned) for linear in made for start, learned in _ends(linear)]
    ratios = torch.cat([(learned / start).flatten() for start, learned in ranges])
    assert 0 <= ratios.min() < 1 < ratios.max() <= 2
    # A search may find that the other sign should have the longer side; the descent leaves that as it is.
    assert any((start < 0).any() for start, _ in ranges) == (scheme == "W2A16G32")


def _ends(linear: TunedLinear) -> list[tuple[Tensor, Tensor]]:
    pairs = [(linear.start.low, linear.learned.low), (linear.start.high, linear.learned.high)]
    return [(start, learned.detach()) for start, learned in pairs if start is not None and learned is not None]


def test_a_searched_start_is_a_better_one_at_two_bits() -> None:
    at = {
        start: tune(turn(streams=2, index=1), iters=12, lr=0.01, check_every=1, start=start)[0]
        for start in ("plain", "searched")
    }
    before, after = ({start: (tuned.before, tuned.after)[place] for start, tuned in at.items()} for place in (0, 1))
    assert before["searched"] < before["plain"]
    assert after["searched"] < before["searched"]
