"""What a tuner is: one block in, its codes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitlathe.formats.base import QuantLayer
from bitlathe.model.block import Block
from bitlathe.model.hidden import Hidden
from bitlathe.model.moments import counting
from bitlathe.model.passage import Passage
from bitlathe.model.walk import Step
from bitlathe.numerics.scheme import Scheme

# Called now and then while a block is tuned: step, steps, loss.
Listen = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Tuned:
    """A block's codes. before, after: mean squared error of its output against the original's over the tokens that count (see
    `counting`), rounded to nearest on the range that the tuner starts from and as tuned; None where no text was used. starved:
    linears that no token of the text reached, so that nothing was learned for them. fallen: what could not be done as asked,
    and what was done instead."""

    layers: dict[str, QuantLayer]
    before: float | None = None
    after: float | None = None
    starved: tuple[str, ...] = ()
    fallen: str | None = None


@dataclass(frozen=True)
class Needs:
    """What a tuner needs of the walk. streams: of hidden states (see `walk`), 0 to 2. beside: whether the original is to be at
    hand beside what a block becomes (`Step.sides`), which takes two of them. gradients: of how many sequences that of the
    original's likelihood by what a block makes (`Step.gradient`)."""

    streams: int = 0
    beside: bool = False
    gradients: int = 0


class Tuner(Protocol):
    """An algorithm that rounds a block. end_to_end: steps in which scales are tuned on the whole model when all blocks are done
    (see `end_to_end`)."""

    needs: Needs
    end_to_end: int

    def tune(self, step: Step, schemes: Mapping[str, Scheme], listen: Listen) -> Tuned:
        """Round the linears in `schemes` (full names) of `step.block`. The block may be left in any state."""
        ...


def held_out(sequences: int, most: int) -> int:
    """How many sequences are not learned from, of those there are: at most a quarter, and none of very few."""
    return min(most, sequences // 4)


def draws(held: int, sequences: int, size: int, *, seed: int) -> Iterator[Tensor]:
    """Batches to learn from, without those held out: every sequence once in a random order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, sequences - held)
    while True:
        order = torch.randperm(sequences - held, generator=generator) + held
        yield from (chunk for chunk in order.split(size) if len(chunk) == size)


@torch.no_grad()
def block_error(block: Block, inputs: Hidden, targets: Hidden, *, batches: list[slice]) -> float:
    """Mean squared error, in float32, of the block's output against the targets over the batches' tokens that count: those
    that are extreme in neither (see `counting`)."""
    return _mean_squared((x := inputs[batch], block(x), targets[batch]) for batch in batches)


@torch.no_grad()
def error_between(ours: Passage, original: Passage, *, batches: list[slice]) -> float:
    """The same of a block against the original, each on what it receives."""
    return _mean_squared((ours.received[batch], ours(batch), original(batch)) for batch in batches)


@torch.no_grad()
def rounding_error(block: Block, layers: Mapping[str, QuantLayer], inputs: Hidden, *, batches: list[slice]) -> float:
    """Mean squared error, in float32, of the output of the block that runs `layers` against its output as it is now, over the
    tokens that are extreme in neither that nor the inputs (see `counting`).

    Leaves the block as it was. Both outputs are made a part at a time (see `Block.parts`), so they are never held.
    """
    now = {name: block.linear(name) for name in layers}
    block.freeze(layers)
    rounded = {name: block.linear(name) for name in layers}

    def outputs() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in batches:
            for part in block.parts(inputs[batch]):
                block.swap(now)
                wanted = block(part)
                block.swap(rounded)
                yield part, block(part), wanted

    error = _mean_squared(outputs())
    block.swap(now)
    return error


def _mean_squared(outputs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """outputs: inputs, outputs and what these should have been, all [batch, tokens, channels]."""
    total, count = 0.0, 0
    for x, output, wanted in outputs:
        counts = counting(x, wanted)
        error = (output.float() - wanted.float()).square_().masked_fill_(~counts[..., None], 0.0)
        total += error.sum(dtype=torch.float64).item()
        count += int(counts.sum()) * error.shape[-1]
    return total / count
