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
    expert do not. tokens: how many."""

    h: Tensor
    drift: Tensor | None
    tokens: int

    def see(self, x: Tensor, original: Tensor | None) -> None:
        """Take in inputs [tokens, inputs], the original's beside them."""
        self.tokens += len(x)
        x = x.float()
        self.h.addmm_(x.T, x)
        if original is None:
            self.drift = None
        elif self.drift is not None:
            self.drift.addmm_((original.float() - x).T, x)


class _Enough(Exception):
    """All that was asked for has been read."""


def read(block: Block, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """What the weights of the linears `names` multiply for hidden states `x`: their inputs, turned and rounded. A linear that
    is not reached has none. The block runs no further than it must."""
    found: dict[str, Tensor] = {}
    wanted = set(names)

    def see(name: str, given: Tensor) -> None:
        found[name] = given
        if found.keys() == wanted:
            raise _Enough

    with block.watch(wanted, see), suppress(_Enough):
        block(x)
    return found


@torch.no_grad()
def grams_of(step: Step, names: Iterable[str], *, batches: Iterable[slice]) -> dict[str, Gram]:
    """The moments of what `names` read over some batches; none for a linear that no token reached."""
    assert step.inputs is not None and step.original is not None
    wanted, grams = list(names), {}
    original, received = step.original
    for batch in batches:
        x = step.inputs[batch]
        ours, theirs = read(step.block, x, wanted), read(original, received[batch], wanted)
        for name, given in ours.items():
            paired = theirs.get(name)
            if paired is None or not given.shape[:-1] == paired.shape[:-1] == x.shape[:-1]:
                paired = None
            counts = counting(given) if paired is None else counting(given, paired)
            if name not in grams:
                nothing = torch.zeros(given.shape[-1], given.shape[-1], device=given.device)
                grams[name] = Gram(nothing, nothing.clone(), 0)
            grams[name].see(given[counts], None if paired is None else paired[counts])
    return grams


def blended(name: str, grams: Mapping[str, Gram]) -> Gram | None:
    """The moments of a group; those of few tokens filled up with the mean of all groups of its stage, which are experts. None
    where no token reached it."""
    gram = grams.get(name)
    if gram is None or gram.tokens >= _FEW or len(grams) == 1:
        return gram
    tokens = sum(each.tokens for each in grams.values())
    mean = torch.stack([each.h for each in grams.values()]).sum(0) / tokens
    return Gram(gram.h + mean * (_FEW - gram.tokens), None, _FEW)
