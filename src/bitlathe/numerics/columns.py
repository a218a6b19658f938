"""The loops over columns that solvers are made of, on a block of columns at a time.

A column is little work, and one hears of those before it, so with torch alone most of the time goes by between its calls. Where
rows are many they are compiled instead: `columns.c` on CPUs, where a compiler was there when the package was installed, and
`columns_triton` on CUDA. All three find the same numbers but for rounding in float32.

Matrices are [columns, rows] as in `lattice`, contiguous, float32.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from bitlathe.numerics.lattice import Lattice

BLOCK = 128  # columns, at most
# A column that no other leans on has a pivot of zero; nothing may be divided by it.
LEAST = 1e-30
_ROWS = 256  # at least, that are worth a thread
_COMPILED = find_spec("bitlathe.numerics._columns") is not None
_ON_CUDA = find_spec("triton") is not None

# (left, found, errors, reach, lattice): see `feed` and `descend`, which has no errors.
Loop = Callable[[Tensor, Tensor, Tensor | None, Tensor, Lattice], None]


def feed(left: Tensor, reach: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Columns to their nearest numbers one after the other, the error of each fed into those after it: (numbers, errors).

    left: what they are to come near to, changed on the way. reach: upper triangle [columns, columns]: an error, over the
    column's own entry, moves a later one by its entry.
    """
    found, errors = torch.empty_like(left), torch.empty_like(left)
    loop_over(left, found, errors, reach, lattice)
    return found, errors


def descend(pull: Tensor, found: Tensor, reach: Tensor, lattice: Lattice) -> None:
    """Columns from where they were `found` to the numbers nearest to where they are pulled, one after the other, in place.

    pull: how much, in the units of `reach` [columns, columns], changed on the way: a move of one takes its entries off.
    """
    loop_over(pull, found, None, reach, lattice)


def loop_over(left: Tensor, found: Tensor, errors: Tensor | None, reach: Tensor, lattice: Lattice) -> None:
    """By the fastest loop there is."""
    loop_for(left)(left, found, errors, reach, lattice)


def loop_for(x: Tensor) -> Loop:
    """The fastest that there is for the device of a tensor."""
    if x.device.type == "cpu" and _COMPILED:
        return compiled
    return import_module("bitlathe.numerics.columns_triton").loop if x.is_cuda and _ON_CUDA else plain


def plain(left: Tensor, found: Tensor, errors: Tensor | None, reach: Tensor, lattice: Lattice) -> None:
    """With torch alone."""
    pivots = reach.diagonal().clamp(min=LEAST).tolist()
    columns = zip(found, left, reach, pivots, lattice.columns(), strict=True)
    for number, (now, own, across, pivot, column) in enumerate(columns):
        if errors is None:
            landed = column.nearest(torch.add(now, own, alpha=1 / pivot))
            error = landed - now
        else:
            landed, error = column.nearest(own), errors[number]
            torch.sub(own, landed, out=error).div_(pivot)
        now.copy_(landed)
        left[number + 1 :].addr_(across[number + 1 :], error, alpha=-1)


def compiled(left: Tensor, found: Tensor, errors: Tensor | None, reach: Tensor, lattice: Lattice) -> None:
    """In C, rows on as many threads as torch has. What is changed has to be contiguous."""
    assert left.is_contiguous() and found.is_contiguous()
    columns, rows = left.shape
    scale, taken = lattice.scale.contiguous(), None if lattice.taken is None else lattice.taken.contiguous()
    reach = reach if reach.stride(1) == 1 else reach.contiguous()
    shape, grid = (columns, rows, reach.stride(0)), lattice.shape
    places = tuple(0 if x is None else x.data_ptr() for x in (left, found, errors, reach, scale, taken))
    solve = import_module("bitlathe.numerics._columns").solve
    parts = max(1, min(torch.get_num_threads(), rows // _ROWS))
    spans = [(part * rows // parts, (part + 1) * rows // parts) for part in range(parts)]
    if parts == 1:
        solve(shape, spans[0], places, grid)
        return
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(lambda span: solve(shape, span, places, grid), spans))
