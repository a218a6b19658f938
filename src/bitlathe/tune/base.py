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
from bitlathe.model.walk import Step
from bitlathe.numerics.scheme import Scheme

# Called now and then while a block is tuned: step, steps, loss.
Listen = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Tuned:
    """A block's codes. before, after: mean squared error of its output against the original's, rounded to nearest on the
    plain range and as tuned; None where no text was used."""

    layers: dict[str, QuantLayer]
    before: float | None = None
    after: float | None = None


class Tuner(Protocol):
    """An algorithm that rounds a block. streams: how many streams of hidden states it wants (see `walk`): 0, 1 or 2."""

    streams: int

    def tune(self, step: Step, schemes: Mapping[str, Scheme], listen: Listen) -> Tuned:
        """Round the linears in `schemes` (full names) of `step.block`. The block may be left in any state."""
        ...


@torch.no_grad()
def block_error(block: Block, inputs: Hidden, targets: Hidden, *, batches: list[slice]) -> float:
    """Mean squared error, in float32, of the block's output against the targets over the batches."""
    return _mean_squared((block(inputs[batch]), targets[batch]) for batch in batches)


@torch.no_grad()
def rounding_error(block: Block, layers: Mapping[str, QuantLayer], inputs: Hidden, *, batches: list[slice]) -> float:
    """Mean squared error, in float32, of the output of the block that runs `layers` against its output as it is now.

    Leaves the block as it was. Both outputs are made a part at a time (see `Block.parts`), so they are never held.
    """
    now = {name: block.linear(name) for name in layers}
    block.freeze(layers)
    rounded = {name: block.linear(name) for name in layers}

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            for part in block.parts(inputs[batch]):
                block.swap(now)
                wanted = block(part)
                block.swap(rounded)
                yield block(part), wanted

    error = _mean_squared(pairs())
    block.swap(now)
    return error


def _mean_squared(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    total, count = 0.0, 0
    for output, wanted in pairs:
        error = (output.float() - wanted.float()).square_()
        total, count = total + error.sum(dtype=torch.float64).item(), count + error.numel()
    return total / count


class Moments:
    """Running mean of the square of every input channel of some linears: E[x^2], the diagonal of their Hessians."""

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Take in the inputs [..., inputs] of the linear `name`."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        squares = rows.square().sum(0)
        self._sum[name] = self._sum[name] + squares if name in self._sum else squares
        self._count[name] = self._count.get(name, 0) + rows.shape[0]

    def mean(self, name: str) -> Tensor:
        """E[x^2] [inputs] of the linear `name`."""
        return self._sum[name] / self._count[name]
