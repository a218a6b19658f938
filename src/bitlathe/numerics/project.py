"""One projection of a weight onto a scheme, read three ways.

`quantize` gives its codes, `fake_quantize` the weight they stand for, differentiable in what a tuner learns, and `dequantize`
the weight from the codes. All three go through `_scales` and `_round`, so for every scheme and everything learned

    dequantize(quantize(w, s, t), dtype) == fake_quantize(w, s, t, dtype=dtype)

bit for bit. Arithmetic is float32 and the result is rounded once, to the dtype asked for: codes have at most 8 significant
bits and 16-bit scales at most 11, so a product is exact in float32 and a reader that multiplies in 16 bits gets the same.

A scheme with minima takes off a number more, as llama.cpp does: (outer * inner) * code - minimum, each operation rounded to
float32. Inside, a matrix is cut into blocks: see `scales`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from bitlathe.errors import CheckpointError
from bitlathe.numerics.grids import decode, encode, limits, snap, step
from bitlathe.numerics.refit import refit
from bitlathe.numerics.scales import (
    Learned,
    Scales,
    cut,
    ends_of,
    join,
    leaf,
    nested,
    plain_ends,
    saturates,
    scales_of,
    spread,
    symmetric_scale,
)
from bitlathe.numerics.scheme import GRIDS, Scheme

__all__ = ["Learned", "QuantTensor", "dequantize", "fake_quantize", "movable", "quantize", "search", "stretched"]

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

    codes: [rows, columns]; int8 for a symmetric integer grid, uint8 for an asymmetric or unsigned one, E2M1 (sign in bit 3)
    and E8M0 (exponent + 127), float8_e4m3fn for E4M3, the dtype itself for 16 and 32 bits. scale: the matrix of scales, of
    shape scheme.blocks(shape), or None. zero: uint8 zero points of the same shape, or None. minimum: likewise what is
    taken off.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    scale: QuantTensor | None = None
    zero: Tensor | None = None
    minimum: QuantTensor | None = None


@dataclass(frozen=True)
class _Target:
    scheme: Scheme
    dtype: torch.dtype


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
    return (x.clamp(-GRIDS["FP16"].maximum, GRIDS["FP16"].maximum) if saturates(scheme, dtype) else x).to(dtype)


class _Project(Function):
    """_round(blocks, ...) * scale, with the gradient in offset, scale and zero, straight through the rounding.

    One function with its own backward, because the tuning loop lives in it: a dozen passes over the weight in all. No pass
    mixes dtypes (not even with booleans), and few allocate: either costs a CPU more than the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, offset: Tensor | None, scale: Tensor, least: Tensor | None, to: _Target) -> Tensor:
        zero, minimum = (least, None) if to.scheme.minimum is None else (None, least)
        blocks = blocks if minimum is None else blocks + minimum
        landed, exact, spacing = _round(blocks, scale, to.scheme, zero=zero, offset=offset)
        ctx.zero_point = minimum is None
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
        _, wants_offset, wants_scale, wants_least, _ = ctx.needs_input_grad
        grad = grads[0].float()
        through = grad * scale
        of_scale = of_least = of_offset = None
        if wants_least:
            # Where something was cut off, the number landed on is a bound less the zero point; of a minimum, the value is.
            of_least = -_sum(through)
        through.mul_(inside)
        if of_least is not None:
            of_least += _sum(through)
            of_least = of_least if ctx.zero_point else of_least / scale
        if wants_scale:
            # d(scale * landed): landed less blocks / scale where that was rounded, all of landed where it was cut off.
            of_scale = _sum(torch.addcmul(value, inside, blocks, value=-1).mul_(grad)) / scale
        if wants_offset:
            of_offset = through if spacing is None else through.mul_(spacing)
        return None, of_offset, of_scale, of_least, None


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
    blocks = cut(w, scheme)
    scales = scales_of(ends_of(blocks), scheme, learned, peak)
    offset = None if learned.offset is None else cut(learned.offset, scheme)
    least = scales.zero if scales.minimum is None else scales.minimum.value
    least = None if least is None else spread(least)
    out: Any = _Project.apply(blocks, offset, spread(scales.value), least, _Target(scheme, dtype))
    return join(out, (w.shape[0], w.shape[1]))


@torch.no_grad()
def quantize(
    w: Tensor, scheme: Scheme, learned: Learned | None = None, peak: Tensor | None = None, *, at: Tensor | None = None
) -> QuantTensor:
    """Codes and scales of a weight [rows, columns].

    learned: None rounds to nearest. peak: largest |w| a tensor-wide scale must cover (0-d), for a group of linears that
    share one; None, the tensor's own. at: [rows, columns], what is rounded in place of w, under the scales that w has. Raises
    CheckpointError for a weight that is not finite.
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
    blocks = cut(w, scheme)
    scales = scales_of(ends_of(blocks), scheme, learned, peak)
    offset = None if learned.offset is None else cut(learned.offset.detach(), scheme)
    zero = None if scales.zero is None else spread(scales.zero)
    blocks = blocks if at is None else cut(at, scheme)
    blocks = blocks if scales.minimum is None else blocks + spread(scales.minimum.value)
    landed, _, _ = _round(blocks, spread(scales.value), scheme, zero=zero, offset=offset)
    landed = landed if zero is None else landed + zero
    of_blocks = scheme.blocks(shape)
    return QuantTensor(
        scheme,
        shape,
        join(encode(landed, grid, unsigned=scheme.asymmetric), shape),
        _stored(scales, scheme.scale, of_blocks),
        None if scales.zero is None else encode(scales.zero, grid, unsigned=True),
        None if scales.minimum is None or scheme.minimum is None else _stored(scales.minimum, scheme.minimum, of_blocks),
    )


def _stored(scales: Scales, scheme: Scheme, shape: tuple[int, int]) -> QuantTensor:
    """Scales or minima [blocks] as they are stored."""
    outer = None
    if scales.outer is not None and scheme.scale is not None:
        places = scheme.blocks(shape)
        outer = QuantTensor(scheme.scale, places, encode(scales.outer.reshape(places), GRIDS[scheme.scale.grid]))
    return QuantTensor(scheme, shape, encode(scales.inner, GRIDS[scheme.grid]), outer)


@torch.no_grad()
def dequantize(q: QuantTensor, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] that codes stand for: code * scale, less a minimum, in float32; rounded once to `dtype`,
    saturating."""
    numbers = decode(q.codes, GRIDS[q.scheme.grid])
    if q.scale is None:
        return _cast(numbers, q.scheme, dtype)
    blocks = cut(numbers, q.scheme)
    if q.zero is not None:
        blocks = blocks - spread(q.zero.float())
    blocks = blocks * spread(dequantize(q.scale, torch.float32))
    if q.minimum is not None:
        blocks = blocks - spread(dequantize(q.minimum, torch.float32))
    return join(_cast(blocks, q.scheme, dtype), q.shape)


def movable(scheme: Scheme) -> bool:
    """Whether each scale of a scheme can become a little larger or smaller on its own, and all that it stands for with it."""
    alone = scheme.minimum is None and scheme.block != (0, 0)
    return alone and scheme.scale is not None and GRIDS[scheme.scale.grid].kind == "float"


def stretched(q: QuantTensor, multiples: Tensor) -> QuantTensor:
    """The same codes, each scale of a `movable` scheme so many times as large, on the grid that it is stored on.

    multiples: positive, [block rows, block columns].
    """
    assert q.scale is not None
    grid = GRIDS[q.scale.scheme.grid]
    own = decode(q.scale.codes, grid)
    moved = snap(own * multiples, grid)
    # What rounds to zero stays as it was.
    return replace(q, scale=replace(q.scale, codes=encode(torch.where(moved == 0, own, moved), grid)))


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
        scales = scales_of(self.ends, self.scheme, learned, self.peak)
        scale, zero = spread(scales.value), None if scales.zero is None else spread(scales.zero)
        blocks = self.blocks if scales.minimum is None else self.blocks + spread(scales.minimum.value)
        landed, _, _ = _round(blocks, scale, self.scheme, zero=zero, offset=None)
        return landed.mul_(scale).sub_(blocks).square_().mul_(self.importance).sum((1, 3))

    def code_neighbours(self) -> list[Tensor]:
        """Multiples of each block's range that move its E4M3 scale by 1 to 8 codes either way."""
        scales = scales_of(self.ends, self.scheme, Learned(), self.peak)
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
    if leaf(scheme) == "E8M0":
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
    rounds: Any = [[(1.0, factor) for factor in part.code_neighbours()]] if nested(part.scheme) else _factors(part.scheme)
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
    if nested(scheme) and peak is None:
        peak = w.abs().amax()
    weights = w.new_ones(w.shape[1]) if importance is None else importance.to(w)
    height = scheme.block[0] or w.shape[0]
    rows = max(1, _AT_A_TIME[w.device.type] // (w.shape[1] * height)) * height
    found = []
    for piece in w.split(rows):
        blocks = cut(piece, scheme)
        part = _Part(scheme, blocks, ends_of(blocks), weights.view(1, 1, *blocks.shape[2:]), peak)
        found.append(_refit_part(part) if scheme.reader_bound else _search_part(part))
    low, high = (torch.cat(ends) for ends in zip(*found, strict=True))
    return Learned(low=low if scheme.two_ended else None, high=high)


def _refit_part(part: _Part) -> tuple[Tensor, Tensor]:
    """Multiples of the plain minimum and scale of each block, where these are fitted one after the other."""
    scheme, ones = part.scheme, torch.ones_like(part.ends[0])
    off, plain_step = None, symmetric_scale(part.ends, GRIDS[scheme.grid])
    if scheme.minimum is not None:
        off, plain_step = plain_ends(part.ends, scheme)
    fitted = refit(part.blocks[:, 0], part.importance[:, 0], scheme, plain=(plain_step, off))
    found = [
        ones if wanted is None or start is None else torch.where(start == 0, 1.0, wanted / start)
        for start, wanted in zip((plain_step, off), fitted, strict=True)
    ]
    # Of a super-block, whichever loses less: what was fitted or the plain range.
    learned = Learned(low=found[1] if scheme.two_ended else None, high=found[0])
    span = scheme.scale.block[1] if scheme.scale is not None and scheme.scale.scale is not None else 1
    gained, lost = (part.loss(each).unflatten(1, (-1, span)).sum(-1) for each in (learned, Learned()))
    worse = (~(gained < lost)).repeat_interleave(span, dim=1)
    return torch.where(worse, 1.0, found[1]), torch.where(worse, 1.0, found[0])
