"""Second moments of what the linears of a block read: on the stream they will really receive, and against the original's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bitlathe.model.moments import counting
from bitlathe.model.passage import Passage
from bitlathe.model.walk import Step

# Tokens below which an expert borrows from the others.
_FEW = 256
# Tokens taken in at once, and columns whose products are made at once.
_AT_A_TIME, _WIDE = 2048, 256


@dataclass
class Gram:
    """Of one input x and the original's x_f, over the tokens that count (see `counting`).

    h: sum of x x^T [inputs, inputs], float32, as are the others. paired: whether the original always went by the same tokens,
    as that of an expert does not; then one of two is known. drift: sum of (x_f - x) x^T [inputs, inputs], for linears that read
    the same. lack: sum of (r_f + W x_f - r - W x) x^T [outputs, inputs], for one whose output is added as it is, to r. tokens:
    how many.
    """

    h: Tensor
    drift: Tensor | None = None
    lack: Tensor | None = None
    paired: bool = True
    tokens: int = 0

    def missing(self, weight: Tensor) -> Tensor | None:
        """What the output of a linear [outputs, inputs] lacks, and what it is added to, as far as x tells: the mean of
        (r_f + W x_f - r - W x) x^T, r none for one that is not added as it is; None where that is not known."""
        lost = self.lack if self.drift is None else weight @ self.drift
        return lost / self.tokens if lost is not None and self.paired else None


class _Enough(Exception):
    """All that was asked for has been read."""


@dataclass(frozen=True)
class _Read:
    """What a linear reads, and what its output is added to, where it is added as it is."""

    x: Tensor
    onto: Tensor | None


def read(passage: Passage, batch: slice, names: Iterable[str]) -> dict[str, _Read]:
    """What the weights of the linears `names` multiply on a batch: their inputs, turned and rounded. A linear that is not
    reached has none. The block runs no further than it must."""
    block = passage.block
    found: dict[str, _Read] = {}
    beside: dict[str, Tensor] = {}
    wanted = set(names)
    norms = {block.onto[name] for name in wanted if name in block.onto}

    def see(name: str, given: Tensor) -> None:
        found[name] = _Read(given, beside.get(block.onto.get(name, "")))
        if found.keys() == wanted:
            raise _Enough

    with block.given(norms, beside.__setitem__), block.watch(wanted, see), suppress(_Enough):
        # What is kept of an attention does not reach the linears before its last one.
        run = passage.run_whole if wanted.intersection(block.attending[:-1]) else passage
        run(batch)
    return found


@torch.no_grad()
def grams_of(step: Step, names: Iterable[str], *, batches: Iterable[slice]) -> dict[str, Gram]:
    """The moments of what `names` read over some batches; none for a linear that no token reached."""
    assert step.sides is not None
    wanted, grams = list(names), {}
    ours, original = step.sides
    for batch in batches:
        found, theirs = (read(side, batch, wanted) for side in step.sides)
        shape = (batch.stop - batch.start, ours.received.shape[1])
        for name, own in found.items():
            paired = theirs.get(name)
            if paired is None or not own.x.shape[:-1] == paired.x.shape[:-1] == shape:
                paired = None
            if name not in grams:
                inputs = own.x.shape[-1]
                grams[name] = Gram(own.x.new_zeros(inputs, inputs, dtype=torch.float32))
            _add(grams[name], own, paired, original.block.linear(name).weight)
    for gram in grams.values():
        _mirror(gram.h)
    return grams


def _add(gram: Gram, own: _Read, paired: _Read | None, weight: Tensor) -> None:
    """Take in what a linear reads, and the original's beside it."""
    counts = counting(own.x) if paired is None else counting(own.x, paired.x)
    gram.paired = gram.paired and paired is not None
    for tokens in _parts(counts.flatten()):
        x = own.x.flatten(0, -2)[tokens].float()
        gram.tokens += len(x)
        _add_products(gram.h, x)
        if paired is None or not gram.paired:
            continue
        drift = paired.x.flatten(0, -2)[tokens].float() - x
        if own.onto is None or paired.onto is None:
            gram.drift = _with(gram.drift, drift, x)
        else:
            before, after = (onto.flatten(0, -2)[tokens].float() for onto in (own.onto, paired.onto))
            lack = F.linear(drift, weight.float()).add_(after).sub_(before)
            gram.lack = _with(gram.lack, lack, x)


def _parts(counts: Tensor) -> Iterable[slice | Tensor]:
    """The tokens that count, a part at a time; without picking any, where all do."""
    if counts.all():
        return [slice(start, start + _AT_A_TIME) for start in range(0, len(counts), _AT_A_TIME)]
    return counts.nonzero().squeeze(1).split(_AT_A_TIME)


def _add_products(h: Tensor, x: Tensor) -> None:
    """Add x^T x to h, which is symmetric: what lies below its diagonal is left for the end, but for what a block holds."""
    for start in range(0, len(h), _WIDE):
        h[start : start + _WIDE, start:].addmm_(x[:, start : start + _WIDE].T, x[:, start:])


def _mirror(h: Tensor) -> None:
    """Put what lies above the diagonal below it too, some rows at a time."""
    for start in range(0, len(h), _WIDE):
        own = slice(start, start + _WIDE)
        h[own.stop :, own] = h[own, own.stop :].T


def _with(total: Tensor | None, error: Tensor, x: Tensor) -> Tensor:
    return error.T @ x if total is None else total.addmm_(error.T, x)


def blended(grams: Mapping[str, Gram]) -> dict[str, Gram]:
    """The moments of the groups of a stage that tokens reached; those of experts that few did are filled up with the mean."""
    reached = {name: gram for name, gram in grams.items() if gram.tokens}
    few = {name: gram for name, gram in reached.items() if gram.tokens < _FEW}
    if len(reached) < 2 or not few:
        return reached
    mean = torch.stack([gram.h for gram in reached.values()]).sum(0) / sum(gram.tokens for gram in reached.values())
    filled = {name: Gram(gram.h + mean * (_FEW - gram.tokens), paired=False, tokens=_FEW) for name, gram in few.items()}
    return reached | filled
