"""Which tokens of a text a fit may listen to, and what their channels' mean squares are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bitlathe.model.block import Block
from bitlathe.model.hidden import Hidden

# A token is of extreme norm where its |x| is more than this many times the median of its sequence; 25 times in |x|^2.
_EXTREME = 5.0


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


@torch.no_grad()
def moments_of(block: Block, inputs: Hidden, names: Iterable[str], *, batch_size: int) -> Moments:
    """The moments of what the linears `names` read where the block receives `inputs`."""
    moments = Moments()
    with block.watch(names, moments.see):
        for batch in inputs.batches(batch_size):
            for part in block.parts(inputs[batch]):
                block(part)
    return moments
