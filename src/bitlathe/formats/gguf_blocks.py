"""llama.cpp's blocks, byte by byte: bijections of codes and scales, nothing is rounded here.

A row of a weight is a sequence of blocks of 32 or 256 weights, each a few fields after another (ggml-common.h). Codes are
unsigned in them, symmetric ones with 2^(bits-1) added; where they have more bits than a field, the upper ones are in `qh`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.scheme import GRIDS, LLAMA_CPP, Scheme


@dataclass(frozen=True)
class _Plane:
    """Where some bits of a block's codes lie. Codes in their order are [outer, count, length]; those of one place in outer and
    length share a byte, each with `width` bits from `first` on, the first of them lowest."""

    outer: int
    count: int
    length: int
    width: int
    first: int = 0

    def bytes_of(self, codes: Tensor) -> Tensor:
        """Codes uint8 [..., weights of a block] to bytes [..., outer * length]."""
        parts = codes.unflatten(-1, (self.outer, self.count, self.length)) >> self.first & (1 << self.width) - 1
        packed = parts[..., 0, :].clone()
        for index in range(1, self.count):
            packed |= parts[..., index, :] << (index * self.width)
        return packed.flatten(-2)

    def codes_of(self, packed: Tensor) -> Tensor:
        """The inverse, of these bits alone."""
        packed = packed.unflatten(-1, (self.outer, self.length))
        parts = [packed >> (index * self.width) & (1 << self.width) - 1 for index in range(self.count)]
        return torch.stack(parts, dim=-2).flatten(-3) << self.first


_NIBBLES, _PAIRS = _Plane(1, 2, 16, 4), _Plane(2, 4, 32, 2)
_PLANES: dict[str, dict[str, _Plane]] = {
    "Q4_0": {"qs": _NIBBLES},
    "Q4_1": {"qs": _NIBBLES},
    "Q5_0": {"qh": _Plane(4, 8, 1, 1, 4), "qs": _NIBBLES},
    "Q5_1": {"qh": _Plane(4, 8, 1, 1, 4), "qs": _NIBBLES},
    "Q8_0": {"qs": _Plane(1, 1, 32, 8)},
    "Q2_K": {"qs": _PAIRS},
    "Q3_K": {"qh": _Plane(1, 8, 32, 1, 2), "qs": _PAIRS},
    "Q4_K": {"qs": _Plane(4, 2, 32, 4)},
    "Q5_K": {"qh": _Plane(1, 8, 32, 1, 4), "qs": _Plane(4, 2, 32, 4)},
    "Q6_K": {"qs": _Plane(2, 2, 64, 4), "qh": _Plane(2, 4, 32, 2, 4)},
}
# The fields of a block in their order, and their bytes. d, m: FP16 scale and minimum, or their scales of scales.
_FIELDS: dict[str, dict[str, int]] = {
    "Q4_0": {"d": 2, "qs": 16},
    "Q4_1": {"d": 2, "m": 2, "qs": 16},
    "Q5_0": {"d": 2, "qh": 4, "qs": 16},
    "Q5_1": {"d": 2, "m": 2, "qh": 4, "qs": 16},
    "Q8_0": {"d": 2, "qs": 32},
    "Q2_K": {"scales": 16, "qs": 64, "d": 2, "m": 2},
    "Q3_K": {"qh": 32, "qs": 64, "scales": 12, "d": 2},
    "Q4_K": {"d": 2, "m": 2, "scales": 12, "qs": 128},
    "Q5_K": {"d": 2, "m": 2, "scales": 12, "qh": 32, "qs": 128},
    "Q6_K": {"qs": 128, "qh": 64, "scales": 16, "d": 2},
}
_LOW, _HIGH = _Plane(1, 2, 8, 4), _Plane(1, 4, 4, 2, 4)  # of the 16 scales of Q3_K


def type_of(scheme: Scheme | None) -> str | None:
    """llama.cpp's name for a scheme; None where it has none."""
    return next((name for name, known in LLAMA_CPP.items() if known == scheme), None)


def bytes_a_row(name: str, columns: int) -> int:
    """Bytes of a row of `columns` weights."""
    return columns // LLAMA_CPP[name].run * sum(_FIELDS[name].values())


def encode(name: str, q: QuantTensor) -> Tensor:
    """Codes of the type `name` as blocks, uint8 [rows, bytes a row]."""
    rows, columns = q.shape
    blocks = (rows, columns // LLAMA_CPP[name].run)
    codes = _unsigned(q.codes, q.scheme).view(*blocks, -1)
    fields = {field: plane.bytes_of(codes) for field, plane in _PLANES[name].items()}
    assert q.scale is not None
    outer = q.scale if q.scale.scale is None else q.scale.scale
    fields["d"] = outer.codes.reshape(*blocks, 1).view(torch.uint8)
    if q.minimum is not None:
        # Without scales of scales a block's number is added, with them it is taken off.
        off = -q.minimum.codes if q.minimum.scale is None else q.minimum.scale.codes
        fields["m"] = off.reshape(*blocks, 1).contiguous().view(torch.uint8)
    if q.scale.scale is not None:
        minima = None if q.minimum is None else q.minimum.codes.view(*blocks, -1)
        fields["scales"] = _scales(name, _unsigned(q.scale.codes, q.scale.scheme).view(*blocks, -1), minima)
    return torch.cat([fields[field] for field in _FIELDS[name]], dim=-1).flatten(1)


def decode(name: str, packed: Tensor, columns: int) -> QuantTensor:
    """The inverse of `encode`."""
    scheme, rows = LLAMA_CPP[name], packed.shape[0]
    blocks = packed.view(rows, columns // scheme.run, -1)
    parts = blocks.split(list(_FIELDS[name].values()), dim=-1)
    fields = {field: part.contiguous() for field, part in zip(_FIELDS[name], parts, strict=True)}
    codes = torch.zeros(1, dtype=torch.uint8, device=packed.device)
    for field, plane in _PLANES[name].items():
        codes = codes | plane.codes_of(fields[field])
    shape, of_blocks = (rows, columns), scheme.blocks((rows, columns))
    assert scheme.scale is not None
    half = {field: fields[field].view(torch.float16).flatten(1) for field in ("d", "m") if field in fields}
    if scheme.scale.scale is None:
        scale = QuantTensor(scheme.scale, of_blocks, half["d"])
        minimum = None if scheme.minimum is None else QuantTensor(scheme.minimum, of_blocks, -half["m"])
    else:
        inner, off = _inner(name, fields["scales"])
        supers = scheme.scale.blocks(of_blocks)
        outer = [QuantTensor(scheme.scale.scale, supers, part) for part in half.values()]
        scale = QuantTensor(scheme.scale, of_blocks, _signed(inner, scheme.scale).reshape(of_blocks), outer[0])
        minimum = None
        if scheme.minimum is not None and off is not None:
            minimum = QuantTensor(scheme.minimum, of_blocks, off.reshape(of_blocks), outer[1])
    return QuantTensor(scheme, shape, _signed(codes, scheme).reshape(shape), scale, minimum=minimum)


def _unsigned(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes as bytes, with what makes them unsigned added; those of 8 bits are bytes already."""
    grid = GRIDS[scheme.grid]
    if grid.unsigned:
        return codes.contiguous()
    return codes.contiguous().view(torch.uint8) + (0 if grid.bits == 8 else 2 ** (grid.bits - 1))


def _signed(codes: Tensor, scheme: Scheme) -> Tensor:
    """The inverse of `_unsigned`."""
    grid = GRIDS[scheme.grid]
    if grid.unsigned:
        return codes
    return (codes - (0 if grid.bits == 8 else 2 ** (grid.bits - 1))).view(torch.int8)


def _scales(name: str, scales: Tensor, minima: Tensor | None) -> Tensor:
    """Integer scales and minima [rows, super-blocks, blocks of one] as bytes."""
    if name == "Q6_K":
        return scales
    if minima is None:
        return torch.cat([_LOW.bytes_of(scales), _HIGH.bytes_of(scales)], dim=-1)
    if name == "Q2_K":
        return scales | minima << 4
    # Q4_K and Q5_K: six bits of the first four, with the upper two of the last four above them; then the others' lower four.
    (first, last), (first_off, last_off) = scales.split(4, -1), minima.split(4, -1)
    return torch.cat([first | last >> 4 << 6, first_off | last_off >> 4 << 6, last & 15 | (last_off & 15) << 4], dim=-1)


def _inner(name: str, packed: Tensor) -> tuple[Tensor, Tensor | None]:
    """The inverse of `_scales`."""
    if name == "Q6_K":
        return packed, None
    if name == "Q3_K":
        return _LOW.codes_of(packed[..., :8]) | _HIGH.codes_of(packed[..., 8:]), None
    if name == "Q2_K":
        return packed & 15, packed >> 4
    first, first_off, last = packed.split(4, -1)
    scales = torch.cat([first & 63, last & 15 | first >> 6 << 4], dim=-1)
    return scales, torch.cat([first_off & 63, last >> 4 | first_off >> 6 << 4], dim=-1)
