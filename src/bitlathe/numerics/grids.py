"""Numbers to codes and back, one grid at a time.

`snap` moves numbers to a grid and is the only rounding there is; `encode` writes numbers that lie on a grid as codes and
`decode` reads codes, both exactly. Everything is float32 and the same on every device: powers of two are taken from the bits
of a float, never from a logarithm.

Formats: E2M1 and E8M0 of the OCP Microscaling Formats 1.0, E4M3 of the OCP 8-bit floating point specification (the variant
without infinities), round to nearest and ties to even, as compressed-tensors and torch round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitlathe.numerics.scheme import Grid

_EXPONENT_BITS = 0x7F800000  # of a float32
_MANTISSA_BITS = 0x007FFFFF
_MANTISSA_WIDTH = 23

# Mantissa bits, and the exponent of the smallest normal number. The 16-bit dtypes are rounded to like the others and not
# by a cast there and back, which torch.compile leaves out.
_FLOATS = {"E2M1": (1, 0), "E4M3": (3, -6), "BF16": (7, -126), "FP16": (10, -14)}
_DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16, "FP32": torch.float32}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# E8M0 can say 2^-127, which is subnormal in bf16 and so is zero on hardware that flushes subnormals: not used.
_E8M0_LEAST = 2.0**-126

# What a scale becomes that would round to zero: nothing is ever divided by zero, and a block of zeros stays one whatever
# offsets are learned for it. The smallest normal number where there are enough of them. FP32 holds scales of scales: room
# is left for the smallest E4M3 number below it.
LEAST_SCALE = {"BF16": 2.0**-126, "FP16": 2.0**-14, "FP32": 2.0**-100, "E4M3": 2.0**-9, "E8M0": _E8M0_LEAST}
# FP16 scales of integer scales go down to the smallest number there is: they are a small part of a small step.
LEAST_SUPER = 2.0**-24


def limits(grid: Grid, *, unsigned: bool = False) -> tuple[float, float]:
    """Smallest and largest number of a grid. unsigned: an integer grid beside a zero point."""
    if grid.kind == "exponent":
        return _E8M0_LEAST, grid.maximum
    if grid.kind == "float":
        return -grid.maximum, grid.maximum
    return (0.0, 2.0**grid.bits - 1) if unsigned or grid.unsigned else (-(2.0 ** (grid.bits - 1)), 2.0 ** (grid.bits - 1) - 1)


def shape(grid: Grid, *, unsigned: bool = False) -> tuple[float, float, float, float]:
    """What `snap` goes by, for loops that are compiled: both limits; of a float grid the smallest normal number and 2^-(bits of
    its mantissa), where an integer grid has zeros."""
    if grid.kind == "int":
        return *limits(grid, unsigned=unsigned), 0.0, 0.0
    mantissa, exponent = _FLOATS[grid.name]
    return *limits(grid), 2.0**exponent, 2.0**-mantissa


def step(x: Tensor, grid: Grid) -> Tensor:
    """Distance between neighbours of a float grid where x (float32, finite) lies; the one above at a power of two."""
    mantissa, exponent = _FLOATS[grid.name]
    return (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32).clamp_(min=2.0**exponent).mul_(2.0**-mantissa)


def snap(x: Tensor, grid: Grid, *, unsigned: bool = False) -> Tensor:
    """The number of a grid nearest to each of x (float32, any shape, no NaN): ties to even, saturating, never infinite.

    The exponent grid rounds up to a power of two instead: below it the largest value of a block would be cut.
    """
    low, high = limits(grid, unsigned=unsigned)
    x = x.clamp(low, high)
    if grid.kind == "int":
        return x.round_()
    if grid.kind == "exponent":
        return ((x.view(torch.int32) + _MANTISSA_BITS) & _EXPONENT_BITS).view(torch.float32)
    if grid.name == "FP32":
        return x
    spacing = step(x, grid)
    return x.div_(spacing).round_().mul_(spacing)


def encode(x: Tensor, grid: Grid, *, unsigned: bool = False) -> Tensor:
    """Codes of numbers that lie on a grid (float32, any shape).

    Integers: int8, or uint8 when unsigned. E2M1: uint8, the sign in bit 3 above the index of the magnitude. E4M3:
    float8_e4m3fn. E8M0: uint8, the exponent + 127. 16 and 32 bits: their own dtype.
    """
    if grid.kind == "int":
        return x.to(torch.uint8 if unsigned or grid.unsigned else torch.int8)
    if grid.kind == "exponent":
        return (x.view(torch.int32) >> _MANTISSA_WIDTH).to(torch.uint8)
    if grid.name in _DTYPES:
        return x.to(_DTYPES[grid.name])
    if grid.name == "E4M3":
        return x.to(torch.float8_e4m3fn)
    size = x.abs()
    # 0 .. 2 in halves are indices 0 .. 4; 3, 4, 6 give 5.5, 6, 7, and the cast drops the half.
    index = torch.where(size <= 2, size * 2, size / 2 + 4).to(torch.uint8)
    return index | (torch.signbit(x).to(torch.uint8) << 3)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """The numbers (float32) that codes stand for; the inverse of `encode`, signs of zeros included."""
    if grid.kind == "exponent":
        bits = codes.to(torch.int32)
        return torch.where(bits == 0, 1 << (_MANTISSA_WIDTH - 1), bits << _MANTISSA_WIDTH).view(torch.float32)
    if grid.name == "E2M1":
        table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32, device=codes.device)
        return table[codes.to(torch.int32)]
    return codes.float()
