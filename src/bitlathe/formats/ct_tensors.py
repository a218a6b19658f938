"""The tensors that compressed-tensors stores for one linear, and the codes and scales that they are.

Integers are packed by the library's own packer. Its compressors are never used, because they divide the weight by its scales
and round again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from bitlathe.formats.ct_schemes import DTYPES, INT, MXFP4, NVFP4, PACKED, layout_of
from bitlathe.formats.stored import take
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.bits import pack, unpack
from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.scheme import GRIDS, Scheme, static
from bitlathe.plan import LayerPlan

WORD = 32  # bits of the integers that codes are packed into


def encode_weight(q: QuantTensor, row: LayerPlan) -> dict[str, Tensor]:
    """Codes, scales and zero points of a weight [outputs, inputs]."""
    scale, layout = q.scale, layout_of(row)
    assert scale is not None
    scales, bits = scale.codes.contiguous(), GRIDS[q.scheme.grid].bits
    if layout == MXFP4:
        return {"weight_packed": pack(q.codes, 4), "weight_scale": scales}
    if layout == NVFP4:
        assert scale.scale is not None
        # A power of two, so that dividing by its inverse, as readers do, is multiplying by it.
        inverse = scale.scale.codes.reshape(1).reciprocal()
        return {"weight_packed": pack(q.codes, 4), "weight_scale": scales, "weight_global_scale": inverse}
    if layout == PACKED:
        tensors = {
            "weight_packed": pack_to_int32(_signed(q.codes, bits), bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if q.zero is not None:
            tensors["weight_zero_point"] = pack_to_int32(_signed(q.zero, bits), bits, packed_dim=0).contiguous()
        return tensors
    tensors = {
        "weight": _signed(q.codes, bits).contiguous() if layout == INT else q.codes.contiguous(),
        "weight_scale": scales.flatten() if q.scheme.block == (0, 0) else scales,
    }
    if q.zero is not None:
        tensors["weight_zero_point"] = _signed(q.zero, bits).contiguous()
    return tensors


def decode_weight(tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantTensor:
    """The inverse of `encode_weight`. Raises CheckpointError for tensors that are not of this row and shape."""
    scheme, (rows, columns), layout = row.weight, shape, layout_of(row)
    assert scheme is not None
    blocks, bits, zero = scheme.blocks(shape), GRIDS[scheme.grid].bits, None
    if layout in (MXFP4, NVFP4):
        codes = unpack(take(tensors, "weight_packed", torch.uint8, (rows, columns // 2)), 4, columns=columns)
    elif layout == PACKED:
        packed = take(tensors, "weight_packed", torch.int32, (rows, -(-columns * bits // WORD)))
        codes = unpack_from_int32(packed, bits, torch.Size(shape))
        if scheme.asymmetric:
            zeros = take(tensors, "weight_zero_point", torch.int32, (-(-rows * bits // WORD), blocks[1]))
            zero = unpack_from_int32(zeros, bits, torch.Size(blocks), packed_dim=0)
    elif layout == INT:
        codes = take(tensors, "weight", torch.int8, shape)
        zero = take(tensors, "weight_zero_point", torch.int8, blocks) if scheme.asymmetric else None
    else:
        codes = take(tensors, "weight", torch.float8_e4m3fn, shape)
    if zero is not None:
        codes, zero = _unsigned(codes, bits), _unsigned(zero, bits)
    return QuantTensor(scheme, shape, codes.contiguous(), _decode_scale(tensors, scheme, blocks), zero)


def _decode_scale(tensors: Mapping[str, Tensor], scheme: Scheme, blocks: tuple[int, int]) -> QuantTensor:
    stored, outer = scheme.scale, None
    assert stored is not None
    if stored.scale is not None:
        inverse = take(tensors, "weight_global_scale", torch.float32, (1,))
        outer = QuantTensor(stored.scale, (1, 1), inverse.reciprocal().reshape(1, 1))
    dtype = {"E8M0": torch.uint8, "E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "FP16": torch.float16}[stored.grid]
    shape = (1,) if scheme.block == (0, 0) else blocks
    return QuantTensor(stored, blocks, take(tensors, "weight_scale", dtype, shape).reshape(blocks), outer)


def encode_input(fixed: StaticScale, scheme: Scheme) -> dict[str, Tensor]:
    """What is static of a linear's activations."""
    if scheme.block != (0, 0):
        return {"input_global_scale": fixed.scale}
    return {"input_scale": fixed.scale} | ({} if fixed.zero is None else {"input_zero_point": fixed.zero})


def decode_input(tensors: Mapping[str, Tensor], scheme: Scheme | None) -> StaticScale | None:
    """The inverse of `encode_input`; None for a scheme without static scales. Raises CheckpointError like `decode_weight`."""
    if scheme is None or not static(scheme):
        return None
    if scheme.block != (0, 0):
        return StaticScale(take(tensors, "input_global_scale", torch.float32, (1,)))
    assert scheme.scale is not None
    scale = take(tensors, "input_scale", DTYPES[scheme.scale.grid.lower()], (1,))
    return StaticScale(scale, take(tensors, "input_zero_point", torch.int8, (1,)) if scheme.asymmetric else None)


def same(a: QuantTensor | None, b: QuantTensor | None) -> bool:
    """Whether two quantized tensors are equal, bit for bit."""
    if a is None or b is None:
        return a is b
    zeros = a.zero is b.zero if a.zero is None or b.zero is None else torch.equal(a.zero, b.zero)
    codes = torch.equal(a.codes.contiguous().view(torch.uint8), b.codes.contiguous().view(torch.uint8))
    return a.scheme == b.scheme and a.shape == b.shape and codes and zeros and same(a.scale, b.scale)


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes less 2^(bits-1), as int8; signed ones as they are."""
    return codes if codes.dtype == torch.int8 else (codes - 2 ** (bits - 1)).view(torch.int8)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    return codes.contiguous().view(torch.uint8) + 2 ** (bits - 1)
