"""The numbers that the weights of a matrix may become once its scales are fixed.

A solver moves weights from one of these numbers to another, a column at a time. It works on the transpose, [columns, rows], in
which a column lies together, and on columns in any order. Codes are made from what it ends at by `quantize(..., at=)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitlathe.numerics.grids import limits, shape, snap
from bitlathe.numerics.scales import Learned, cut, ends_of, scales_of
from bitlathe.numerics.scheme import GRIDS, Grid, Scheme


class Column(NamedTuple):
    """Where the numbers of one column [rows] may lie, or of a whole lattice. bounds: of an integer grid. scale, taken: of the
    same shape.

    In place all the way: solvers come here once a column and pass.
    """

    grid: Grid
    bounds: tuple[float, float] | None
    scale: Tensor
    taken: Tensor | None

    def nearest(self, x: Tensor) -> Tensor:
        """The numbers nearest to `x`."""
        return self.numbers(self.codes(x))

    def codes(self, x: Tensor) -> Tensor:
        """The codes that stand for what is nearest to `x`."""
        codes = x / self.scale if self.taken is None else (x + self.taken).div_(self.scale)
        return snap(codes, self.grid) if self.bounds is None else codes.clamp_(*self.bounds).round_()

    def numbers(self, codes: Tensor) -> Tensor:
        """What codes stand for, in their place."""
        codes.mul_(self.scale)
        return codes if self.taken is None else codes.sub_(self.taken)


@dataclass(frozen=True)
class Lattice:
    """scale: [columns, rows], what a code is multiplied by. taken: likewise, what is taken off the product, if anything is."""

    grid: Grid
    unsigned: bool
    scale: Tensor
    taken: Tensor | None

    def columns(self) -> Iterator[Column]:
        """Each column on its own."""
        bounds = self._whole.bounds
        taken = [None] * len(self.scale) if self.taken is None else self.taken.unbind()
        for scale, off in zip(self.scale.unbind(), taken, strict=True):
            yield Column(self.grid, bounds, scale, off)

    def between(self, start: int, end: int) -> Lattice:
        """That of some columns."""
        return Lattice(self.grid, self.unsigned, self.scale[start:end], None if self.taken is None else self.taken[start:end])

    @property
    def shape(self) -> tuple[float, float, float, float]:
        """Of its codes: see `grids.shape`."""
        return shape(self.grid, unsigned=self.unsigned)

    def nearest(self, x: Tensor) -> Tensor:
        """The numbers nearest to `x` [columns, rows]."""
        return self._whole.nearest(x)

    def ordered(self, order: Tensor) -> Lattice:
        """The same with the columns in another order [columns]."""
        return Lattice(self.grid, self.unsigned, self.scale[order], None if self.taken is None else self.taken[order])

    def part(self, rows: Tensor | slice) -> Lattice:
        """That of some rows, or of all in another order."""
        taken = None if self.taken is None else self.taken[:, rows].contiguous()
        return Lattice(self.grid, self.unsigned, self.scale[:, rows].contiguous(), taken)

    def moved(self, x: Tensor, other: Lattice) -> Tensor:
        """The numbers [columns, rows] that another lattice of the same grid has for the codes that stand for `x` here."""
        return other._whole.numbers(self._whole.codes(x))

    def mixed(self, other: Lattice, rows: Tensor) -> Lattice:
        """That of another one for some `rows` [rows], which are true, and this one for the others."""
        taken = None if self.taken is None or other.taken is None else torch.where(rows, other.taken, self.taken)
        return Lattice(self.grid, self.unsigned, torch.where(rows, other.scale, self.scale), taken)

    @property
    def _whole(self) -> Column:
        bounds = limits(self.grid, unsigned=self.unsigned) if self.grid.kind == "int" else None
        return Column(self.grid, bounds, self.scale, self.taken)


def side_by_side(lattices: Sequence[Lattice]) -> Lattice:
    """One for the rows of several matrices of one scheme, in order."""
    first = lattices[0]
    taken = [lattice.taken for lattice in lattices if lattice.taken is not None]
    scale = torch.cat([lattice.scale for lattice in lattices], dim=1)
    return Lattice(first.grid, first.unsigned, scale, torch.cat(taken, dim=1) if taken else None)


def lattice_of(w: Tensor, scheme: Scheme, learned: Learned | None = None, peak: Tensor | None = None) -> Lattice:
    """Where the weights [rows, columns] of a matrix with scales may lie; arguments as for `quantize`."""
    w = w.detach().float()
    scales = scales_of(ends_of(cut(w, scheme)), scheme, learned or Learned(), peak)
    taken = None if scales.minimum is None else _laid(scales.minimum.value, scheme, w)
    scale = _laid(scales.value, scheme, w)
    if scales.zero is not None:
        taken = _laid(scales.zero, scheme, w).mul_(scale)
    return Lattice(GRIDS[scheme.grid], scheme.asymmetric, scale, taken)


def _laid(x: Tensor, scheme: Scheme, w: Tensor) -> Tensor:
    """What each block has one of, [block rows, block columns], for every weight, [columns, rows]."""
    rows, columns = w.shape
    height, width = scheme.block[0] or rows, scheme.block[1] or columns
    return x.T.repeat_interleave(width, 0).repeat_interleave(height, 1)[:, :rows].contiguous()
