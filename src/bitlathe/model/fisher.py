"""Gradients of the likelihood of what a model itself would say: labels are drawn from its own predictions.

What they are on average over tokens, g g^T, is the model's Fisher information: the metric in which its predictions change
(labels that are drawn, not those of the text: Kunstner et al., arXiv:1905.12558).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitlathe.model.hidden import Budget, Hidden
from bitlathe.model.skeleton import Head, Skeleton
from bitlathe.model.walk import See, Tape, begin, go_back, record, walk_back
from bitlathe.model.weights import Weights


def from_labels(head: Head, last: Hidden, gradient: Hidden, *, seed: int, see: See | None = None) -> None:
    """Put the gradient of the negative log-likelihood by the `last` hidden states into `gradient`, of the same shape.

    see: as for `go_back`, of the head.
    """
    for window in range(len(last)):
        # A number for each token, not a draw for each: the same on every device.
        chances = torch.rand(last.shape[1], generator=torch.Generator().manual_seed(seed * 1_000_003 + window))
        parts, done = [], 0
        for part in head.parts(last[window : window + 1]):
            drawn = chances[done : done + part.shape[1]].to(part.device)
            parts.append(go_back(head, part, lambda logits, drawn=drawn: _less_a_label(logits, drawn), see))
            done += part.shape[1]
        gradient[window : window + 1] = torch.cat(parts, dim=1)


def _less_a_label(logits_BTV: Tensor, chances_T: Tensor) -> Tensor:
    """The gradient by logits of the negative log-likelihood of labels that are drawn from them. chances: in [0, 1)."""
    p = logits_BTV.float().softmax(-1)
    sums = p.cumsum(-1)
    label = torch.searchsorted(sums, chances_T.view(1, -1, 1) * sums[..., -1:], right=True)
    label = torch.minimum(label, label.new_full((), p.shape[-1] - 1))
    return p.scatter_add_(-1, label, torch.full_like(p[..., :1], -1.0)).to(logits_BTV.dtype)


def gradients_of(
    skeleton: Skeleton, weights: Weights, tokens_NT: Tensor, budget: Budget, *, batch_size: int, seed: int
) -> list[Hidden]:
    """For each block, the gradient by what it makes of the windows `tokens_NT`: [sequences, tokens, width].

    One pass forward and one back. Room is taken for two more than there are blocks.
    """
    start = begin(skeleton, weights.unrounded, tokens_NT, budget, streams=1)
    received = record(skeleton, weights.unrounded, start, budget, batch_size=batch_size)
    # What the last block makes is not needed once the gradient by it is known: that takes its place.
    (last,) = start.streams
    gradient = budget.allocate(last.shape, weights.dtype, weights.device)
    from_labels(skeleton.head(weights.unrounded), last, gradient, seed=seed)
    last.copy_from(gradient, batch_size)
    tape = Tape(start.calls, received, gradient)
    for block in walk_back(skeleton, weights.unrounded, tape, batch_size=batch_size, watch=lambda _: None):
        # By what the block received, which is what the one before it makes.
        received[block.index].copy_from(gradient, batch_size)
        del block  # before the next one comes
    return [*received[1:], last]
