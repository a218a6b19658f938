"""Closed-form rounding that knows which errors of a linear's output matter.

An error E [inputs, outputs] of a linear's weights costs sum(E * (H E)) of its output's squares. What it costs the model's
predictions is sum(E * (H E G)), with G = E[g g^T] of the gradients g by the linear's output: the Kronecker factor of the Fisher
information on the side of the outputs (K-FAC, Martens and Grosse, arXiv:1503.05671; for rounding, YAQA, Tseng et al.,
arXiv:2505.22988). H alone leaves rows apart; with G, errors of some rows are made up for by others.

Rows are taken in slices, the dearest first. A slice is solved by the functions of `solve`; then its error is fed into the rows
that are still to come, through G as GPTQ feeds that of a column through H. At the end each slice is solved again with all
others as they are. Linears that read the same are solved in the same steps: a slice has rows of each.

Where a linear has more outputs than inputs, nearly all of the work is E G. So it is kept beside the weights, and a slice that
changes adds its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from bitlathe.numerics.lattice import Lattice, side_by_side
from bitlathe.numerics.solve import Hessian, descend, feed_back, refit


@dataclass(frozen=True)
class Outputs:
    """What errors of a linear's outputs cost, and in how many slices its rows are solved. metric: G, as `prepared` gives it.
    slices: rows of one hear nothing of each other; more of them lose less, and cost passes over the columns."""

    metric: Hessian
    slices: int


@dataclass
class Side:
    """One linear, its columns in the order of H and its rows in that of G.

    wanted: what it should be near to; found: what it is by now, numbers of the lattice; priced: E G, with E = wanted - found.
    All are [columns, rows].
    """

    wanted: Tensor
    found: Tensor
    priced: Tensor
    lattice: Lattice
    outputs: Outputs

    @classmethod
    def of(cls, wanted: Tensor, found: Tensor, lattice: Lattice, outputs: Outputs) -> Side:
        """Of rows as they come, here and in the lattice."""
        order = outputs.metric.order
        wanted, found = wanted[:, order], found[:, order]
        return cls(wanted, found, (wanted - found) @ outputs.metric.h, lattice.part(order), outputs)

    @property
    def result(self) -> Tensor:
        """What it is by now, with rows as they come."""
        return self.found[:, self.outputs.metric.order.argsort()]

    def cost(self, moments: Hessian) -> float:
        """What its errors cost."""
        return (moments.h @ (self.wanted - self.found)).mul_(self.priced).sum(dtype=torch.float64).item()

    def moved(self, lattice: Lattice) -> Side:
        """The same codes on another lattice of the same grid, with rows as they come there."""
        other = lattice.part(self.outputs.metric.order)
        found = self.lattice.moved(self.found, other)
        return replace(self, found=found, priced=(self.wanted - found) @ self.outputs.metric.h, lattice=other)

    def empty(self) -> Side:
        """With no errors yet, to be changed slice by slice."""
        return replace(self, found=self.wanted.clone(), priced=torch.zeros_like(self.wanted))

    def copy(self) -> Side:
        """One to be changed."""
        return replace(self, found=self.found.clone(), priced=self.priced.clone())

    def slice(self, number: int) -> slice:
        """The rows of a slice; none, where there are fewer rows than slices."""
        rows, slices = self.wanted.shape[1], self.outputs.slices
        return slice(number * rows // slices, (number + 1) * rows // slices)

    def put(self, rows: slice, landed: Tensor) -> None:
        """Change a slice."""
        self.priced.addmm_(self.found[:, rows] - landed, self.outputs.metric.h[rows])
        self.found[:, rows] = landed

    def feed(self, left: Tensor, rows: slice) -> None:
        """Have the error of a slice made up for by the rows that are still to come, in what they are `left` to come near to."""
        error = left[:, rows] - self.found[:, rows]
        factor = self.outputs.metric.factor
        error = torch.linalg.solve_triangular(factor[rows, rows], error, upper=True, left=False)
        left[:, rows.stop :].addmm_(error, factor[rows, rows.stop :], alpha=-1)

    def aim(self, rows: slice) -> Tensor:
        """What a slice would best be with all others as they are."""
        own = self.outputs.metric.h[rows, rows]
        pull = self.priced[:, rows] - (self.wanted[:, rows] - self.found[:, rows]) @ own
        return self.wanted[:, rows] + torch.linalg.solve(own, pull, left=False)


def two_sided(sides: Sequence[Side], moments: Hessian, *, passes: int) -> list[tuple[float, Side]]:
    """What loses least of the predictions, linear by linear, and never more than what is given; each with its cost.

    sides: of linears that read the same. passes: of coordinate descent, for each slice alone and then with all others.
    """
    fed = _fed(sides, moments, passes)
    return _best(sides, moments, chain([fed], _again(fed, moments, passes)))


def settled(sides: Sequence[Side], moments: Hessian, *, passes: int) -> list[tuple[float, Side]]:
    """The same by descent alone, from what they are."""
    return _best(sides, moments, _again(sides, moments, passes))


def refitted(side: Side, moments: Hessian, *, width: int, ridge: float) -> Tensor:
    """See `solve.refit`: multiples [groups, rows] of the scales with which the same codes lose less, each slice with all others
    as they are by then. Rows as they come."""
    back, side, multiples = moments.order.argsort(), side.copy(), []
    h = moments.h[back][:, back]
    for rows in map(side.slice, range(side.outputs.slices)):
        found = side.found[back, rows]
        multiples.append(refit(side.aim(rows)[back], found, h, width=width, ridge=ridge))
        side.put(rows, (found * multiples[-1].repeat_interleave(width, 0))[moments.order])
    return torch.cat(multiples, dim=1)[:, side.outputs.metric.order.argsort()]


def _best(sides: Sequence[Side], moments: Hessian, rounds: Iterable[list[Side]]) -> list[tuple[float, Side]]:
    """Of what they are after each round and before the first, what loses least, linear by linear, and its cost."""
    best = [(side.cost(moments), side) for side in sides]
    for found in rounds:
        now = [(side.cost(moments), side) for side in found]
        best = [min(pair, key=lambda one: one[0]) for pair in zip(best, now, strict=True)]
    return best


def _fed(sides: Sequence[Side], moments: Hessian, passes: int) -> list[Side]:
    """What they are after all slices in turn, each of which feeds its error into those that are still to come."""
    left, sides = [side.wanted.clone() for side in sides], [side.empty() for side in sides]
    for number in range(sides[0].outputs.slices):
        rows = [side.slice(number) for side in sides]
        aim = torch.cat([own[:, place] for own, place in zip(left, rows, strict=True)], dim=1)
        lattice = _beside(sides, rows)
        landed = feed_back(aim, lattice, moments)
        for _ in range(passes):
            landed = descend(aim, landed, lattice, moments)
        _put(sides, rows, landed)
        for side, own, place in zip(sides, left, rows, strict=True):
            side.feed(own, place)
    return sides


def _again(sides: Sequence[Side], moments: Hessian, passes: int) -> Iterator[list[Side]]:
    """What they are each time after all slices, each with all others as they are."""
    for _ in range(passes):
        sides = [side.copy() for side in sides]
        for number in range(sides[0].outputs.slices):
            rows = [side.slice(number) for side in sides]
            aim = torch.cat([side.aim(place) for side, place in zip(sides, rows, strict=True)], dim=1)
            now = torch.cat([side.found[:, place] for side, place in zip(sides, rows, strict=True)], dim=1)
            _put(sides, rows, descend(aim, now, _beside(sides, rows), moments))
        yield sides


def _beside(sides: Sequence[Side], rows: Sequence[slice]) -> Lattice:
    return side_by_side([side.lattice.part(place) for side, place in zip(sides, rows, strict=True)])


def _put(sides: Sequence[Side], rows: Sequence[slice], landed: Tensor) -> None:
    for side, place, own in zip(sides, rows, landed.split([place.stop - place.start for place in rows], dim=1), strict=True):
        side.put(place, own)
