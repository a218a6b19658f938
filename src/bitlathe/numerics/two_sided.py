"""Closed-form rounding that knows which errors of a linear's output matter.

An error E [inputs, outputs] of a linear's weights costs sum(E * (H E)) of its output's squares. What it costs the model's
predictions is sum(E * (H E G)), with G = E[g g^T] of the gradients g by the linear's output: the Kronecker factor of the Fisher
information on the side of the outputs (K-FAC, Martens and Grosse, arXiv:1503.05671; for rounding, YAQA, Tseng et al.,
arXiv:2505.22988). H alone leaves rows apart; with G, errors of some rows are made up for by others.

Rows are taken in slices, the dearest first. A slice is solved by the functions of `solve`; then its error is fed into the rows
that are still to come, through G as GPTQ feeds that of a column through H. At the end each slice is solved again with all
others as they are. Linears that read the same are solved in the same steps: a slice has rows of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
class _Side:
    """One linear, its rows in the order of its G. found: what it is by now."""

    wanted: Tensor
    found: Tensor
    outputs: Outputs

    @classmethod
    def of(cls, wanted: Tensor, found: Tensor, outputs: Outputs) -> _Side:
        """Of rows as they come."""
        order = outputs.metric.order
        return cls(wanted[:, order], found[:, order], outputs)

    def slice(self, number: int) -> slice:
        """The rows of a slice; none, where there are fewer rows than slices."""
        rows, slices = self.wanted.shape[1], self.outputs.slices
        return slice(number * rows // slices, (number + 1) * rows // slices)

    def feed(self, left: Tensor, rows: slice) -> None:
        """Have the error of a slice made up for by the rows that are still to come, in what they are `left` to come near to."""
        error = left[:, rows] - self.found[:, rows]
        factor = self.outputs.metric.factor
        error = torch.linalg.solve_triangular(factor[rows, rows], error, upper=True, left=False)
        left[:, rows.stop :] -= error @ factor[rows, rows.stop :]

    def aim(self, rows: slice) -> Tensor:
        """What a slice would best be with all others as they are."""
        g, error = self.outputs.metric.h, self.wanted - self.found
        pull = error @ g[:, rows] - error[:, rows] @ g[rows, rows]
        return self.wanted[:, rows] + torch.linalg.solve(g[rows, rows], pull, left=False)

    def lost(self, moments: Hessian) -> float:
        """What its errors cost by now."""
        error = self.wanted - self.found
        return (moments.h @ error @ self.outputs.metric.h).mul_(error).sum(dtype=torch.float64).item()


def two_sided(
    wanted: Sequence[Tensor],
    found: Sequence[Tensor],
    lattices: Sequence[Lattice],
    moments: Hessian,
    outputs: Sequence[Outputs],
    *,
    passes: int,
) -> list[Tensor]:
    """Numbers of the lattices [columns, rows] near to `wanted` that lose least of the predictions; none more than `found` does.

    One of each for every linear that reads the same, with columns in the moments' order and rows as they come. passes: of
    coordinate descent, for each slice alone and then with all others.
    """
    sides, lattices = _sides(wanted, found, outputs), _parts(lattices, outputs)
    return _best(sides, moments, chain(_fed(sides, lattices, moments, passes), _again(sides, lattices, moments, passes)))


def settled(
    wanted: Sequence[Tensor],
    found: Sequence[Tensor],
    lattices: Sequence[Lattice],
    moments: Hessian,
    outputs: Sequence[Outputs],
    *,
    passes: int,
) -> list[Tensor]:
    """The same, from `found` on, which lies on the lattices, by descent alone."""
    sides, lattices = _sides(wanted, found, outputs), _parts(lattices, outputs)
    return _best(sides, moments, _again(sides, lattices, moments, passes))


def refitted(
    wanted: Sequence[Tensor], found: Sequence[Tensor], h: Tensor, outputs: Sequence[Outputs], *, width: int, ridge: float
) -> list[Tensor]:
    """See `solve.refit`: multiples [groups, rows] of the scales with which the same codes lose less, each slice with all others
    as they are by then. Columns in their own order, here and in `h`."""
    multiples = []
    for side in _sides(wanted, found, outputs):
        own = []
        for rows in map(side.slice, range(side.outputs.slices)):
            own.append(refit(side.aim(rows), side.found[:, rows], h, width=width, ridge=ridge))
            side.found[:, rows] *= own[-1].repeat_interleave(width, 0)
        multiples.append(torch.cat(own, dim=1)[:, side.outputs.metric.order.argsort()])
    return multiples


def cost(wanted: Tensor, found: Tensor, moments: Hessian, outputs: Outputs) -> float:
    """What an error [columns, rows] costs; columns in the moments' order, rows as they come."""
    return _Side.of(wanted, found, outputs).lost(moments)


def _sides(wanted: Sequence[Tensor], found: Sequence[Tensor], outputs: Sequence[Outputs]) -> list[_Side]:
    return [_Side.of(*each) for each in zip(wanted, found, outputs, strict=True)]


def _parts(lattices: Sequence[Lattice], outputs: Sequence[Outputs]) -> list[Lattice]:
    """Lattices with rows in the order of G."""
    return [lattice.part(own.metric.order) for lattice, own in zip(lattices, outputs, strict=True)]


def _best(sides: list[_Side], moments: Hessian, rounds: Iterable[None]) -> list[Tensor]:
    """Of what is found after each round and before the first, what loses least, linear by linear."""
    best = [(side.lost(moments), side.found) for side in sides]
    for _ in rounds:
        now = [(side.lost(moments), side.found) for side in sides]
        best = [min(pair, key=lambda one: one[0]) for pair in zip(best, now, strict=True)]
    return [kept[:, side.outputs.metric.order.argsort()] for (_, kept), side in zip(best, sides, strict=True)]


def _fed(sides: list[_Side], lattices: list[Lattice], moments: Hessian, passes: int) -> Iterator[None]:
    """Go over all slices, each of which feeds its error into those that are still to come."""
    left = [side.wanted.clone() for side in sides]
    for side in sides:
        side.found = torch.empty_like(side.wanted)
    for number in range(sides[0].outputs.slices):
        rows = [side.slice(number) for side in sides]
        own = [each[:, place] for each, place in zip(left, rows, strict=True)]
        lattice, aim = _beside(lattices, rows), torch.cat(own, dim=1)
        landed = feed_back(aim, lattice, moments)
        for _ in range(passes):
            landed = descend(aim, landed, lattice, moments)
        _put(sides, rows, landed)
        for side, each, place in zip(sides, left, rows, strict=True):
            side.feed(each, place)
    yield


def _again(sides: list[_Side], lattices: list[Lattice], moments: Hessian, passes: int) -> Iterator[None]:
    """Go over all slices again and again, each with all others as they are."""
    for _ in range(passes):
        for side in sides:
            side.found = side.found.clone()
        for number in range(sides[0].outputs.slices):
            rows = [side.slice(number) for side in sides]
            aim = torch.cat([side.aim(place) for side, place in zip(sides, rows, strict=True)], dim=1)
            now = torch.cat([side.found[:, place] for side, place in zip(sides, rows, strict=True)], dim=1)
            _put(sides, rows, descend(aim, now, _beside(lattices, rows), moments))
        yield


def _beside(lattices: list[Lattice], rows: list[slice]) -> Lattice:
    return side_by_side([lattice.part(place) for lattice, place in zip(lattices, rows, strict=True)])


def _put(sides: list[_Side], rows: list[slice], landed: Tensor) -> None:
    for side, place, own in zip(sides, rows, landed.split([place.stop - place.start for place in rows], dim=1), strict=True):
        side.found[:, place] = own
