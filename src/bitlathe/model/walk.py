"""The walk: blocks of a model, one after the other, each alive only while it is its turn.

These are the only loops over blocks. Whatever is done to every block (tuning, evaluation, statistics) is the body of a
`for` over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitlathe.model.block import Block
from bitlathe.model.hidden import Budget, Hidden
from bitlathe.model.passage import Passage
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.weights import Weights


@dataclass(frozen=True)
class Start:
    """Where a walk begins: the blocks' calls, and the hidden states [sequences, tokens, width] before the first block.
    gradients: for each block, that of a loss by what it makes in the original, for the last few sequences; empty where nobody
    asks for it. rooms: one for each of two streams, where the original block is to stay at hand (see `Passage`)."""

    calls: list[dict[str, Any]]
    streams: tuple[Hidden, ...]
    gradients: Sequence[Hidden] = ()
    rooms: tuple[Hidden, ...] = ()


@dataclass
class Step:
    """One block's turn.

    inputs: what it receives from the blocks before it, as they are after their turn; none on a walk without text. targets: what
    the original block makes of the original stream; none where that stream is not there, or not yet taken through the block.
    sides: the block on the first stream, and the original block on the second; none where the start has no rooms for them.
    gradient: that of a loss by what the original makes, for the last of the sequences; none where the start has none.

    Once the walk is asked for the next turn, this one no longer has its `block`."""

    block: Block = field(repr=False)
    inputs: Hidden | None
    targets: Hidden | None
    sides: tuple[Passage, Passage] | None = field(default=None, repr=False)
    gradient: Hidden | None = field(default=None, repr=False)


def begin(
    skeleton: Skeleton, weights: Weights, tokens_NT: Tensor, budget: Budget, *, streams: int, beside: bool = False
) -> Start:
    """Embed the windows `tokens_NT` [sequences, tokens] and lay out `streams` streams of hidden states: equal ones, but that a
    second one, from which targets are made, knows nothing of embeddings being rounded. beside: whether the original block is to
    stay at hand."""
    sources = [weights, weights.unrounded] if streams > 1 and weights.unrounded != weights else [weights]
    fronts = [skeleton.front(source) for source in sources]
    width = skeleton.model.config.hidden_size
    shape = (tokens_NT.shape[0], tokens_NT.shape[1], width)
    laid = tuple(budget.allocate(shape, weights.dtype, weights.device) for _ in range(streams))
    calls: list[dict[str, Any]] = []
    for row in range(len(tokens_NT)):
        embedded = [front.embed(tokens_NT[row : row + 1].to(weights.device)) for front in fronts]
        calls = embedded[0][1]
        for index, stream in enumerate(laid):
            stream[row : row + 1] = embedded[min(index, len(fronts) - 1)][0]
    shape = (*shape[:2], skeleton.attended)
    rooms = tuple(budget.allocate(shape, weights.dtype, weights.device) for _ in range(2 if beside else 0))
    return Start(calls, laid, rooms=rooms)


def walk(skeleton: Skeleton, weights: Weights, start: Start, *, batch_size: int) -> Iterator[Step]:
    """Every block in turn, read while the one before it works.

    `start` has no stream (weights only), one (each block's output, as the body left the block, feeds the next) or two: then
    the second is the original stream, advanced through the original block before the body sees it, and is the step's targets.
    With rooms, the original block stays at hand, and its stream is advanced when the body has done. The body may change the
    block; on its return the first stream goes through the block as it is then.
    """
    inputs, second = (*start.streams, None, None)[:2]
    for block in _read_ahead(skeleton, weights, start.calls):
        sides: tuple[Passage, Passage] | None = None
        if start.rooms:
            assert inputs is not None and second is not None
            sides = Passage(block, inputs, start.rooms[0]), Passage(block.twin(), second, start.rooms[1])
        elif second is not None:
            Passage(block, second).advance(batch_size)
        gradient = start.gradients[block.index] if start.gradients else None
        yield (step := Step(block, inputs, None if sides else second, sides, gradient))
        # The body's own name for the step lasts until it is given the next one, and the blocks must not.
        del step.block, step.sides
        if sides is not None:
            ours, original = sides
            del sides
            original.advance(batch_size)
            del original  # it holds a block of its own
            ours.advance(batch_size)
            del ours
        elif inputs is not None:
            Passage(block, inputs).advance(batch_size)
        del block


@dataclass(frozen=True)
class Tape:
    """What a walk back needs. calls: the blocks'; inputs: the hidden states that each block received; gradient: that of a loss
    by the hidden states after the last block, which the walk replaces block by block."""

    calls: list[dict[str, Any]]
    inputs: Sequence[Hidden]
    gradient: Hidden


# What is done with the input of a linear, as its weight multiplies it [..., inputs], and the gradient by its output
# [..., outputs], batch by batch.
See = Callable[[str, Tensor, Tensor], None]


def record(skeleton: Skeleton, weights: Weights, start: Start, budget: Budget, *, batch_size: int) -> list[Hidden]:
    """Walk a start of one stream to its end, and keep what each block received."""
    (stream,) = start.streams
    kept = []
    for _ in walk(skeleton, weights, start, batch_size=batch_size):
        copy = budget.allocate(stream.shape, weights.dtype, weights.device)
        copy.copy_from(stream, batch_size)
        kept.append(copy)
    return kept


def walk_back(
    skeleton: Skeleton, weights: Weights, tape: Tape, *, batch_size: int, watch: Callable[[Block], See | None]
) -> Iterator[Block]:
    """Every block in turn, from the last, once the gradient has gone back through it. Whoever takes one lets go of it before
    the next turn.

    watch: asked before, what is to be done with the linears of a block; None for nothing. After the last turn the gradient is
    that by the hidden states before the first block.
    """
    for block in _read_ahead(skeleton, weights, tape.calls, order=range(skeleton.depth - 1, -1, -1)):
        see = watch(block)
        for batch in tape.gradient.batches(back_at_a_time(batch_size)):
            gradient = tape.gradient[batch]
            tape.gradient[batch] = go_back(block, tape.inputs[block.index][batch], lambda _, given=gradient: given, see)
        yield block
        del block


def back_at_a_time(batch_size: int) -> int:
    """Sequences that go back through a block together where `batch_size` go forward: what a pass back needs is held as well."""
    return max(1, batch_size // 4)


def go_back(block: Block, x_BTD: Tensor, gradient_of: Callable[[Tensor], Tensor], see: See | None) -> Tensor:
    """The gradient by a block's input `x_BTD`, where `gradient_of` its output is that by the output.

    see: called with what the block's linears read and the gradients by what they make; None for nothing.
    """
    read: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    with torch.enable_grad():
        x = x_BTD.detach().requires_grad_()
        watched = block.linears if see is not None else ()
        with block.watch(watched, read.__setitem__), block.made(watched, made.__setitem__):
            y = block(x)
        names = list(made)
        own, *gradients = torch.autograd.grad(y, [x, *made.values()], gradient_of(y.detach()), allow_unused=True)
    if see is not None:
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                see(name, read[name].detach(), gradient)
    return own


def _read_ahead(
    skeleton: Skeleton, weights: Weights, calls: list[dict[str, Any]], order: Sequence[int] | None = None
) -> Iterator[Block]:
    """The blocks in order (None: as they are); while one is out, the next one's weights are being read: two at most are in
    memory, provided that whoever takes a block lets go of it before asking for the next."""
    left = list(range(skeleton.depth) if order is None else order)

    def read() -> tuple[int, dict[str, Tensor]] | None:
        return (index := left.pop(0), weights.read(skeleton.parameters_of(skeleton.blocks[index]))) if left else None

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        coming = reader.submit(read)
        while (found := coming.result()) is not None:
            coming = reader.submit(read)
            block = skeleton.block(found[0], found[1], calls[found[0]] if calls else {}, weights)
            del found
            yield block
            del block
