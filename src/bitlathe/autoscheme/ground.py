"""What a search stands on: the model, what may be chosen, and the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitlathe.autoscheme.space import Space
from bitlathe.model.fold import edits_of
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.weights import DTYPES, Weights
from bitlathe.plan import Plan

# Called as a search goes on: what is done, how far it is, and how far it goes.
Listen = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Ground:
    """What a search stands on.

    skeleton, weights: of the original, turned as the plan says; plain: the same as its checkpoint has them. tokens, held_out:
    windows [windows, tokens], to learn from and to measure on. memory: bytes of hidden states; what is beyond lies in a file.
    seed: of the sampled labels. factors: what channels are smoothed by, in `weights` too.
    """

    skeleton: Skeleton
    weights: Weights
    plain: tuple[Skeleton, Weights]
    space: Space
    tokens: Tensor
    held_out: Tensor
    batch_size: int
    memory: int
    seed: int
    factors: Mapping[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return DTYPES[self.space.plan.dtype]

    @property
    def scored(self) -> Weights:
        """The weights that scores are made with: gradients of single tokens are below what fp16 holds."""
        weights = self.weights.unrounded
        return replace(weights, dtype=torch.float32) if self.dtype == torch.float16 else weights

    def measured(self, plan: Plan) -> Weights:
        """The weights of the result of a plan in the dtype in which models are measured; those of linears before rounding."""
        return replace(self.weights, dtype=torch.float32, edits=edits_of(self.skeleton, plan, self.factors))
