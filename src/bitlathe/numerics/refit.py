"""Scales and minima of llama.cpp's block types, fitted to weights by weighted least squares.

For every block several ranges are tried; each gives codes, and for codes the best scale and minimum are known in closed form,
which give other codes. What is best is then moved to integers under a scale of scales: several of these are tried, and then,
one block at a time, the integers next to those found, always with the codes that belong to them.

Shapes: weights [rows, super-blocks, blocks of one, columns of one]; what a block has one of has 1 column. A type without
super-blocks has one block in each. No zero scale is ever made: it would take the place of a block of codes 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitlathe.numerics.grids import limits, snap
from bitlathe.numerics.scales import super_scale
from bitlathe.numerics.scheme import GRIDS, Scheme

# Widths of ranges that are tried, as parts of the whole, by bits: from the first to the last, so many.
_WIDTHS = {2: (0.35, 1.15, 14), 3: (0.5, 1.15, 14)}
_WIDTHS_ELSE = (0.75, 1.1, 12)
_REFITS = 2  # for each of them
# Multiples of the scale of scales that are tried: the fewer the bits of the integers, the more it decides.
_SUPERS = {4: (0.7, 1.04, 15)}
_SUPERS_ELSE = (0.95, 1.015, 8)
_POLISHES = 2
_LEAST_WEIGHT = 1e-6  # of the mean one: what no input reaches is still rounded to something near


@dataclass(frozen=True)
class _Fit:
    """Blocks, the weights of their errors, and the numbers their codes stand between."""

    x: Tensor
    weight: Tensor
    low: float
    top: float

    def codes(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """The nearest ones."""
        return ((self.x + minimum) / scale).round_().clamp_(self.low, self.top)

    def loss(self, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """Weighted squared error of each block."""
        return (codes * scale).sub_(minimum).sub_(self.x).square_().mul_(self.weight).sum(-1, keepdim=True)

    def loss_of(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """With the nearest codes."""
        return self.loss(self.codes(scale, minimum), scale, minimum)

    def sum(self, x: Tensor) -> Tensor:
        """Weighted, of each block."""
        return (x * self.weight).sum(-1, keepdim=True)


@dataclass(frozen=True)
class _Found:
    """The best so far of each block. free: where a minimum may be other than 0; None where there are none."""

    scale: Tensor
    minimum: Tensor
    loss: Tensor
    free: Tensor | None
    signed: bool

    def better(self, scale: Tensor, minimum: Tensor, loss: Tensor) -> _Found:
        """With what loses less."""
        less = loss < self.loss
        kept = [torch.where(less, new, old) for new, old in ((scale, self.scale), (minimum, self.minimum), (loss, self.loss))]
        return replace(self, scale=kept[0], minimum=kept[1], loss=kept[2])


def refit(
    blocks: Tensor, importance: Tensor, scheme: Scheme, *, plain: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Scales and minima [rows, blocks] that lose little, sum(importance * (w - rounded w)^2); exact multiples of the scales of
    scales that they are stored with.

    blocks: [rows, blocks, columns of one]. importance: [1, blocks, columns of one]. plain: scales and minima of whole ranges,
    with which those found share the sign of the minimum, and zeros.
    """
    assert scheme.scale is not None
    span = scheme.scale.block[1] if scheme.scale.scale is not None else 1
    weight = importance + importance.mean() * _LEAST_WEIGHT
    weight = weight if bool((weight > 0).any()) else torch.ones_like(weight)
    low, top = limits(GRIDS[scheme.grid])
    fit = _Fit(blocks.unflatten(1, (-1, span)), weight.unflatten(1, (-1, span)), low, top)
    scale, minimum = (None if part is None else part.unflatten(1, (-1, span)).unsqueeze(-1) for part in plain)
    assert scale is not None
    found = _ranges(fit, scheme, scale, minimum)
    if scheme.scale.scale is not None:
        found = _settled(fit, found, scheme, scheme.scale)
    return found.scale.flatten(1), None if minimum is None else found.minimum.flatten(1)


def _ranges(fit: _Fit, scheme: Scheme, scale: Tensor, minimum: Tensor | None) -> _Found:
    """The best scale and minimum of each block by itself."""
    bits = GRIDS[scheme.grid].bits
    nothing = torch.zeros_like(scale)
    scale = torch.where(scale == 0, 1.0, scale)
    free = None if minimum is None else minimum != 0
    signed = scheme.minimum is not None and not GRIDS[scheme.minimum.grid].unsigned
    off = nothing if minimum is None else minimum
    found = _Found(scale, off, fit.loss_of(scale, off), free, signed)
    first, last, count = _WIDTHS.get(bits, _WIDTHS_ELSE)
    for factor in (first + (last - first) * index / (count - 1) for index in range(count)):
        for sign in (1.0, -1.0) if free is None else (1.0,):
            tried, taken = scale * (sign * factor), off * factor
            for _ in range(_REFITS):
                tried, taken = _least_squares(fit, fit.codes(tried, taken), found, tried)
                found = found.better(tried, taken, fit.loss_of(tried, taken))
    for _ in range(_REFITS):
        tried, taken = _least_squares(fit, fit.codes(found.scale, found.minimum), found, found.scale)
        found = found.better(tried, taken, fit.loss_of(tried, taken))
    return found


def _least_squares(fit: _Fit, codes: Tensor, found: _Found, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the minimum that lose least with these codes; `scale` where the codes do not say."""
    squares, products = fit.sum(codes * codes), fit.sum(codes * fit.x)
    alone = torch.where(squares > 0, products / squares, scale)
    alone = torch.where(alone == 0, scale, alone)
    if found.free is None:
        return alone, torch.zeros_like(alone)
    weights, sums, values = fit.weight.sum(-1, keepdim=True), fit.sum(codes), fit.sum(fit.x)
    spread = weights * squares - sums * sums
    both = (weights * products - sums * values) / spread
    minimum = (both * sums - values) / weights
    sound = (spread > 0) & (both > 0) & found.free & (found.signed | (minimum > 0)) & both.isfinite()
    alone = torch.where(alone > 0, alone, scale)
    return torch.where(sound, both, alone), torch.where(sound, minimum, 0.0)


def _best_minimum(fit: _Fit, codes: Tensor, scale: Tensor, found: _Found) -> Tensor:
    """The minimum that loses least with these codes and scales."""
    if found.free is None:
        return found.minimum
    minimum = (scale * fit.sum(codes) - fit.sum(fit.x)) / fit.weight.sum(-1, keepdim=True)
    return torch.where(found.free, minimum.clamp(min=0.0), 0.0)


def _settled(fit: _Fit, found: _Found, scheme: Scheme, stored: Scheme) -> _Found:
    """The same with integer scales and minima under scales of scales."""
    scales = _chosen_scales(fit, found, stored)
    if found.free is None or scheme.minimum is None:
        return _polished(fit, found, scales, None)
    minimum = _best_minimum(fit, fit.codes(scales.value, found.minimum), scales.value, found)
    return _polished(fit, found, scales, _chosen_minima(fit, replace(found, scale=scales.value), scheme.minimum, minimum))


@dataclass(frozen=True)
class _Settled:
    """Scales or minima as they are stored. outer: the scales of scales [rows, super-blocks, 1, 1]. pinned: the one block of
    each whose integer is the outermost, from which the scale of scales follows."""

    value: Tensor
    outer: Tensor
    pinned: Tensor

    def moved(self, value: Tensor, by: int) -> tuple[Tensor, Tensor]:
        """Values of so many integers more, and whether that may be: integers keep their sign and stay within the outermost,
        and the outermost its place."""
        integers, now = value / self.outer + by, self.value / self.outer
        ends = now.where(self.pinned, torch.zeros_like(now)).sum(2, keepdim=True)
        # The longer side of a signed grid is that of the outermost one.
        room = integers.abs() < ends.abs() + torch.where(ends > 0, 0.5, -0.5)
        inside = room & ((integers * value >= 0) | (value == 0)) & ~self.pinned
        return value + by * self.outer, inside | torch.full_like(inside, by == 0)


def _integers(wanted: Tensor, stored: Scheme, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Scale of scales, integers under it, and which of them is the outermost: that one stands for the largest of `wanted`."""
    grid = GRIDS[stored.grid]
    low, top = limits(grid)
    place = wanted.abs().argmax(2, keepdim=True)
    outer = super_scale(wanted.gather(2, place) * factor, stored)
    pinned = torch.zeros_like(wanted, dtype=torch.bool).scatter_(2, place, value=True)
    integers = snap(wanted / outer, grid)
    return outer, torch.where(pinned, low or top, integers), pinned


def _spaced(stored: Scheme) -> list[float]:
    first, last, count = _SUPERS.get(GRIDS[stored.grid].bits, _SUPERS_ELSE)
    return [1.0, *(first + (last - first) * index / (count - 1) for index in range(count))]


def _chosen_scales(fit: _Fit, found: _Found, stored: Scheme) -> _Settled:
    """Scales under the scale of scales with which a super-block loses least, where minima are still free."""
    low, top = limits(GRIDS[stored.grid])
    best: _Settled | None = None
    least = torch.zeros_like(found.scale[:, :, :1])
    for factor in _spaced(stored):
        outer, integers, pinned = _integers(found.scale, stored, factor)
        chosen, lost = integers, torch.full_like(integers, torch.inf)
        for by in (0.0, -1.0, 1.0):
            moved = torch.where(pinned, integers, (integers + by).clamp(low, top))
            moved = torch.where(moved == 0, 1.0, moved)
            codes = fit.codes(moved * outer, found.minimum)
            loss = fit.loss(codes, moved * outer, _best_minimum(fit, codes, moved * outer, found))
            chosen, lost = torch.where(loss < lost, moved, chosen), torch.minimum(loss, lost)
        best, least = _better(best, least, _Settled(chosen * outer, outer, pinned), lost.sum(2, keepdim=True))
    assert best is not None
    return best


def _chosen_minima(fit: _Fit, found: _Found, stored: Scheme, wanted: Tensor) -> _Settled:
    """Likewise the minima, with scales as they are in `found`."""
    assert found.free is not None
    best: _Settled | None = None
    least = torch.zeros_like(found.scale[:, :, :1])
    for factor in _spaced(stored):
        outer, integers, pinned = _integers(wanted, stored, factor)
        tried = torch.where(found.free, integers, 0.0) * outer
        total = fit.loss_of(found.scale, tried).sum(2, keepdim=True)
        best, least = _better(best, least, _Settled(tried, outer, pinned), total)
    assert best is not None
    return best


def _better(best: _Settled | None, least: Tensor, tried: _Settled, lost: Tensor) -> tuple[_Settled, Tensor]:
    """Of each super-block, what loses less, and what it loses."""
    if best is None:
        return tried, lost
    less = lost < least
    parts = ((tried.value, best.value), (tried.outer, best.outer), (tried.pinned, best.pinned))
    value, outer, pinned = (torch.where(less, new, old) for new, old in parts)
    return _Settled(value, outer, pinned), torch.minimum(lost, least)


def _polished(fit: _Fit, found: _Found, scales: _Settled, minima: _Settled | None) -> _Found:
    """Each block's integers moved to their neighbours where it gains."""
    minimum = found.minimum if minima is None else minima.value
    found = replace(found, scale=scales.value, minimum=minimum, loss=fit.loss_of(scales.value, minimum))
    steps = [(by, off) for by in (-1, 0, 1) for off in ((-1, 0, 1) if minima is not None else (0,)) if by or off]
    for _ in range(_POLISHES):
        for by, off in steps:
            scale, inside = scales.moved(found.scale, by)
            minimum = found.minimum
            if minima is not None and found.free is not None:
                minimum, possible = minima.moved(minimum, off)
                inside = inside & (possible & found.free | torch.full_like(possible, off == 0)) & (minimum >= 0)
            inside = inside & (scale != 0)
            scale = torch.where(inside, scale, found.scale)
            found = found.better(scale, minimum, torch.where(inside, fit.loss_of(scale, minimum), torch.inf))
    return found
