"""Second moments of what the linears of a block read: on the stream they will really receive, and against the original's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from bitlathe.model.block import Block
from bitlathe.model.moments import counting
from bitlathe.model.walk import Step

# Tokens below which an expert borrows from the others.
_FEW = 256


@dataclass
class Gram:
    """Of one input x and the original's x_f, over the tokens that count (see `counting`). h: sum of x x^T; drift: sum of
    (x_f - x) x^T; both [inputs, inputs], float32. drift is None where the two do not go by the same tokens, as those of an
    expert do not. onto: sum of (r_f - r) x^T [outputs, inputs], r what the output is added to; None where it is not added as it
    is. tokens: how many."""

    h: Tensor
    drift: Tensor | None
    onto: Tensor | None
    tokens: int

    def missing(self, weight: Tensor) -> Tensor | None:
        """What the output of a linear [outputs, inputs] lacks, and what it is added to, as far as x tells: the mean of
        (r_f + W x_f - r - W x) x^T; None where that is not known."""
        if self.drift is None:
            return None
        lost = weight @ self.drift
        return (lost if self.onto is None else lost + self.onto) / self.tokens


class _Enough(Exception):
    """All that was asked for has been read."""


@dataclass(frozen=True)
class _Read:
    """What a linear reads, and what its output is added to, where it is added as it is."""

    x: Tensor
    onto: Tensor | None


def read(block: Block, x: Tensor, names: Iterable[str]) -> dict[str, _Read]:
    """What the weights of the linears `names` multiply for hidden states `x`: their inputs, turned and rounded. A linear that
    is not reached has none. The block runs no further than it must."""
    found: dict[str, _Read] = {}
    beside: dict[str, Tensor] = {}
    wanted = set(names)
    norms = {block.onto[name] for name in wanted if name in block.onto}

    def see(name: str, given: Tensor) -> None:
        found[name] = _Read(given, beside.get(block.onto.get(name, "")))
        if found.keys() == wanted:
            raise _Enough

    with block.given(norms, beside.__setitem__), block.watch(wanted, see), suppress(_Enough):
        block(x)
    return found


@torch.no_grad()
def grams_of(step: Step, names: Iterable[str], *, batches: Iterable[slice]) -> dict[str, Gram]:
    """The moments of what `names` read over some batches; none for a linear that no token reached."""
    assert step.inputs is not None and step.original is not None
    wanted, grams = list(names), {}
    original, received = step.original
    for batch in batches:
        states = step.inputs[batch]
        ours, theirs = read(step.block, states, wanted), read(original, received[batch], wanted)
        for name, own in ours.items():
            paired = theirs.get(name)
            if paired is None or not own.x.shape[:-1] == paired.x.shape[:-1] == states.shape[:-1]:
                paired = None
            if name not in grams:
                grams[name] = _nothing(own)
            _add(grams[name], own, paired)
    return grams


def _nothing(like: _Read) -> Gram:
    inputs = like.x.shape[-1]
    h = like.x.new_zeros(inputs, inputs, dtype=torch.float32)
    onto = None if like.onto is None else h.new_zeros(like.onto.shape[-1], inputs)
    return Gram(h, torch.zeros_like(h), onto, 0)


def _add(gram: Gram, own: _Read, paired: _Read | None) -> None:
    """Take in what a linear reads, and the original's beside it."""
    counts = counting(own.x) if paired is None else counting(own.x, paired.x)
    x = own.x[counts].float()
    gram.tokens += len(x)
    gram.h.addmm_(x.T, x)
    if paired is None:
        gram.drift = gram.onto = None
        return
    if gram.drift is not None:
        gram.drift.addmm_((paired.x[counts].float() - x).T, x)
    if gram.onto is not None and own.onto is not None and paired.onto is not None:
        gram.onto.addmm_((paired.onto[counts].float() - own.onto[counts].float()).T, x)


def blended(grams: Mapping[str, Gram]) -> dict[str, Gram]:
    """The moments of the groups of a stage that tokens reached; those of experts that few did are filled up with the mean."""
    reached = {name: gram for name, gram in grams.items() if gram.tokens}
    few = {name: gram for name, gram in reached.items() if gram.tokens < _FEW}
    if len(reached) < 2 or not few:
        return reached
    mean = torch.stack([gram.h for gram in reached.values()]).sum(0) / sum(gram.tokens for gram in reached.values())
    filled = {name: Gram(gram.h + mean * (_FEW - gram.tokens), None, None, _FEW) for name, gram in few.items()}
    return reached | filled
