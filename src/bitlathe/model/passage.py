"""A block and one stream of hidden states on its way through it, batch by batch.

Whoever tunes a block stage by stage runs it again for each stage, and most of a run is attention, which is the same each time
once queries, keys and values are done. What it hands to its last linear is kept, so that it runs once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitlathe.model.block import Block
from bitlathe.model.hidden import Hidden
from bitlathe.model.layers import StagedLinear


@dataclass
class Passage:
    """block: as it is by now. received: what it receives. room: for what the last linear of its attention reads [sequences,
    tokens, inputs]; None where that is not to be kept.

    What was kept holds as long as the weights and stages of the linears before the last one are what they were; norms, biases
    and how a cache is rounded must not change. It serves the very batches that it was kept of: a device may sum otherwise in
    others. It is not kept for a block whose attention does something with what its last linear makes, or reads another width
    than there is room for.
    """

    block: Block
    received: Hidden
    room: Hidden | None = None
    _kept: set[tuple[int, int]] = field(default_factory=set, repr=False)
    _before: list[tuple[Tensor, nn.Module]] = field(default_factory=list, repr=False)
    _last: str | None = field(default=None, repr=False)
    _beside: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        names = self.block.attending
        if self.room is not None and names and self.block.linear(names[-1]).in_features == self.room.shape[2]:
            self._beside = self._look(names[-1])
            self._last = names[-1] if self._beside >= 0 else None

    @torch.no_grad()
    def __call__(self, batch: slice) -> Tensor:
        """What the block makes of a batch: [sequences, tokens, width]."""
        run, x = self.block, self.received[batch]
        if self._last is None:
            return run(x)
        with self._recalled(self._last, batch):
            return run(x)

    def advance(self, batch_size: int) -> None:
        """Put what the block makes in the place of what it received."""
        for batch in self.received.batches(batch_size):
            self.received[batch] = self(batch)
        self._kept.clear()

    def run_whole(self, batch: slice) -> Tensor:
        """The same as a call, with all of the attention."""
        self._kept.discard(self._ends(batch))
        return self(batch)

    def _ends(self, batch: slice) -> tuple[int, int]:
        start, stop, _ = batch.indices(len(self.received))
        return start, stop

    @torch.no_grad()
    def _look(self, last: str) -> int:
        """How many values attention gives beside what its last linear makes, all of them None; -1 where it is otherwise."""
        made: list[Tensor] = []
        given: list[object] = []
        run = self.block
        assert run.attention is not None
        ends, gives = lambda _, y: made.append(y), lambda _, y: given.append(y)
        with run.made([last], ends), run.made([run.attention], gives):
            run(self.received[:1])
        if len(made) != 1 or len(given) != 1:
            return -1
        parts = given[0] if isinstance(given[0], tuple) else (given[0],)
        return len(parts) - 1 if parts[0] is made[0] and all(part is None for part in parts[1:]) else -1

    @contextmanager
    def _recalled(self, last: str, batch: slice) -> Iterator[None]:
        """While open, attention does not run for a batch that is kept; that of another one is kept."""
        room, block = self.room, self.block
        assert room is not None and block.attention is not None
        linears = [block.linear(name) for name in block.attending[:-1]]
        ends, now = self._ends(batch), [(linear.weight.detach(), linear.stage) for linear in linears]
        if not _same(now, self._before):
            self._kept.clear()
        self._before = now

        def keep(_: str, x: Tensor) -> None:
            room[batch] = x
            # What shares sequences with it is written over.
            self._kept = {other for other in self._kept if other[1] <= ends[0] or ends[1] <= other[0]} | {ends}

        if ends in self._kept:
            with block.replaced(block.attention, _Recalled(block.linear(last), room[batch], self._beside)):
                yield
        else:
            with block.given([last], keep):
                yield


class _Recalled(nn.Module):
    """An attention of which only the last linear is left."""

    def __init__(self, last: StagedLinear, x: Tensor, beside: int) -> None:
        super().__init__()
        self.last, self.x, self.beside = last, x, beside

    def forward(self, *_: object, **__: object) -> object:
        """What the attention gives, whatever it is called with."""
        made = self.last(self.x)
        return (made, *[None] * self.beside) if self.beside else made


def _same(now: list[tuple[Tensor, nn.Module]], before: list[tuple[Tensor, nn.Module]]) -> bool:
    """Whether linears of these weights and stages make the same of the same."""
    return len(now) == len(before) and all(
        stage is old_stage and (weight.data_ptr() == old.data_ptr() or torch.equal(weight, old))
        for (weight, stage), (old, old_stage) in zip(now, before, strict=True)
    )
