"""The loops over columns that solvers are made of, on a block of columns at a time.

A column is little work, and one hears of those before it, so with torch alone most of the time goes by between its calls. They
are compiled instead where they can be: `columns.c` on CPUs, where a compiler was there when the package was installed, and
`columns_triton` on CUDA, where Triton is and the compiler it needs. All three find the same numbers up to rounding
in float32.

Matrices are [columns, rows] as in `lattice`, contiguous, float32.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch
from torch import Tensor

from bitlathe.numerics.lattice import Lattice

try:
    from bitlathe.numerics import _columns  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # it was installed without a compiler
    _columns = None

BLOCK = 128  # columns, at most
# A column that no other leans on has a pivot of zero; nothing may be divided by it.
LEAST = 1e-30
_ROWS = 256  # at least, that are worth a thread
# Triton compiles for the GPU by itself, and what starts that with a compiler of C.
_BUILDS = any(map(which, ("cc", "gcc", "clang"))) and Path(sysconfig.get_paths()["include"], "Python.h").exists()
_ON_CUDA = _BUILDS and find_spec("triton") is not None

# (left, found, errors, reach, lattice): see `feed` and `descend`, which has no errors.
Loop = Callable[[Tensor, Tensor, Tensor | None, Tensor, Lattice], None]


def feed(left: Tensor, found: Tensor, reach: Tensor, lattice: Lattice) -> Tensor:
    """Columns to their nearest numbers, put into `found`, one after the other, the error of each fed into those after it: these
    errors.

    left: what they are to come near to, which may be changed. reach: upper triangle [columns, columns]: an error, over the
    column's own entry, moves a later one by its entry. Raises ValueError for what a loop cannot take.
    """
    errors = torch.empty_like(left)
    loop_over(left, found, errors, reach, lattice)
    return errors


def descend(pull: Tensor, found: Tensor, reach: Tensor, lattice: Lattice) -> None:
    """Columns from where they were `found` to the numbers nearest to where they are pulled, one after the other, in place.

    pull: how much, in the units of `reach` [columns, columns], which may be changed: a move of one takes its entries off.
    Raises ValueError for what a loop cannot take.
    """
    loop_over(pull, found, None, reach, lattice)


def loop_over(left: Tensor, found: Tensor, errors: Tensor | None, reach: Tensor, lattice: Lattice) -> None:
    """By the fastest loop there is."""
    written = [left, found] if errors is None else [left, found, errors]
    read = [lattice.scale] if lattice.taken is None else [lattice.scale, lattice.taken]
    alike = all(x.shape == left.shape for x in (*written, *read)) and reach.shape == (len(left), len(left))
    single = all(x.dtype == torch.float32 and x.device == left.device for x in (*written, *read, reach))
    if not (alike and single and all(x.is_contiguous() for x in written)):
        raise ValueError("a loop over columns takes float32 matrices of one shape on one device, those it changes contiguous")
    loop_for(left)(left, found, errors, reach, lattice)


def loop_for(x: Tensor) -> Loop:
    """The fastest that there is for the device of a tensor."""
    if x.device.type == "cpu" and _columns is not None:
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
    """In C, rows on as many threads as torch has."""
    assert _columns is not None
    columns, rows = left.shape
    scale, taken = lattice.scale.contiguous(), None if lattice.taken is None else lattice.taken.contiguous()
    reach = reach if reach.stride(1) == 1 else reach.contiguous()
    shape, grid = (columns, rows, reach.stride(0)), lattice.shape
    places = tuple(0 if x is None else x.data_ptr() for x in (left, found, errors, reach, scale, taken))
    solve = _columns.solve
    parts = max(1, min(torch.get_num_threads(), rows // _ROWS))
    spans = [(part * rows // parts, (part + 1) * rows // parts) for part in range(parts)]
    if parts == 1:
        solve(shape, spans[0], places, grid)
        return
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(lambda span: solve(shape, span, places, grid), spans))
