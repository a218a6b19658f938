"""One projection of a weight onto a scheme, read three ways.

`quantize` gives its codes, `fake_quantize` the weight they stand for, differentiable in what a tuner learns, and `dequantize`
the weight from the codes. All three go through `_scales` and `_round`, so for every scheme and everything learned

    dequantize(quantize(w, s, t), dtype) == fake_quantize(w, s, t, dtype=dtype)

bit for bit. Arithmetic is float32 and the result is rounded once, to the dtype asked for: codes have at most 8 significant
bits and 16-bit scales at most 11, so a product is exact in float32 and a reader that multiplies in 16 bits gets the same.

Inside, a matrix is cut into blocks [block rows, rows of one, block columns, columns of one]; what a block has one of is a
matrix [block rows, block columns]. Rounding is straight-through: its gradient is the identity where nothing saturates.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from bitlathe.errors import CheckpointError
from bitlathe.numerics.grids import LEAST_SCALE, decode, encode, limits, snap, step
from bitlathe.numerics.scheme import GRIDS, Grid, Scheme

# What a block's largest magnitude is divided by to give its power-of-two scale, which is then rounded up. 7.25 for E2M1:
# values up to 7.25 may saturate at 6, within .1% of the best exponent of every block on Gaussians, where never to saturate
# costs 6%. 448 for E4M3: nothing saturates; up to 464 is the same, 480 costs 3% and 512 a quarter.
_CEILING = {"E2M1": 7.25, "E4M3": 448.0}

# The largest E4M3 scale a tensor-wide scale is chosen for: above it lie codes for a search to move to, up to 448.
_HEADROOM = 256.0
_LARGEST_OUTER = 2.0**116  # 6 * 448 of these are finite in bf16

# Multiples of a range that are searched, by bits: where a few large values are best cut off, and how far beyond the range
# grids still gain (measured on Gaussians and on Student's t with 5 degrees of freedom, at groups of 32 to whole rows).
_RANGES = {2: (0.05, 2.0), 3: (0.15, 1.3), 4: (0.25, 1.3)}
_WIDE_RANGE = (0.4, 1.25)
_CODES_AWAY = [by for by in range(-8, 9) if by]
_COARSE = 16

# Weights searched together: what a CPU's cache holds, what keeps a GPU busy.
_AT_A_TIME = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class QuantTensor:
    """A matrix [rows, columns] as a scheme stores it.

    codes: [rows, columns]; int8 for a symmetric integer grid, uint8 for an asymmetric one, E2M1 (sign in bit 3) and E8M0
    (exponent + 127), float8_e4m3fn for E4M3, the dtype itself for 16 and 32 bits. scale: the matrix of scales, of shape
    scheme.blocks(shape), or None. zero: uint8 zero points of the same shape, or None.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    scale: QuantTensor | None = None
    zero: Tensor | None = None


@dataclass(frozen=True)
class Learned:
    """What a tuner moves; None is round to nearest on the range from the smallest to the largest value.

    offset: [rows, columns], added before rounding, in steps of the grid. low, high: [block rows, block columns], multiples of
    the two ends of each block's range. Symmetric integers and float grids have one end, `high`; negative, it gives the other
    sign of the largest value the longer side of a symmetric integer grid.
    """

    offset: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None


@dataclass(frozen=True)
class _Scales:
    """value: float32 [blocks], differentiable. inner, outer: what is stored; value = inner * outer. zero: float32 or None."""

    value: Tensor
    inner: Tensor
    outer: Tensor | None
    zero: Tensor | None


@dataclass(frozen=True)
class _Target:
    scheme: Scheme
    dtype: torch.dtype


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


def _cut(x: Tensor, scheme: Scheme) -> Tensor:
    """[rows, columns] to blocks [block rows, rows of one, block columns, columns of one]; rows of zeros fill the last."""
    rows, columns = scheme.blocks((x.shape[0], x.shape[1]))
    height = scheme.block[0] or x.shape[0]
    if rows * height != x.shape[0]:
        x = F.pad(x, (0, 0, 0, rows * height - x.shape[0]))
    return x.reshape(rows, height, columns, -1)


def _join(blocks: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `_cut`."""
    joined = blocks.reshape(-1, shape[1])
    return joined if joined.shape[0] == shape[0] else joined[: shape[0]]


def _spread(x: Tensor) -> Tensor:
    return x[:, None, :, None]


def _ends(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each block, [block rows, block columns]."""
    return blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3))


def _leaf(scheme: Scheme) -> str:
    while scheme.scale is not None:
        scheme = scheme.scale
    return scheme.grid


def _saturates(scheme: Scheme, dtype: torch.dtype) -> bool:
    """Whether a value of the scheme can exceed the dtype. Scales are chosen so that none exceeds bf16, nor fp16 if their grid
    is that (`_largest_scale`)."""
    return dtype == torch.float16 and _leaf(scheme) != "FP16"


def _largest_scale(scheme: Scheme) -> float:
    """The largest scale whose product with every code is finite in the dtype of the scale, or bf16 for other grids."""
    top = max(abs(limit) for limit in limits(GRIDS[scheme.grid], unsigned=scheme.asymmetric))
    return GRIDS["FP16" if _leaf(scheme) == "FP16" else "BF16"].maximum / 2.0 ** ceil(log2(top))


def _scales(ends: tuple[Tensor, Tensor], scheme: Scheme, learned: Learned, peak: Tensor | None) -> _Scales:
    """Scales and zero points of blocks whose smallest and largest values are `ends`."""
    grid, low, high = GRIDS[scheme.grid], *ends
    if scheme.asymmetric:
        return _asymmetric(low, high, scheme, learned)
    if grid.kind == "int":
        # Signed full range: the value of largest magnitude becomes -2^(b-1), so that every code is used.
        target = torch.where(high > -low, high, low) * -(2.0 ** (1 - grid.bits))
    else:
        target = torch.maximum(high, -low)
        if peak is not None and scheme.block == (0, 0):
            target = peak.float().expand_as(target)
        if scheme.scale is not None and scheme.scale.scale is not None and peak is None:
            peak = target.max()
        target = target / (_CEILING[grid.name] if _leaf(scheme) == "E8M0" else grid.maximum)
    if learned.high is not None:
        target = target * learned.high
    return _settle(target, scheme, None if peak is None else peak.float() / grid.maximum)


def _asymmetric(low: Tensor, high: Tensor, scheme: Scheme, learned: Learned) -> _Scales:
    """Unsigned codes: low becomes 0 and high 2^b - 1; zero is always in the range and always exact."""
    grid = GRIDS[scheme.grid]
    top = limits(grid, unsigned=True)[1]
    low, high = low.clamp(max=0.0) / top, high.clamp(min=0.0) / top
    low = low if learned.low is None else low * learned.low
    high = high if learned.high is None else high * learned.high
    scales = _settle(high - low, scheme, None)
    zero = (low * -top / scales.value).clamp(0.0, top)
    return _Scales(scales.value, scales.inner, None, _snap(zero, grid, unsigned=True))


def _settle(target: Tensor, scheme: Scheme, peak: Tensor | None) -> _Scales:
    """Wanted scales of `scheme` [blocks] moved to the grid they are stored on. peak: the largest that must be held."""
    stored = scheme.scale
    if stored is None:
        raise ValueError("a scheme without scales has none to settle")
    largest, outer = _largest_scale(scheme), None
    if stored.scale is not None:
        if peak is None or stored.block != (0, 0) or stored.scale.grid != "FP32":
            raise ValueError(f"scales of scales are one FP32 number a tensor, not {stored.scale.grid} in {stored.block}")
        # A power of two, so that a reader may divide by its inverse instead of multiplying.
        outer = snap(peak / _HEADROOM, GRIDS["E8M0"]).clamp(LEAST_SCALE["FP32"], _LARGEST_OUTER)
        target, largest = target / outer, GRIDS[stored.grid].maximum
    inner = _snap(target.clamp(-largest, largest), GRIDS[stored.grid])
    inner = torch.where(inner == 0, LEAST_SCALE[stored.grid], inner)
    return _Scales(inner if outer is None else inner * outer, inner.detach(), outer, None)


def _round(
    blocks: Tensor, scale: Tensor, scheme: Scheme, *, zero: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where each weight lands: (numbers of the grid less the zero point, what they were before saturating, steps of offset).

    blocks, offset: cut. scale, zero: spread over the blocks. The three results are cut, float32.
    """
    grid = GRIDS[scheme.grid]
    if grid.kind == "int":
        exact = blocks / scale if offset is None else torch.addcdiv(offset, blocks, scale)
        exact.round_()
        low, high = limits(grid, unsigned=scheme.asymmetric)
        landed = exact.clamp(low, high) if zero is None else exact.clamp(low - zero, high - zero)
        return landed.add_(0.0), exact, None  # integer codes have no -0.0
    exact, spacing = blocks / scale, None
    if offset is not None:
        spacing = step(exact.clamp(*limits(grid)), grid)
        exact = exact.addcmul_(offset, spacing)
    return snap(exact, grid), exact, spacing


def _cast(x: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    return (x.clamp(-GRIDS["FP16"].maximum, GRIDS["FP16"].maximum) if _saturates(scheme, dtype) else x).to(dtype)


class _Project(Function):
    """_round(blocks, ...) * scale, with the gradient in offset, scale and zero, straight through the rounding.

    One function with its own backward, because the tuning loop lives in it: a dozen passes over the weight in all. No pass
    mixes dtypes (not even with booleans), and few allocate: either costs a CPU more than the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, offset: Tensor | None, scale: Tensor, zero: Tensor | None, to: _Target) -> Tensor:
        landed, exact, spacing = _round(blocks, scale, to.scheme, zero=zero, offset=offset)
        if any(ctx.needs_input_grad):
            grid = GRIDS[to.scheme.grid]
            inside = exact.eq_(landed if grid.kind == "int" else exact.clamp(*limits(grid)))
            ctx.save_for_backward(blocks, scale, landed.mul_(scale), inside, spacing)
        else:
            landed.mul_(scale)
        return _cast(landed, to.scheme, to.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        blocks, scale, value, inside, spacing = ctx.saved_tensors
        _, wants_offset, wants_scale, wants_zero, _ = ctx.needs_input_grad
        grad = grads[0].float()
        through = grad * scale
        of_scale = of_zero = of_offset = None
        if wants_zero:
            # Where something was cut off, the number landed on is a bound less the zero point.
            of_zero = -_sum(through)
        through.mul_(inside)
        if of_zero is not None:
            of_zero += _sum(through)
        if wants_scale:
            # d(scale * landed): landed less blocks / scale where that was rounded, all of landed where it was cut off.
            of_scale = _sum(torch.addcmul(value, inside, blocks, value=-1).mul_(grad)) / scale
        if wants_offset:
            of_offset = through if spacing is None else through.mul_(spacing)
        return None, of_offset, of_scale, of_zero, None


def _sum(x: Tensor) -> Tensor:
    return x.sum((1, 3), keepdim=True)


def fake_quantize(
    w: Tensor, scheme: Scheme, learned: Learned | None = None, *, peak: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """The weight [rows, columns] that `quantize` with the same arguments stands for, in `dtype`.

    Differentiable in everything learned, and not in w. peak: largest |w| a tensor-wide scale must cover (0-d); None, the
    tensor's own.
    """
    w = w.detach().float()
    if scheme.scale is None:
        return _cast(snap(w, GRIDS[scheme.grid]), scheme, dtype)
    learned = learned or Learned()
    blocks = _cut(w, scheme)
    scales = _scales(_ends(blocks), scheme, learned, peak)
    offset = None if learned.offset is None else _cut(learned.offset, scheme)
    zero = None if scales.zero is None else _spread(scales.zero)
    out: Any = _Project.apply(blocks, offset, _spread(scales.value), zero, _Target(scheme, dtype))
    return _join(out, (w.shape[0], w.shape[1]))


@torch.no_grad()
def quantize(w: Tensor, scheme: Scheme, learned: Learned | None = None, peak: Tensor | None = None) -> QuantTensor:
    """Codes and scales of a weight [rows, columns].

    learned: None rounds to nearest. peak: largest |w| a tensor-wide scale must cover (0-d), for a group of linears that
    share one; None, the tensor's own. Raises CheckpointError for a weight that is not finite.
    """
    w = w.detach().float()
    if not torch.isfinite(w).all():
        bad = int((~torch.isfinite(w)).sum())
        raise CheckpointError(
            f"{bad} of {w.numel()} values of the weight are infinite or NaN, and no code stands for them: "
            "the checkpoint is damaged or its weights overflowed: download it again, or mend it"
        )
    grid, shape = GRIDS[scheme.grid], (w.shape[0], w.shape[1])
    if scheme.scale is None:
        return QuantTensor(scheme, shape, encode(snap(w, grid), grid))
    learned = learned or Learned()
    blocks = _cut(w, scheme)
    scales = _scales(_ends(blocks), scheme, learned, peak)
    offset = None if learned.offset is None else _cut(learned.offset.detach(), scheme)
    zero = None if scales.zero is None else _spread(scales.zero)
    landed, _, _ = _round(blocks, _spread(scales.value), scheme, zero=zero, offset=offset)
    landed = landed if zero is None else landed + zero
    outer = None
    if scales.outer is not None and scheme.scale.scale is not None:
        outer = QuantTensor(scheme.scale.scale, (1, 1), scales.outer.reshape(1, 1))
    return QuantTensor(
        scheme,
        shape,
        _join(encode(landed, grid, unsigned=scheme.asymmetric), shape),
        QuantTensor(scheme.scale, scheme.blocks(shape), encode(scales.inner, GRIDS[scheme.scale.grid]), outer),
        None if scales.zero is None else encode(scales.zero, grid, unsigned=True),
    )


@torch.no_grad()
def dequantize(q: QuantTensor, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] that codes stand for: code * scale in float32, rounded once to `dtype`, saturating."""
    numbers = decode(q.codes, GRIDS[q.scheme.grid])
    if q.scale is None:
        return _cast(numbers, q.scheme, dtype)
    blocks = _cut(numbers, q.scheme)
    if q.zero is not None:
        blocks = blocks - _spread(q.zero.float())
    return _join(_cast(blocks * _spread(dequantize(q.scale, torch.float32)), q.scheme, dtype), q.shape)


@dataclass(frozen=True)
class _Part:
    """Rows of a weight whose ranges are searched. importance: [1, 1, block columns, columns of one]."""

    scheme: Scheme
    blocks: Tensor
    ends: tuple[Tensor, Tensor]
    importance: Tensor
    peak: Tensor | None

    def loss(self, learned: Learned) -> Tensor:
        """Weighted squared error of each block."""
        scales = _scales(self.ends, self.scheme, learned, self.peak)
        scale, zero = _spread(scales.value), None if scales.zero is None else _spread(scales.zero)
        landed, _, _ = _round(self.blocks, scale, self.scheme, zero=zero, offset=None)
        return landed.mul_(scale).sub_(self.blocks).square_().mul_(self.importance).sum((1, 3))

    def code_neighbours(self) -> list[Tensor]:
        """Multiples of each block's range that move its E4M3 scale by 1 to 8 codes either way."""
        scales = _scales(self.ends, self.scheme, Learned(), self.peak)
        grid = GRIDS["E4M3"]
        codes = encode(scales.inner, grid).view(torch.uint8).to(torch.int16)
        last = int(encode(torch.tensor(grid.maximum), grid).view(torch.uint8))
        moved = [(codes + by).clamp(1, last).to(torch.uint8).view(torch.float8_e4m3fn) for by in _CODES_AWAY]
        target = torch.maximum(self.ends[1], -self.ends[0]) / GRIDS[self.scheme.grid].maximum
        outer = scales.value / scales.inner
        return [torch.where(target > 0, decode(code, grid) * outer / target, 1.0) for code in moved]


def _spaced(first: float, last: float, count: int) -> list[float]:
    return [first * (last / first) ** (index / (count - 1)) for index in range(count)]


def _factors(scheme: Scheme) -> list[list[tuple[float, float]]]:
    """Rounds of factors (low, high) on each block's range; a round tries its factors on the best of the round before."""
    grid = GRIDS[scheme.grid]
    if _leaf(scheme) == "E8M0":
        return [[(1.0, 0.5), (1.0, 2.0)]]
    if grid.kind == "float":
        return [[(1.0, factor) for factor in _spaced(0.5, 1.12, 24)]]
    first, last = _RANGES.get(grid.bits, _WIDE_RANGE)
    spacing = (last / first) ** (1 / (_COARSE - 1))
    fine = [spacing**by for by in (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)]
    if scheme.asymmetric:
        return [
            [(factor, factor) for factor in _spaced(first, last, _COARSE)],
            [(factor, 1.0) for factor in fine],
            [(1.0, factor) for factor in fine],
            [(factor, 1.0) for factor in fine],
            [(1.0, factor) for factor in fine],
        ]
    return [
        [(1.0, sign * factor) for factor in _spaced(first, last, _COARSE) for sign in (1.0, -1.0)],
        [(1.0, factor) for factor in fine],
    ]


def _search_part(part: _Part) -> tuple[Tensor, Tensor]:
    """Best multiples of the low and the high ends of each block."""
    low = high = torch.ones_like(part.ends[0])
    least = part.loss(Learned())
    nested = part.scheme.scale is not None and part.scheme.scale.scale is not None
    rounds: Any = [[(1.0, factor) for factor in part.code_neighbours()]] if nested else _factors(part.scheme)
    for factors in rounds:
        start_low, start_high = low, high
        for by_low, by_high in factors:
            tried_low, tried_high = start_low * by_low, start_high * by_high
            loss = part.loss(Learned(low=tried_low, high=tried_high))
            better = loss < least
            least = torch.where(better, loss, least)
            low, high = torch.where(better, tried_low, low), torch.where(better, tried_high, high)
    return low, high


@torch.no_grad()
def search(w: Tensor, scheme: Scheme, importance: Tensor | None = None, peak: Tensor | None = None) -> Learned:
    """Ranges of each block that lose least: multiples `low` and `high` minimising sum(importance * (w - rounded w)^2).

    w: [rows, columns]. importance: [columns], the mean square of each input; None weighs all alike. peak: as for `quantize`;
    a scale that a whole group shares through it is not searched. Round to nearest on the whole range is always among what is
    tried, so the result is never worse. Rows are taken a few at a time, and memory stays at a few times theirs.
    """
    w = w.detach().float()
    if scheme.scale is None or (scheme.block == (0, 0) and peak is not None):
        return Learned()
    if scheme.scale.scale is not None and peak is None:
        peak = w.abs().amax()
    weights = w.new_ones(w.shape[1]) if importance is None else importance.to(w)
    height = scheme.block[0] or w.shape[0]
    rows = max(1, _AT_A_TIME[w.device.type] // (w.shape[1] * height)) * height
    found = []
    for piece in w.split(rows):
        blocks = _cut(piece, scheme)
        part = _Part(scheme, blocks, _ends(blocks), weights.view(1, 1, *blocks.shape[2:]), peak)
        found.append(_search_part(part))
    low, high = (torch.cat(ends) for ends in zip(*found, strict=True))
    return Learned(low=low if scheme.asymmetric else None, high=high)
