"""The walk: blocks of a model, one after the other, each alive only while it is its turn.

These are the only loops over blocks. Whatever is done to every block (tuning, evaluation, statistics) is the body of a
`for` over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bitlathe.model.block import Block
from bitlathe.model.hidden import Budget, Hidden
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.weights import Weights


@dataclass(frozen=True)
class Start:
    """Where a walk begins: the blocks' calls, and the hidden states [sequences, tokens, width] before the first block."""

    calls: list[dict[str, Any]]
    streams: tuple[Hidden, ...]


@dataclass
class Step:
    """One block's turn. inputs: what it receives from the blocks before it, as they are after their turn; targets: what the
    original block makes of the original stream. Both None on a walk without text; targets None on a walk of one stream.

    Once the walk is asked for the next turn, this one no longer has its `block`."""

    block: Block = field(repr=False)
    inputs: Hidden | None
    targets: Hidden | None


def begin(skeleton: Skeleton, weights: Weights, tokens_NT: Tensor, budget: Budget, *, streams: int) -> Start:
    """Embed the windows `tokens_NT` [sequences, tokens] and lay out `streams` equal streams of hidden states."""
    front = skeleton.front(weights)
    width = skeleton.model.config.hidden_size
    shape = (tokens_NT.shape[0], tokens_NT.shape[1], width)
    laid = tuple(budget.allocate(shape, weights.dtype, weights.device) for _ in range(streams))
    calls: list[dict[str, Any]] = []
    for row in range(len(tokens_NT)):
        hidden, calls = front.embed(tokens_NT[row : row + 1].to(weights.device))
        for stream in laid:
            stream[row : row + 1] = hidden
    return Start(calls, laid)


def walk(skeleton: Skeleton, weights: Weights, start: Start, *, batch_size: int) -> Iterator[Step]:
    """Every block in turn, read while the one before it works.

    `start` has no stream (weights only), one (each block's output, as the body left the block, feeds the next) or two: then
    the second is the original stream, advanced through the original block before the body sees it, and is the step's targets.
    The body may change the block; on its return the first stream goes through the block as it is then.
    """
    inputs, targets = (*start.streams, None, None)[:2]
    for block in _read_ahead(skeleton, weights, start.calls):
        if targets is not None:
            advance(block, targets, batch_size)
        step = Step(block, inputs, targets)
        yield step
        # The body's own name for the step lasts until it is given the next one, and the block must not.
        del step.block
        if inputs is not None:
            advance(block, inputs, batch_size)
        del block


@torch.no_grad()
def advance(block: Block, hidden: Hidden, batch_size: int) -> None:
    """Replace hidden states by the block's output for them."""
    for batch in hidden.batches(batch_size):
        hidden[batch] = block(hidden[batch])


def _read_ahead(skeleton: Skeleton, weights: Weights, calls: list[dict[str, Any]]) -> Iterator[Block]:
    """The blocks in order; while one is out, the next one's weights are being read: two at most are in memory, provided
    that whoever takes a block lets go of it before asking for the next."""

    def read(index: int) -> dict[str, Tensor]:
        return weights.read(skeleton.parameters_of(skeleton.blocks[index])) if index < skeleton.depth else {}

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        coming = reader.submit(read, 0)
        for index in range(skeleton.depth):
            tensors = coming.result()
            coming = reader.submit(read, index + 1)
            block = skeleton.block(index, tensors, calls[index] if calls else {}, weights)
            del tensors
            yield block
            del block
