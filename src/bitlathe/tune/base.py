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

# A token is of extreme norm where its |x| is more than this many times the median of its sequence; 25 times in |x|^2.
_EXTREME = 5.0

# Called now and then while a block is tuned: step, steps, loss.
Listen = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Tuned:
    """A block's codes. before, after: mean squared error of its output against the original's over the tokens that count (see
    `counting`), rounded to nearest on the plain range and as tuned; None where no text was used. starved: linears that no
    token of the text reached, so that nothing was learned for them."""

    layers: dict[str, QuantLayer]
    before: float | None = None
    after: float | None = None
    starved: tuple[str, ...] = ()


class Tuner(Protocol):
    """An algorithm that rounds a block. streams: how many streams of hidden states it wants (see `walk`): 0, 1 or 2."""

    streams: int

    def tune(self, step: Step, schemes: Mapping[str, Scheme], listen: Listen) -> Tuned:
        """Round the linears in `schemes` (full names) of `step.block`. The block may be left in any state."""
        ...


@torch.no_grad()
def counting(*states: Tensor) -> Tensor:
    """Which tokens of some states [..., tokens, channels] a fit may listen to: a mask [..., tokens].

    Left out are those whose squared norm is over 25 times the median of their sequence, in any of the states. There are few of
    them (the first of a text, a delimiter), their sum of squares is that of thousands of others, and what they do is the
    same whatever was read: they serve as bias terms (Sun et al., "Massive Activations in Large Language Models",
    arXiv:2402.17762). At least half of a sequence counts.
    """
    return ~torch.stack([_extreme(x) for x in states]).any(0)


def _extreme(x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    # Sorted, because a median along a dimension has no deterministic kernel on CUDA.
    median = norms.sort(-1).values[..., (norms.shape[-1] - 1) // 2, None]
    # Where most tokens are zero (an expert's inputs, say) no other is extreme for not being so. A NaN is not either: it shows.
    return (norms > _EXTREME * median) & (median > 0)


@torch.no_grad()
def block_error(block: Block, inputs: Hidden, targets: Hidden, *, batches: list[slice]) -> float:
    """Mean squared error, in float32, of the block's output against the targets over the batches' tokens that count: those
    that are extreme in neither (see `counting`)."""
    return _mean_squared((x := inputs[batch], block(x), targets[batch]) for batch in batches)


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


class Moments:
    """Running mean of the square of every input channel of some linears: E[x^2], the diagonal of their Hessians.

    Over the tokens that count (see `counting`), judged by what each linear itself is given: norms make tokens alike, and the
    inputs of down_proj are extreme where the states around the block may not be yet.
    """

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._count: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Take in the inputs [..., tokens, inputs] of the linear `name`."""
        counts = counting(x)
        squares = x.detach().float().square().masked_fill_(~counts[..., None], 0.0).flatten(0, -2).sum(0)
        self._sum[name] = self._sum[name] + squares if name in self._sum else squares
        self._count[name] = self._count[name] + counts.sum() if name in self._count else counts.sum()

    def mean(self, name: str) -> Tensor | None:
        """E[x^2] [inputs] of the linear `name`; None for one that was given nothing, as an expert may be."""
        return self._sum[name] / self._count[name] if name in self._sum else None
