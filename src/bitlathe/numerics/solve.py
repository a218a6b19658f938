"""Closed-form rounding: weights that lose least of a linear's output, under scales that are fixed.

A linear makes y = W x. With the second moments of its input, H = E[x x^T], an error E of its weights costs tr(E H E^T).
Rounding to nearest leaves out how the errors of columns add up; the functions here do not:

- `feed_back`: GPTQ (Frantar et al., arXiv:2210.17323): columns one after the other, the largest moments first, the error of
  each made up for by those that are still to come.
- `descend`: each column again, with all others as they are. Never worse; a pass costs what `feed_back` does.
- `refit`: codes fixed, each group's scale by least squares, group after group.
- `towards`: weights that make up for an input that already differs from the original's (GPTAQ, Li et al., arXiv:2504.02692).

Weights are [columns, rows] here, float32, and so are all that stands beside them (see `lattice`); H is [columns, columns].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitlathe.numerics import columns
from bitlathe.numerics.columns import BLOCK, LEAST
from bitlathe.numerics.lattice import Lattice


@dataclass(frozen=True)
class Hessian:
    """Second moments of an input, ready to be solved with. order: columns by descending moments; h: H and its damping, in that
    order; factor: upper R with R^T R the inverse of h."""

    order: Tensor
    h: Tensor
    factor: Tensor

    def loss(self, error: Tensor) -> Tensor:
        """What an error [columns, rows], columns in order, costs each row: [rows]."""
        return (self.h @ error).mul_(error).sum(0)


def prepared(h: Tensor, damping: float) -> Hessian | None:
    """H with `damping` times its mean diagonal added; ten times more where that does not do, up to three times. None where H
    has no inverse even so."""
    order = h.diagonal().argsort(descending=True)
    h = h[order][:, order]
    mean = h.diagonal().mean()
    if not torch.isfinite(mean) or mean <= 0:
        return None
    for _ in range(4):
        damped = h.clone()
        damped.diagonal().add_(damping * mean)
        # With h = F F^T, F upper, the inverse is R^T R with R the inverse of F: no inverse is ever factored.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            ones = torch.eye(len(h), device=h.device, dtype=h.dtype)
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), ones, upper=True)
            if torch.isfinite(factor).all():
                return Hessian(order, damped, factor.contiguous())
        damping *= 10
    return None


def feed_back(wanted: Tensor, lattice: Lattice, moments: Hessian) -> Tensor:
    """GPTQ. wanted: the weights to come near to; all with columns in the moments' order."""
    left = _own(wanted)
    found = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        own, reach = left[start:end], moments.factor[start:end, start:end]
        errors = columns.feed(own, found[start:end], reach, lattice.between(start, end))
        left[end:].addmm_(moments.factor[start:end, end:].T, errors, alpha=-1)
    return found


def descend(wanted: Tensor, found: Tensor, lattice: Lattice, moments: Hessian) -> Tensor:
    """One pass of coordinate descent from `found`."""
    found = _own(found)
    pull = moments.h @ (wanted - found)
    for start in range(0, len(found), BLOCK):
        end = min(start + BLOCK, len(found))
        before = found[start:end].clone()
        columns.descend(pull[start:end], found[start:end], moments.h[start:end, start:end], lattice.between(start, end))
        pull[end:].addmm_(moments.h[end:, start:end], found[start:end] - before, alpha=-1)
    return found


def _own(x: Tensor) -> Tensor:
    """A copy that may be changed, and that the loops over columns can take."""
    return x.clone(memory_format=torch.contiguous_format)


def refit(wanted: Tensor, found: Tensor, h: Tensor, *, width: int, ridge: float) -> Tensor:
    """Multiples [groups, rows] of the scales of groups of `width` columns with which the same codes lose less, columns in their
    own order; for numbers that are scale times code with nothing taken off, and for others the best stretch of all of it.

    ridge: how dear a change is, as a part of what the group's own numbers cost.
    """
    groups = found.unflatten(0, (-1, width))
    multiples = torch.ones_like(groups[:, 0])
    pull = h @ (wanted - found)
    for group, own in enumerate(groups):
        place = slice(group * width, (group + 1) * width)
        cost = (h[place, place] @ own).mul_(own).sum(0)
        gain = (pull[place] * own).sum(0)
        change = torch.where(cost > 0, gain / (cost * (1 + ridge)).clamp(min=LEAST), 0.0).clamp(-0.5, 0.5)
        multiples[group] += change
        pull.addmm_(h[:, place], own * change, alpha=-1)
    return multiples


def towards(weight: Tensor, h: Tensor, missing: Tensor, *, part: float, ridge: float) -> Tensor:
    """The weights [rows, columns] that W becomes so that it makes up for what its output lacks, as far as its input x tells.

    missing: E[e x^T] [rows, columns], e what the output lacks: W (x_f - x), where it should be W x_f. part: how much of it is
    made up for. ridge: in mean diagonals of H, added to it: what is small in H is known badly.
    """
    damped = h.clone()
    damped.diagonal().add_(ridge * h.diagonal().mean())
    lower, _ = torch.linalg.cholesky_ex(damped)
    return weight + part * torch.cholesky_solve(missing.T, lower).T
