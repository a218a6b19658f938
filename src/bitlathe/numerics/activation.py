"""Activations on a grid, by the arithmetic of the reader that will run them.

Unlike a weight, an activation is rounded anew at every forward pass, by somebody else's program; so the numbers here are those
of compressed-tensors 0.20 (which transformers runs), operation by operation in the dtype of the input. With b bits, and the
largest magnitude of what shares a scale:

    integer, symmetric    scale = largest / ((2^b - 1) / 2), codes in [-2^(b-1), 2^(b-1) - 1]
    integer, asymmetric   scale = (high - low) / (2^b - 1), zero = round(-2^(b-1) - low / scale), the same codes
    E4M3                  scale = largest / 448
    MXFP4, MXFP8          scale = the power of two at or below largest, above it from 1.75 times that power, over 4 or 256
    NVFP4                 scale = round(factor * (largest / 6)) / factor, rounded to E4M3, the factor static

Scales in float32, of FP8_BLOCK_DYNAMIC, are the fp8 method's of transformers and vLLM, and not the library's: largest / 448 and
what is divided by it are in float32 whatever the dtype of the input.

A range always reaches to zero, and a scale of zero becomes a small number. One scale a token is one for each row of the last
axis, however many axes there are; the library agrees for three axes, which is what models have there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitlathe.numerics.grids import decode, limits, snap
from bitlathe.numerics.scheme import GRIDS, Grid, Scheme, static

_DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16}
_WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}

# What a scale of zero becomes: by the dtype that scales are held in.
_FOR_ZERO = {"BF16": 2.0**-7, "FP16": 2.0**-10, "FP32": 2.0**-23, "E4M3": 0.125, "E8M0": 1.0}

# Width of the mantissa, and of the exponent with its bias.
_LAYOUTS = {torch.bfloat16: (7, 8, 127), torch.float16: (10, 5, 15), torch.float32: (23, 8, 127)}
_E8M0_BIAS, _E8M0_LAST = 127, 255
_TOP_EXPONENT = {"E2M1": 2, "E4M3": 8}  # of a grid's largest number

# Numbers above these would be nearer to the next number of the grid, if it went on.
_ENDS = {"E2M1": 7.0, "E4M3": 464.0}


@dataclass(frozen=True)
class StaticScale:
    """What calibration fixes of a linear's input.

    scale: [1]. For one scale a tensor: it, in the plan's 16-bit dtype. For NVFP4: the factor on its E4M3 scales, float32, as
    readers store it (a block's scale is round(factor * largest / 6), and is divided by the factor when it is used).
    zero: [1] int8 in [-2^(b-1), 2^(b-1) - 1] for an asymmetric integer scheme, else None.
    """

    scale: Tensor
    zero: Tensor | None = None


def static_scale(low: Tensor, high: Tensor, scheme: Scheme, dtype: str, *, clip: float = 1.0) -> StaticScale:
    """The static part of `scheme` for inputs from `low` to `high` (0-d float32). dtype: the plan's, "bf16" or "fp16"."""
    assert static(scheme) and scheme.scale is not None
    low, high = low.float().clamp(max=0) * clip, high.float().clamp(min=0) * clip
    if scheme.block != (0, 0):
        largest = torch.maximum(low.abs(), high).clamp(min=torch.finfo(torch.float32).tiny)
        # The reciprocal times the number, as the library's expression is computed. It gives a range that is not known, or too
        # small for a factor, the factor 1.
        factor = largest.reciprocal() * (GRIDS[scheme.scale.grid].maximum * GRIDS[scheme.grid].maximum)
        return StaticScale(factor.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).reshape(1))
    held, stored = _DTYPES[dtype.upper()], GRIDS[dtype.upper()]
    if not scheme.asymmetric:
        scale = _symmetric(torch.maximum(low.abs(), high), GRIDS[scheme.grid], stored)
        return StaticScale(scale.to(held).reshape(1))
    scale, zero = _asymmetric(low, high, GRIDS[scheme.grid], stored)
    return StaticScale(scale.to(held).reshape(1), zero.to(torch.int8).reshape(1))


def fake_quantize_input(x: Tensor, scheme: Scheme, *, clip: float = 1.0, fixed: StaticScale | None = None) -> Tensor:
    """x [..., inputs] rounded to `scheme`, in x's dtype (bf16, fp16 or float32); straight through for gradients.

    clip: part of a range that is kept before a scale is made from it, where the scale is made here. fixed: for a static scheme.
    In float32, where models are evaluated, scales are rounded to the scheme's 16-bit grid, so that they are those that will be
    served. The gradient, for which scales are constants, is zero where x lies beyond the numbers of the grid by more than half
    a step; only a fixed scale or a clipped one leaves anything there. NaN gives NaN; infinite numbers give NaN in what shares
    their scale, or its largest numbers.
    """
    if x.numel() == 0:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, scheme, clip, fixed)  # pyright: ignore[reportReturnType]
    return _project(x, scheme, clip, fixed)[0]


def rounded_input(x: Tensor, scheme: Scheme | None, *, dtype: str, clip: float = 1.0) -> Tensor:
    """x [..., inputs] rounded to `scheme`, as it is for None; a static scale is that of x alone. dtype: the plan's."""
    if scheme is None:
        return x
    fixed = static_scale(*torch.aminmax(x), scheme, dtype, clip=clip) if static(scheme) else None
    return fake_quantize_input(x, scheme, clip=clip, fixed=fixed)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: Scheme, clip: float, fixed: StaticScale | None) -> Tensor:
        cuts = clip != 1 or fixed is not None
        rounded, inside = _project(x, scheme, clip, fixed, watch=cuts)
        if inside is not None:
            ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        for inside in ctx.saved_tensors:
            gradient = gradient * inside
        return gradient, None, None, None


def _project(
    x: Tensor, scheme: Scheme, clip: float, fixed: StaticScale | None, *, watch: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x rounded, and, if asked for, where it was not cut off."""
    grid, columns = GRIDS[scheme.grid], scheme.block[1]
    blocks = x.unflatten(-1, (-1, columns)) if columns else x
    scale, zero = _scale(blocks, scheme, clip, fixed)
    scaled = blocks.to(scale.dtype) / scale  # NVFP4: float32; mixed dtypes are slow
    if zero is not None:
        scaled += zero
    inside = _inside(scaled, grid).view(x.shape) if watch else None
    if grid.kind == "int":
        codes = scaled.clamp_(*limits(grid)).round_()
        if zero is not None and scheme.asymmetric:
            codes -= zero
        rounded = codes.mul_(scale)
    else:
        # Scaled in the dtype of x; from there a float32 holds every product of a code and a scale before it is rounded.
        rounded = snap(scaled.float(), grid).mul_(scale.float())
    return rounded.view(x.shape).to(x.dtype), inside


def _inside(scaled: Tensor, grid: Grid) -> Tensor:
    if grid.kind == "int":
        low, high = limits(grid)
        return (scaled >= low - 0.5).logical_and_(scaled <= high + 0.5)
    return scaled.abs() <= _ENDS[grid.name]


def _scale(blocks: Tensor, scheme: Scheme, clip: float, fixed: StaticScale | None) -> tuple[Tensor, Tensor | float | None]:
    """The scale of each row of the last axis, or of all, and what is added to numbers over it; they broadcast to `blocks`.

    Where the library makes a scale it adds zero points of zero to symmetric codes, which makes a negative zero positive.
    """
    grid, stored = GRIDS[scheme.grid], scheme.scale
    assert stored is not None and scheme.block[0] < 2
    if scheme.block == (0, 0):
        assert fixed is not None
        zero = None if fixed.zero is None else fixed.zero.to(blocks.device, blocks.dtype)
        return fixed.scale.to(blocks.device, blocks.dtype), zero
    if scheme.asymmetric:
        low, high = blocks.amin(-1, keepdim=True).clamp_(max=0), blocks.amax(-1, keepdim=True).clamp_(min=0)
        if clip != 1:
            low, high = low.mul_(clip), high.mul_(clip)
        return _asymmetric(low, high, grid, GRIDS[stored.grid])
    largest = _largest(blocks)
    if stored.grid == "FP32":
        largest = largest.float()
    if clip != 1:
        largest.mul_(clip)
    if stored.grid == "E8M0":
        return _power_of_two(largest, grid), 0.0
    if not static(scheme):
        return _symmetric(largest, grid, GRIDS[stored.grid]), 0.0
    assert fixed is not None
    factor = fixed.scale.to(blocks.device)
    return _held(factor * (largest / largest.new_full((), grid.maximum)), GRIDS[stored.grid]) / factor, 0.0


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude along the last axis, kept as one of 1; NaN where there is one.

    Floats without a sign are ordered as their bits are, and integers are faster to compare over short axes.
    """
    return x.abs().view(_WORDS[x.dtype]).amax(-1, keepdim=True).view(x.dtype)


def _symmetric(largest: Tensor, grid: Grid, stored: Grid) -> Tensor:
    low, high = limits(grid)
    # A tensor, because a device multiplies by the reciprocal of a number.
    return _held(largest / largest.new_full((), (high - low) / 2), stored)


def _asymmetric(low: Tensor, high: Tensor, grid: Grid, stored: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges from `low` <= 0 to `high` >= 0; the latter comes from the scale before it is rounded."""
    first, last = limits(grid)
    scale = (high - low) / low.new_full((), last - first)
    zero = (first - low / scale).clamp_(first, last).round_()
    # 0 / 0, of a range that is empty, is a zero point of 0; and no zero point is -0, for it is an integer to the library.
    return _held(scale, stored), zero.nan_to_num_(nan=0.0).add_(0.0)


def _held(scale: Tensor, stored: Grid) -> Tensor:
    """Scales as numbers of the grid that they are held in, none of them zero or infinite."""
    if _DTYPES.get(stored.name) == scale.dtype:
        rounded = scale.clamp(*limits(stored))
    else:
        rounded = snap(scale.float(), stored).to(scale.dtype)
    return rounded.masked_fill_(rounded == 0, _FOR_ZERO[stored.name])


def _power_of_two(largest: Tensor, grid: Grid) -> Tensor:
    """Scales of MXFP4 and MXFP8, from the bits of `largest` as its dtype holds it."""
    width, exponent_width, bias = _LAYOUTS[largest.dtype]
    bits = largest.view(_WORDS[largest.dtype]).to(torch.int32) + (1 << (width - 2))  # a quarter: from 1.75 on, the next power
    last = 2**exponent_width - 1
    exponent = (bits >> width) & last
    codes = (exponent + (_E8M0_BIAS - bias - _TOP_EXPONENT[grid.name])).clamp_(min=0)
    codes = codes.masked_fill_(exponent == 0, 0).masked_fill_(exponent == last, _E8M0_LAST)
    scale = decode(codes, GRIDS["E8M0"]).to(largest.dtype)
    return scale.masked_fill_(scale == 0, _FOR_ZERO["E8M0"])  # fp16 has no 2^-127
