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

from dataclasses import dataclass, replace
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

# Integers of scale and minimum that are tried around those found, and how often.
_STEPS = [(scale, minimum) for scale in (-2, -1, 0, 1, 2) for minimum in (-2, -1, 0, 1, 2) if scale or minimum]
_PASSES = 2

# Weights searched together: what a CPU's cache holds, what keeps a GPU busy.
_AT_A_TIME = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class QuantTensor:
    """A matrix [rows, columns] as a scheme stores it.

    codes: [rows, columns]; int8 for a symmetric integer grid, uint8 for an asymmetric one, E2M1 (sign in bit 3) and E8M0
    (exponent + 127), float8_e4m3fn for E4M3, the dtype itself for 16 and 32 bits. scale: the matrix of scales, of shape
    scheme.blocks(shape), or None. zero: uint8 zero points of the same shape, or None. minimum: the matrix of minima, or None.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    scale: QuantTensor | None = None
    zero: Tensor | None = None
    minimum: QuantTensor | None = None


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
    """value: float32 [blocks], differentiable. inner, outer: what is stored; value = inner * outer, an outer one being for the
    tensor or, [blocks of scales], for a few. zero: float32 or None. minimum: of the blocks, likewise."""

    value: Tensor
    inner: Tensor
    outer: Tensor | None
    zero: Tensor | None
    minimum: _Scales | None = None


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
    return dtype == torch.float16 and (_leaf(scheme) != "FP16" or scheme.minimum is not None)


def _largest_scale(scheme: Scheme) -> float:
    """The largest scale whose product with every code is finite in the dtype of the scale, or bf16 for other grids."""
    top = max(abs(limit) for limit in limits(GRIDS[scheme.grid], unsigned=scheme.unsigned))
    return GRIDS["FP16" if _leaf(scheme) in ("FP16", "F16") else "BF16"].maximum / 2.0 ** ceil(log2(top))


def _scales(ends: tuple[Tensor, Tensor], scheme: Scheme, learned: Learned, peak: Tensor | None) -> _Scales:
    """Scales and zero points of blocks whose smallest and largest values are `ends`."""
    grid, low, high = GRIDS[scheme.grid], *ends
    if scheme.asymmetric:
        return _asymmetric(low, high, scheme, learned)
    if scheme.minimum is not None:
        return _from_minimum(low, high, scheme, learned)
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
    return _settle(target, scheme, None if peak is None or grid.kind == "int" else peak.float() / grid.maximum)


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


def _from_minimum(low: Tensor, high: Tensor, scheme: Scheme, learned: Learned) -> _Scales:
    """Unsigned codes: low becomes 0 and high 2^b - 1, in steps from a minimum that is rounded first."""
    stored, top = scheme.minimum, limits(GRIDS[scheme.grid], unsigned=True)[1]
    assert stored is not None
    low = low if learned.low is None else low * learned.low
    high = high if learned.high is None else high * learned.high
    if stored.scale is not None:
        minimum = _settle_super(-low, stored, least=0.0)
    else:
        value = _snap(-low, GRIDS[stored.grid])
        minimum = _Scales(value, value.detach(), None, None)
    scales = _settle((high + minimum.value).clamp(min=0.0) / top, scheme, None)
    return _Scales(scales.value, scales.inner, scales.outer, None, minimum)


def _settle_super(target: Tensor, stored: Scheme, *, least: float) -> _Scales:
    """Wanted scales, or minima, moved to integers that share a scale. least: what becomes of those that round to zero."""
    grid = GRIDS[stored.grid]
    assert stored.scale is not None
    blocks = _cut(target, stored)
    low, high = _ends(blocks)
    if grid.kind == "uint":
        wanted = high.clamp(min=0.0) / limits(grid)[1]
    else:
        wanted = torch.where(high > -low, high, low) * -(2.0 ** (1 - grid.bits))
    outer = _snap(wanted, GRIDS[stored.scale.grid])
    outer = torch.where(outer == 0, LEAST_SCALE[stored.scale.grid], outer)
    inner = _snap(blocks / _spread(outer), grid)
    inner = torch.where(inner == 0, least, inner)
    shape = (target.shape[0], target.shape[1])
    return _Scales(_join(inner * _spread(outer), shape), _join(inner.detach(), shape), outer.detach(), None)


def _store(scales: _Scales, stored: Scheme, shape: tuple[int, int]) -> QuantTensor:
    """Scales, or minima, [blocks] as they are stored."""
    outer = None
    if scales.outer is not None and stored.scale is not None:
        above = stored.blocks(shape)
        outer = QuantTensor(stored.scale, above, encode(scales.outer.reshape(above), GRIDS[stored.scale.grid]))
    return QuantTensor(stored, shape, encode(scales.inner, GRIDS[stored.grid]), outer)


def _settle(target: Tensor, scheme: Scheme, peak: Tensor | None) -> _Scales:
    """Wanted scales of `scheme` [blocks] moved to the grid they are stored on. peak: the largest that must be held."""
    stored = scheme.scale
    if stored is None:
        raise ValueError("a scheme without scales has none to settle")
    if stored.scale is not None and GRIDS[stored.grid].kind in ("int", "uint"):
        return _settle_super(target, stored, least=LEAST_SCALE[stored.grid])
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
        low, high = limits(grid, unsigned=scheme.unsigned)
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
    """_round(blocks + minimum, ...) * scale - minimum, with the gradient in offset, scale, zero and minimum, straight through
    the rounding.

    One function with its own backward, because the tuning loop lives in it: a dozen passes over the weight in all. No pass
    mixes dtypes (not even with booleans), and few allocate: either costs a CPU more than the arithmetic.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 what a weight is made of
        ctx: Any,
        blocks: Tensor,
        offset: Tensor | None,
        scale: Tensor,
        zero: Tensor | None,
        minimum: Tensor | None,
        to: _Target,
    ) -> Tensor:
        blocks = blocks if minimum is None else blocks + minimum
        landed, exact, spacing = _round(blocks, scale, to.scheme, zero=zero, offset=offset)
        if any(ctx.needs_input_grad):
            grid = GRIDS[to.scheme.grid]
            inside = exact.eq_(landed if grid.kind == "int" else exact.clamp(*limits(grid)))
            ctx.save_for_backward(blocks, scale, landed.mul_(scale), inside, spacing)
        else:
            landed.mul_(scale)
        return _cast(landed if minimum is None else landed - minimum, to.scheme, to.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        blocks, scale, value, inside, spacing = ctx.saved_tensors
        _, wants_offset, wants_scale, wants_zero, wants_minimum, _ = ctx.needs_input_grad
        grad = grads[0].float()
        through = grad * scale
        of_scale = of_zero = of_offset = None
        # Where nothing was cut off, what is added before rounding is taken away after.
        of_minimum = _sum((inside - 1).mul_(grad)) if wants_minimum else None
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
        return None, of_offset, of_scale, of_zero, of_minimum, None


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
    minimum = None if scales.minimum is None else _spread(scales.minimum.value)
    out: Any = _Project.apply(blocks, offset, _spread(scales.value), zero, minimum, _Target(scheme, dtype))
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
    blocks = blocks if scales.minimum is None else blocks + _spread(scales.minimum.value)
    landed, _, _ = _round(blocks, _spread(scales.value), scheme, zero=zero, offset=offset)
    landed = landed if zero is None else landed + zero
    sizes = scheme.blocks(shape)
    return QuantTensor(
        scheme,
        shape,
        _join(encode(landed, grid, unsigned=scheme.unsigned), shape),
        _store(scales, scheme.scale, sizes),
        None if scales.zero is None else encode(scales.zero, grid, unsigned=True),
        None if scales.minimum is None or scheme.minimum is None else _store(scales.minimum, scheme.minimum, sizes),
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
    blocks = blocks * _spread(dequantize(q.scale, torch.float32))
    if q.minimum is not None:
        blocks = blocks - _spread(dequantize(q.minimum, torch.float32))
    return _join(_cast(blocks, q.scheme, dtype), q.shape)


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
        blocks = self.blocks if scales.minimum is None else self.blocks + _spread(scales.minimum.value)
        landed, _, _ = _round(blocks, scale, self.scheme, zero=zero, offset=None)
        return landed.mul_(scale).sub_(blocks).square_().mul_(self.importance).sum((1, 3))

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
    if scheme.unsigned:
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
    nested = part.scheme.scale is not None and part.scheme.scale.grid == "E4M3"
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
        free = _freed(scheme)
        found.append(_search_part(part) if free is None else _search_super(part, free))
    low, high = (torch.cat(ends) for ends in zip(*found, strict=True))
    return Learned(low=low if scheme.unsigned else None, high=high)


def _freed(scheme: Scheme) -> Scheme | None:
    """A scheme whose scales are integers that share a scale, with scales as they are; None for any other scheme."""
    if scheme.scale is None or scheme.scale.scale is None or GRIDS[scheme.scale.grid].kind not in ("int", "uint"):
        return None
    free = Scheme(grid="FP32")
    return scheme.model_copy(update={"scale": free, "minimum": scheme.minimum and free})


def _search_super(part: _Part, free: Scheme) -> tuple[Tensor, Tensor]:
    """Best multiples for scales that share a scale: those of scales of their own, and then steps of the integers that they
    become, with what is shared as it is. Super-blocks that were better on the plain range go back to it."""
    low, high = _search_part(replace(part, scheme=free))
    least = part.loss(Learned(low=low, high=high))
    for _ in range(_PASSES):
        for by in _STEPS if part.scheme.minimum is not None else [(by, 0) for by in (-2, -1, 1, 2)]:
            tried_low, tried_high = _stepped(part, low, high, by)
            loss = part.loss(Learned(low=tried_low, high=tried_high))
            better = loss < least
            least = torch.where(better, loss, least)
            low, high = torch.where(better, tried_low, low), torch.where(better, tried_high, high)
    plain = part.loss(Learned())
    assert part.scheme.scale is not None
    worse = _cut(least, part.scheme.scale).sum((1, 3)) > _cut(plain, part.scheme.scale).sum((1, 3))
    worse = worse.repeat_interleave(part.scheme.scale.block[1], 1)
    return torch.where(worse, 1.0, low), torch.where(worse, 1.0, high)


def _stepped(part: _Part, low: Tensor, high: Tensor, by: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Multiples that move the integers of scale and minimum by so many. The largest of a super-block stay: what is shared is
    made from them."""
    scheme, stored, (least, most) = part.scheme, part.scheme.scale, part.ends
    scales = _scales(part.ends, scheme, Learned(low=low, high=high), None)
    assert stored is not None
    wanted = _moved(scales, stored, by[0])
    if scheme.minimum is None or scales.minimum is None:
        target = torch.where(most > -least, most, least) * -(2.0 ** (1 - GRIDS[scheme.grid].bits))
        return low, torch.where(target != 0, wanted / target, high)
    minimum = _moved(scales.minimum, scheme.minimum, by[1])
    range_ = wanted * limits(GRIDS[scheme.grid], unsigned=True)[1]
    fixed = (least >= 0) | (most == 0)
    return torch.where(fixed, low, -minimum / least), torch.where(fixed, high, (range_ - minimum) / most)


def _moved(scales: _Scales, stored: Scheme, by: int) -> Tensor:
    """Scales with their integers moved by so many, but for the largest of each super-block."""
    assert scales.outer is not None
    shape = (scales.inner.shape[0], scales.inner.shape[1])
    sizes = _cut(scales.inner.abs(), stored)
    largest = _join(sizes == sizes.amax((1, 3), keepdim=True), shape)
    integers = torch.where(largest, scales.inner, (scales.inner + by).clamp(*limits(GRIDS[stored.grid])))
    return _join(_cut(integers, stored) * _spread(scales.outer), shape)
