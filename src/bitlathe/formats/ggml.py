"""The block layouts of ggml: codes, scales and minima to the bytes of rows, and back.

From ggml-common.h and ggml-quants.c of llama.cpp. A matrix [outputs, inputs] is rows of blocks, each of 32 or 256 inputs
(`whole` of its scheme) and a few bytes; F16 is two of them. Codes are stored unsigned, symmetric ones with the middle of their
grid added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitlathe.numerics.bits import pack, unpack
from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.scheme import GRIDS, SCHEMES, Scheme

NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_BY_SCHEME = {SCHEMES[name]: name for name in NAMES}
# Name -> bytes of a block.
BYTES = {
    "Q4_0": 18,
    "Q4_1": 20,
    "Q5_0": 22,
    "Q5_1": 24,
    "Q8_0": 34,
    "Q2_K": 84,
    "Q3_K": 110,
    "Q4_K": 144,
    "Q5_K": 176,
    "Q6_K": 210,
}


def name_of_layout(scheme: Scheme) -> str | None:
    """The name that ggml has for a scheme; None where it has none."""
    return _BY_SCHEME.get(scheme)


def width_of(scheme: Scheme, inputs: int) -> int:
    """Bytes of a row of so many inputs."""
    return inputs // scheme.whole * BYTES[_BY_SCHEME[scheme]]


@dataclass(frozen=True)
class _Blocks:
    """What a block holds, all uint8 but floats, a row for each block: codes [blocks, inputs of one], scales and minima
    [blocks, groups], d and m the bytes of the float above them [blocks, 2]."""

    codes: Tensor
    d: Tensor
    m: Tensor | None = None
    scales: Tensor | None = None
    minima: Tensor | None = None


def encode(q: QuantTensor) -> Tensor:
    """The bytes of a weight [outputs, inputs], uint8 [outputs, bytes of a row]."""
    name, blocks = _BY_SCHEME[q.scheme], q.shape[0] * q.shape[1] // q.scheme.whole
    assert q.scale is not None
    codes = _unsigned(q.codes, q.scheme).reshape(blocks, -1)
    if q.scale.scale is None:
        minus = None if q.minimum is None else _bytes(-q.minimum.codes)
        parts = _Blocks(codes, _bytes(q.scale.codes), minus)
    else:
        lows = None if q.minimum is None else q.minimum
        assert lows is None or lows.scale is not None
        parts = _Blocks(
            codes,
            _bytes(q.scale.scale.codes),
            None if lows is None or lows.scale is None else _bytes(lows.scale.codes),
            q.scale.codes.reshape(blocks, -1).view(torch.uint8),
            None if lows is None else lows.codes.reshape(blocks, -1),
        )
    return torch.cat(_LAYOUTS[name][0](parts), 1).reshape(q.shape[0], -1)


def decode(data: Tensor, scheme: Scheme, shape: tuple[int, int]) -> QuantTensor:
    """The inverse of `encode`."""
    name = _BY_SCHEME[scheme]
    parts = _LAYOUTS[name][1](data.reshape(-1, BYTES[name]))
    groups = scheme.blocks(shape)
    assert scheme.scale is not None
    if scheme.scale.scale is None:
        scale = QuantTensor(scheme.scale, groups, _halves(parts.d, groups))
        low = (
            None
            if scheme.minimum is None or parts.m is None
            else QuantTensor(scheme.minimum, groups, -_halves(parts.m, groups))
        )
    else:
        above = scheme.scale.blocks(groups)
        assert parts.scales is not None
        signed = GRIDS[scheme.scale.grid].kind == "int"
        codes = parts.scales.reshape(groups).contiguous()
        scale = QuantTensor(
            scheme.scale,
            groups,
            codes.view(torch.int8) if signed else codes,
            QuantTensor(scheme.scale.scale, above, _halves(parts.d, above)),
        )
        low = None
        if scheme.minimum is not None and scheme.minimum.scale is not None and parts.m is not None and parts.minima is not None:
            top = QuantTensor(scheme.minimum.scale, above, _halves(parts.m, above))
            low = QuantTensor(scheme.minimum, groups, parts.minima.reshape(groups).contiguous(), top)
    codes = parts.codes.reshape(shape)
    if not scheme.unsigned:
        codes = (codes - 2 ** (GRIDS[scheme.grid].bits - 1)).view(torch.int8)
    return QuantTensor(scheme, shape, codes.contiguous(), scale, None, low)


def _unsigned(codes: Tensor, scheme: Scheme) -> Tensor:
    return codes if scheme.unsigned else codes.view(torch.uint8) + 2 ** (GRIDS[scheme.grid].bits - 1)


def _bytes(halves: Tensor) -> Tensor:
    """float16 of any shape to bytes [numbers, 2]."""
    return halves.contiguous().reshape(-1, 1).view(torch.uint8)


def _halves(data: Tensor, shape: tuple[int, int]) -> Tensor:
    return data.contiguous().view(torch.float16).reshape(shape)


def _nibbles(codes: Tensor, half: int) -> Tensor:
    """Codes [blocks, n], of every 2 * `half` the first half in low nibbles, the second in high ones: [blocks, n / 2]."""
    pairs = codes.reshape(len(codes), -1, 2, half) & 15
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)


def _from_nibbles(data: Tensor, half: int) -> Tensor:
    pairs = data.reshape(len(data), -1, 1, half)
    return torch.cat([pairs & 15, pairs >> 4], 2).reshape(len(data), -1)


def _layers(codes: Tensor, bits: int, count: int) -> Tensor:
    """Codes of `bits` [blocks, n], of every `count` * 32 the i-th 32 in bits i * `bits` of 32 bytes: [blocks, n / `count`]."""
    parts = codes.reshape(len(codes), -1, count, 32)
    data = torch.zeros_like(parts[:, :, 0])
    for index in range(count):
        data |= (parts[:, :, index] & (1 << bits) - 1) << (index * bits)
    return data.reshape(len(codes), -1)


def _from_layers(data: Tensor, bits: int, count: int) -> Tensor:
    parts = data.reshape(len(data), -1, 1, 32)
    return torch.cat([parts >> (index * bits) & (1 << bits) - 1 for index in range(count)], 2).reshape(len(data), -1)


def _four(b: _Blocks) -> list[Tensor]:
    return [b.d, *([] if b.m is None else [b.m]), _nibbles(b.codes, 16)]


def _from_four(data: Tensor) -> _Blocks:
    return _Blocks(_from_nibbles(data[:, -16:], 16), data[:, :2], data[:, 2:4] if data.shape[1] == BYTES["Q4_1"] else None)


def _five(b: _Blocks) -> list[Tensor]:
    return [b.d, *([] if b.m is None else [b.m]), pack(b.codes >> 4, 1), _nibbles(b.codes, 16)]


def _from_five(data: Tensor) -> _Blocks:
    codes = _from_nibbles(data[:, -16:], 16) | unpack(data[:, -20:-16].contiguous(), 1, columns=32) << 4
    return _Blocks(codes, data[:, :2], data[:, 2:4] if data.shape[1] == BYTES["Q5_1"] else None)


def _eight(b: _Blocks) -> list[Tensor]:
    return [b.d, b.codes - 128]  # ggml stores these signed


def _from_eight(data: Tensor) -> _Blocks:
    return _Blocks(data[:, 2:] + 128, data[:, :2])


def _q2(b: _Blocks) -> list[Tensor]:
    assert b.scales is not None and b.minima is not None and b.m is not None
    return [b.scales | b.minima << 4, _layers(b.codes, 2, 4), b.d, b.m]


def _from_q2(data: Tensor) -> _Blocks:
    both = data[:, :16]
    return _Blocks(_from_layers(data[:, 16:80], 2, 4), data[:, 80:82], data[:, 82:], both & 15, both >> 4)


def _q3(b: _Blocks) -> list[Tensor]:
    assert b.scales is not None
    scales = b.scales + 32  # six bits, of numbers from -32
    low, high = scales & 15, scales >> 4
    packed = [low[:, :8] | low[:, 8:] << 4, high[:, :4] | high[:, 4:8] << 2 | high[:, 8:12] << 4 | high[:, 12:] << 6]
    return [_layers(b.codes >> 2, 1, 8), _layers(b.codes, 2, 4), *packed, b.d]


def _from_q3(data: Tensor) -> _Blocks:
    low, high = data[:, 96:104], data[:, 104:108]
    scales = torch.cat([low & 15, low >> 4], 1) | torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 1) << 4
    codes = _from_layers(data[:, 32:96], 2, 4) | _from_layers(data[:, :32], 1, 8) << 2
    return _Blocks(codes, data[:, 108:], None, scales - 32)


def _twelve(b: _Blocks) -> Tensor:
    """Eight scales and eight minima of six bits in twelve bytes."""
    assert b.scales is not None and b.minima is not None
    s, m = b.scales, b.minima
    first, second = s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6
    return torch.cat([first, second, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], 1)


def _from_twelve(data: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], 1)
    return scales, torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)


def _q4(b: _Blocks) -> list[Tensor]:
    assert b.m is not None
    return [b.d, b.m, _twelve(b), _nibbles(b.codes, 32)]


def _from_q4(data: Tensor) -> _Blocks:
    return _Blocks(_from_nibbles(data[:, 16:], 32), data[:, :2], data[:, 2:4], *_from_twelve(data[:, 4:16]))


def _q5(b: _Blocks) -> list[Tensor]:
    assert b.m is not None
    return [b.d, b.m, _twelve(b), _layers(b.codes >> 4, 1, 8), _nibbles(b.codes, 32)]


def _from_q5(data: Tensor) -> _Blocks:
    codes = _from_nibbles(data[:, 48:], 32) | _from_layers(data[:, 16:48], 1, 8) << 4
    return _Blocks(codes, data[:, :2], data[:, 2:4], *_from_twelve(data[:, 4:16]))


def _q6(b: _Blocks) -> list[Tensor]:
    assert b.scales is not None
    return [_nibbles(b.codes, 64), _layers(b.codes >> 4, 2, 4), b.scales, b.d]


def _from_q6(data: Tensor) -> _Blocks:
    codes = _from_nibbles(data[:, :128], 64) | _from_layers(data[:, 128:192], 2, 4) << 4
    return _Blocks(codes, data[:, 208:], None, data[:, 192:208])


_LAYOUTS = {
    "Q4_0": (_four, _from_four),
    "Q4_1": (_four, _from_four),
    "Q5_0": (_five, _from_five),
    "Q5_1": (_five, _from_five),
    "Q8_0": (_eight, _from_eight),
    "Q2_K": (_q2, _from_q2),
    "Q3_K": (_q3, _from_q3),
    "Q4_K": (_q4, _from_q4),
    "Q5_K": (_q5, _from_q5),
    "Q6_K": (_q6, _from_q6),
}
