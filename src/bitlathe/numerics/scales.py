"""The scales, zero points and minima of a matrix's blocks: what they should be, and the grids they are stored on.

A matrix is cut into blocks [block rows, rows of one, block columns, columns of one]; what a block has one of is a matrix
[block rows, block columns]. Rounding is straight-through: its gradient is the identity where nothing saturates.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from bitlathe.numerics.grids import LEAST_SCALE, LEAST_SUPER, limits, snap
from bitlathe.numerics.scheme import GRIDS, Grid, Scheme

# What a block's largest magnitude is divided by to give its power-of-two scale, which is then rounded up. 7.25 for E2M1:
# values up to 7.25 may saturate at 6, within .1% of the best exponent of every block on Gaussians, where never to saturate
# costs 6%. 448 for E4M3: nothing saturates; up to 464 is the same, 480 costs 3% and 512 a quarter.
_CEILING = {"E2M1": 7.25, "E4M3": 448.0}

# The largest E4M3 scale a tensor-wide scale is chosen for: above it lie codes for a search to move to, up to 448.
_HEADROOM = 256.0
_LARGEST_OUTER = 2.0**116  # 6 * 448 of these are finite in bf16

# The least that a block whose values are all alike is given as its range, as a part of them: a search moves it by multiples.
_FLAT = 2.0**-10


@dataclass(frozen=True)
class Learned:
    """What a tuner moves; None is round to nearest on the range from the smallest to the largest value.

    offset: [rows, columns], added before rounding, in steps of the grid. low, high: [block rows, block columns], multiples of
    the two ends of each block's range; of a scheme with minima, of the minimum and of the scale. Symmetric integers and float
    grids have one end, `high`; negative, it gives the other sign of the largest value the longer side of a symmetric integer
    grid.
    """

    offset: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None


@dataclass(frozen=True)
class Scales:
    """value: float32 [blocks], differentiable. inner, outer: what is stored; value = inner * outer. zero: float32 or None.
    minimum: what is taken off, or None."""

    value: Tensor
    inner: Tensor
    outer: Tensor | None = None
    zero: Tensor | None = None
    minimum: Scales | None = None


class _Straight(Function):
    """`rounded` forward; backward, as if it were `exact`."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _snap(x: Tensor, grid: Grid, *, unsigned: bool = False) -> Tensor:
    return _Straight.apply(x, snap(x.detach(), grid, unsigned=unsigned))  # pyright: ignore[reportReturnType]


def cut(x: Tensor, scheme: Scheme) -> Tensor:
    """[rows, columns] to blocks [block rows, rows of one, block columns, columns of one]; rows of zeros fill the last."""
    rows, columns = scheme.blocks((x.shape[0], x.shape[1]))
    height = scheme.block[0] or x.shape[0]
    if rows * height != x.shape[0]:
        x = F.pad(x, (0, 0, 0, rows * height - x.shape[0]))
    return x.reshape(rows, height, columns, -1)


def join(blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `cut`."""
    joined = blocks.reshape(-1, shape[1])
    return joined if joined.shape[0] == shape[0] else joined[: shape[0]]


def spread(x: Tensor) -> Tensor:
    """What blocks have one of, [block rows, block columns], to stand beside their values."""
    return x[:, None, :, None]


def ends_of(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each block, [block rows, block columns]."""
    return blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3))


def leaf(scheme: Scheme) -> str:
    """The grid of the scales of the lowest level."""
    while scheme.scale is not None:
        scheme = scheme.scale
    return scheme.grid


def nested(scheme: Scheme) -> bool:
    """Whether one scale of scales is shared by all of a matrix."""
    return scheme.scale is not None and scheme.scale.scale is not None and scheme.scale.block == (0, 0)


def saturates(scheme: Scheme, dtype: torch.dtype) -> bool:
    """Whether a value of the scheme can exceed the dtype. Scales are chosen so that none exceeds bf16, nor fp16 if their grid
    is that (`_largest_scale`), alone and with nothing taken off."""
    alone = scheme.minimum is None and (scheme.scale is None or scheme.scale.scale is None)
    return dtype == torch.float16 and not (alone and leaf(scheme) == "FP16")


def _largest_scale(scheme: Scheme) -> float:
    """The largest scale whose product with every code is finite in the dtype of the scale, or bf16 for other grids."""
    top = max(abs(limit) for limit in limits(GRIDS[scheme.grid], unsigned=scheme.asymmetric))
    return GRIDS["FP16" if leaf(scheme) == "FP16" else "BF16"].maximum / 2.0 ** ceil(log2(top))


def scales_of(ends: tuple[Tensor, Tensor], scheme: Scheme, learned: Learned, peak: Tensor | None) -> Scales:
    """Scales, zero points and minima of blocks whose smallest and largest values are `ends`."""
    grid, low, high = GRIDS[scheme.grid], *ends
    if scheme.asymmetric:
        return _asymmetric(low, high, scheme, learned)
    if scheme.minimum is not None:
        return _with_minimum(ends, scheme, scheme.minimum, learned)
    if grid.kind == "int":
        target = symmetric_scale(ends, grid)
    else:
        target = torch.maximum(high, -low)
        if peak is not None and scheme.block == (0, 0):
            target = peak.float().expand_as(target)
        if nested(scheme) and peak is None:
            peak = target.max()
        target = target / (_CEILING[grid.name] if leaf(scheme) == "E8M0" else grid.maximum)
    if learned.high is not None:
        target = target * learned.high
    return _settle(target, scheme, None if peak is None or not nested(scheme) else peak.float() / grid.maximum)


def symmetric_scale(ends: tuple[Tensor, Tensor], grid: Grid) -> Tensor:
    """Signed full range: the value of largest magnitude becomes -2^(b-1), so that every code is used."""
    low, high = ends
    return torch.where(high > -low, high, low) * -(2.0 ** (1 - grid.bits))


def _asymmetric(low: Tensor, high: Tensor, scheme: Scheme, learned: Learned) -> Scales:
    """Unsigned codes: low becomes 0 and high 2^b - 1; zero is always in the range and always exact."""
    grid = GRIDS[scheme.grid]
    top = limits(grid, unsigned=True)[1]
    low, high = low.clamp(max=0.0) / top, high.clamp(min=0.0) / top
    low = low if learned.low is None else low * learned.low
    high = high if learned.high is None else high * learned.high
    scales = _settle(high - low, scheme, None)
    zero = (low * -top / scales.value).clamp(0.0, top)
    return Scales(scales.value, scales.inner, zero=_snap(zero, grid, unsigned=True))


def plain_ends(ends: tuple[Tensor, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
    """What a scheme with minima takes off each block, and its scale, for the range from its smallest to its largest value."""
    low, high = ends
    assert scheme.minimum is not None
    if GRIDS[scheme.minimum.grid].unsigned:
        low = low.clamp(max=0.0)
    top = limits(GRIDS[scheme.grid])[1]
    return -low, torch.maximum(high / top - low / top, torch.maximum(high.abs(), low.abs()) * _FLAT)


def _with_minimum(ends: tuple[Tensor, Tensor], scheme: Scheme, stored: Scheme, learned: Learned) -> Scales:
    """Unsigned codes: what is taken off makes the smallest value 0."""
    minimum, scale = plain_ends(ends, scheme)
    minimum = minimum if learned.low is None else minimum * learned.low
    scale = scale if learned.high is None else scale * learned.high
    scales = _settle(scale, scheme, None)
    if stored.scale is None:
        most = GRIDS[stored.grid].maximum
        off = _snap(minimum.clamp(-most, most), GRIDS[stored.grid])
        taken = Scales(off, off.detach())
    else:
        taken = _on_integers(minimum, stored, least=0.0)
    return Scales(scales.value, scales.inner, scales.outer, minimum=taken)


def _settle(target: Tensor, scheme: Scheme, peak: Tensor | None) -> Scales:
    """Wanted scales of `scheme` [blocks] moved to the grid they are stored on. peak: the largest that must be held."""
    stored = scheme.scale
    if stored is None:
        raise ValueError("a scheme without scales has none to settle")
    if stored.scale is not None and stored.scale.fixed:
        return _on_integers(target, stored, least=1.0)
    largest, outer = _largest_scale(scheme), None
    if stored.scale is not None:
        if peak is None or stored.block != (0, 0) or stored.scale.grid != "FP32":
            raise ValueError(f"scales of scales are one FP32 number a tensor, not {stored.scale.grid} in {stored.block}")
        # A power of two, so that a reader may divide by its inverse instead of multiplying.
        outer = snap(peak / _HEADROOM, GRIDS["E8M0"]).clamp(LEAST_SCALE["FP32"], _LARGEST_OUTER)
        target, largest = target / outer, GRIDS[stored.grid].maximum
    inner = _snap(target.clamp(-largest, largest), GRIDS[stored.grid])
    inner = torch.where(inner == 0, LEAST_SCALE[stored.grid], inner)
    return Scales(inner if outer is None else inner * outer, inner.detach(), outer)


def super_scale(extreme: Tensor, stored: Scheme) -> Tensor:
    """The FP16 scale of integers whose one of largest magnitude stands for `extreme`: the longer side of the grid is its."""
    assert stored.scale is not None
    low, top = limits(GRIDS[stored.grid])
    outer = snap(extreme / (low or top), GRIDS[stored.scale.grid])
    return torch.where(outer == 0, LEAST_SUPER, outer)


def _on_integers(target: Tensor, stored: Scheme, *, least: float) -> Scales:
    """Wanted numbers [rows, columns] as integers with an FP16 scale for each block of them.

    least: what an integer zero becomes. A scale is never zero, and its block loses nothing by that: code 0 is there.
    """
    grid = GRIDS[stored.grid]
    low, top = limits(grid)
    most = GRIDS["FP16"].maximum * max(-low, top)
    blocks = cut(target.clamp(low * GRIDS["FP16"].maximum if low == 0 else -most, most), stored)
    smallest, largest = ends_of(blocks.detach())
    outer = super_scale(torch.where(largest > -smallest, largest, smallest), stored)
    # Only what has the wrong sign is cut off; all others are within a step of the ends.
    inner = _snap((blocks / spread(outer)).clamp(min=low - 1.0), grid)
    inner = torch.where(inner == 0, least, inner)
    shape = (target.shape[0], target.shape[1])
    return Scales(join(inner * spread(outer), shape), join(inner.detach(), shape), outer)
