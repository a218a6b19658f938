"""A passage runs attention once and gives, bit for bit, what the block gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitlathe.formats.base import QuantLayer
from bitlathe.model.block import Block
from bitlathe.model.hidden import Hidden
from bitlathe.model.passage import Passage
from bitlathe.model.walk import Step
from bitlathe.numerics.project import quantize
from bitlathe.tune.grams import read
from blocks import SEQUENCES, schemes_of, turn

CPU = torch.device("cpu")
BATCHES = [slice(0, 5), slice(5, SEQUENCES)]


def passage_of(step: Step, *, width: int | None = None) -> Passage:
    assert step.inputs is not None
    sequences, tokens, _ = step.inputs.shape
    inputs = step.block.linear(step.block.attending[-1]).in_features if width is None else width
    return Passage(
        step.block, step.inputs, Hidden(torch.full((sequences, tokens, inputs), torch.nan, dtype=torch.bfloat16), CPU)
    )


def runs_of_attention(block: Block, passage: Passage, batches: list[slice]) -> tuple[int, list[Tensor]]:
    ran: list[Any] = []
    queries = block.attending[0]
    with block.made([queries], lambda _, y: ran.append(y)):
        made = [passage(batch) for batch in batches]
    return len(ran), made


def rounded(block: Block, step: Step, names: list[str]) -> dict[str, QuantLayer]:
    schemes = schemes_of(step, "W4A16")
    return {name: QuantLayer(quantize(block.weight(name), schemes[name])) for name in names}


def test_attention_runs_once_and_the_output_is_the_same() -> None:
    step = turn(streams=1)
    assert step.inputs is not None
    passage, block = passage_of(step), step.block
    with torch.no_grad():
        wanted = [block(step.inputs[batch]) for batch in BATCHES]
    for expected in (2, 0, 0):
        runs, made = runs_of_attention(block, passage, BATCHES)
        assert runs == expected
        assert all(torch.equal(own, other) for own, other in zip(made, wanted, strict=True))
    # Other batches run anew, and those that share sequences with them do after that.
    across = slice(3, 8)
    for batches, expected in (([across], 1), ([across], 0), (BATCHES, 2), (BATCHES, 0)):
        runs, made = runs_of_attention(block, passage, batches)
        with torch.no_grad():
            assert runs == expected
            assert all(torch.equal(own, block(step.inputs[batch])) for own, batch in zip(made, batches, strict=True))


def test_what_is_kept_goes_with_what_came_before_it() -> None:
    """Queries that are rounded make another output; a last linear that is rounded finds what was kept."""
    step = turn(streams=1)
    assert step.inputs is not None
    passage, block = passage_of(step), step.block
    *before, last = block.attending
    passage(BATCHES[0])
    block.freeze(rounded(block, step, [last]))
    runs, (made,) = runs_of_attention(block, passage, BATCHES[:1])
    with torch.no_grad():
        assert runs == 0 and torch.equal(made, block(step.inputs[BATCHES[0]]))
    codes = rounded(block, step, before)
    block.freeze(codes)
    for expected in (1, 0):
        runs, (made,) = runs_of_attention(block, passage, BATCHES[:1])
        with torch.no_grad():
            assert runs == expected and torch.equal(made, block(step.inputs[BATCHES[0]]))
    block.freeze(codes)  # the same, in modules of their own
    assert runs_of_attention(block, passage, BATCHES[:1])[0] == 0


def test_a_run_that_is_cut_short_keeps_what_it_saw() -> None:
    step = turn(streams=1)
    passage, last = passage_of(step), step.block.attending[-1]
    found = read(passage, BATCHES[0], [last])[last].x
    assert runs_of_attention(step.block, passage, BATCHES[:1])[0] == 0
    attention = step.block.module.get_submodule(step.block.inner(step.block.attention or ""))
    assert torch.equal(read(passage, BATCHES[0], [last])[last].x, found)
    assert step.block.module.get_submodule(step.block.inner(step.block.attention or "")) is attention
    # Linears that do not run where attention is recalled are reached all the same.
    first = step.block.attending[0]
    assert set(read(passage, BATCHES[0], [first, last])) == {first, last}


def test_a_passage_advances_in_place_and_forgets_what_it_kept() -> None:
    step = turn(streams=1)
    assert step.inputs is not None
    everything = slice(0, SEQUENCES)
    passage = passage_of(step)
    for _ in range(2):
        with torch.no_grad():
            wanted = step.block(step.inputs[everything])
        assert torch.equal(passage(everything), wanted)
        passage.advance(SEQUENCES)
        assert torch.equal(step.inputs[everything], wanted)


class Scaled(nn.Module):
    """An attention that does something with what its last linear makes."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention
        for name, child in attention.named_children():
            self.register_module(name, child)

    def forward(self, *given: Any, **named: Any) -> Any:
        made, *rest = self.inner(*given, **named)
        return made * 2, *rest


@pytest.mark.parametrize("case", ["width", "scaled"])
def test_what_cannot_be_kept_runs_each_time(case: str) -> None:
    step = turn(streams=1)
    block = step.block
    assert step.inputs is not None and block.attention is not None
    if case == "scaled":
        block.swap({block.attention: Scaled(block.module.get_submodule(block.inner(block.attention)))})
    passage = passage_of(step, width=3 if case == "width" else None)
    for _ in range(2):
        runs, (made,) = runs_of_attention(block, passage, BATCHES[:1])
        with torch.no_grad():
            assert runs == 1 and torch.equal(made, block(step.inputs[BATCHES[0]]))
