"""The loops over columns (see `columns`) for GPUs, in Triton: a program holds some rows in registers while all of their columns
are solved.

Imported only where Triton is there, which torch for CUDA brings along."""

# Triton's decorator hides what a kernel takes.
# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitlathe.numerics.columns import BLOCK, LEAST
from bitlathe.numerics.lattice import Lattice

_ROWS = 16  # of a program
# Added and taken off again, it rounds to an integer below 2^22, ties to even.
_ROUNDING = tl.constexpr(12582912.0)
_EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def _solve(  # noqa: PLR0913 (what a kernel is given is tensors and numbers, one by one)
    left,
    before,
    found,
    errors,
    reach,
    scale,
    taken,
    rows,
    columns,
    stride,
    low,
    high,
    normal,
    mantissa,
    least,
    FEEDS: tl.constexpr,
    TAKES: tl.constexpr,
    FLOATS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    row, column = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    there = row < rows
    inside = (column < columns)[:, None] & there[None, :]
    block = tl.load(left + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    for number in range(columns):
        at = number * rows + row
        own = tl.sum(tl.where((column == number)[:, None], block, 0.0), axis=0)
        pivot = tl.maximum(tl.load(reach + number * stride + number), least)
        now = own
        wished = own
        if not FEEDS:
            now = tl.load(before + at, mask=there, other=0.0)
            wished = now + own / pivot
        size = tl.load(scale + at, mask=there, other=1.0)
        code = wished
        if TAKES:
            code += tl.load(taken + at, mask=there, other=0.0)
        code = tl.minimum(tl.maximum(code / size, low), high)
        if FLOATS:
            bits = code.to(tl.int32, bitcast=True) & _EXPONENT
            step = tl.maximum(bits.to(tl.float32, bitcast=True), normal) * mantissa
            code /= step
        whole = (code + _ROUNDING) - _ROUNDING
        whole = tl.where((whole == 0.0) & (code < 0.0), whole * -1.0, whole)  # a zero keeps its sign
        code = whole
        if FLOATS:
            code *= step
        landed = code * size
        if TAKES:
            landed -= tl.load(taken + at, mask=there, other=0.0)
        tl.store(found + at, landed, mask=there)
        if FEEDS:
            error = (own - landed) / pivot
            tl.store(errors + at, error, mask=there)
        else:
            error = landed - now
        after = tl.load(reach + number * stride + column, mask=(column > number) & (column < columns), other=0.0)
        block -= after[:, None] * error[None, :]


def loop(left: Tensor, found: Tensor, errors: Tensor | None, reach: Tensor, lattice: Lattice) -> None:
    """See `columns.Loop`."""
    columns, rows = left.shape
    reach = reach if reach.stride(1) == 1 else reach.contiguous()
    scale, taken = lattice.scale.contiguous(), lattice.taken
    low, high, normal, mantissa = lattice.shape
    # Where columns were is read from a copy: threads that hold the same rows need not wait for each other.
    before = left if errors is not None else found.clone()
    with torch.cuda.device_of(left):
        _solve[(triton.cdiv(rows, _ROWS),)](
            left,
            before,
            found,
            left if errors is None else errors,
            reach,
            scale,
            scale if taken is None else taken.contiguous(),
            rows,
            columns,
            reach.stride(0),
            low,
            high,
            normal,
            mantissa,
            LEAST,
            FEEDS=errors is not None,
            TAKES=taken is not None,
            FLOATS=normal > 0,
            WIDTH=BLOCK,
            TILE=_ROWS,
        )
