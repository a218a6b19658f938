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
from bitlathe.formats.stored import Layout, take
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.bits import pack, unpack
from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.scheme import GRIDS, Scheme, static
from bitlathe.plan import LayerPlan

WORD = 32  # bits of the integers that codes are packed into

# Grid of scales -> the dtype that they are stored in.
_SCALES = {"E8M0": torch.uint8, "E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "FP16": torch.float16}


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


def layout_of_weight(row: LayerPlan, shape: tuple[int, int]) -> Layout:
    """Name, dtype and shape of what `encode_weight` gives for a weight of `shape`, [outputs, inputs]."""
    scheme, (rows, columns), layout = row.weight, shape, layout_of(row)
    assert scheme is not None and scheme.scale is not None
    blocks, bits = scheme.blocks(shape), GRIDS[scheme.grid].bits
    stored: Layout = {"weight_scale": (_SCALES[scheme.scale.grid], (1,) if scheme.block == (0, 0) else blocks)}
    if scheme.scale.scale is not None:
        stored["weight_global_scale"] = torch.float32, (1,)
    if layout in (MXFP4, NVFP4):
        return stored | {"weight_packed": (torch.uint8, (rows, columns // 2))}
    if layout == PACKED:
        zeros: Layout = {"weight_zero_point": (torch.int32, (-(-rows * bits // WORD), blocks[1]))} if scheme.asymmetric else {}
        packed = torch.int32, (rows, -(-columns * bits // WORD))
        return stored | zeros | {"weight_packed": packed, "weight_shape": (torch.int64, (2,))}
    if scheme.asymmetric:
        stored["weight_zero_point"] = torch.int8, blocks
    return stored | {"weight": (torch.int8 if layout == INT else torch.float8_e4m3fn, shape)}


def decode_weight(tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantTensor:
    """The inverse of `encode_weight`. Raises CheckpointError for tensors that are not of this row and shape."""
    scheme, layout = row.weight, layout_of(row)
    assert scheme is not None and scheme.scale is not None
    # `weight_shape` says what is known already.
    places = {name: place for name, place in layout_of_weight(row, shape).items() if name != "weight_shape"}
    found = {name: take(tensors, name, *place) for name, place in places.items()}
    blocks, bits, zero, outer = scheme.blocks(shape), GRIDS[scheme.grid].bits, found.get("weight_zero_point"), None
    if layout in (MXFP4, NVFP4):
        codes = unpack(found["weight_packed"], 4, columns=shape[1])
    elif layout == PACKED:
        codes = unpack_from_int32(found["weight_packed"], bits, torch.Size(shape))
        zero = None if zero is None else unpack_from_int32(zero, bits, torch.Size(blocks), packed_dim=0)
    else:
        codes = found["weight"]
    if zero is not None:
        codes, zero = _unsigned(codes, bits), _unsigned(zero, bits)
    if scheme.scale.scale is not None:
        outer = QuantTensor(scheme.scale.scale, (1, 1), found["weight_global_scale"].reciprocal().reshape(1, 1))
    scale = QuantTensor(scheme.scale, blocks, found["weight_scale"].reshape(blocks), outer)
    return QuantTensor(scheme, shape, codes.contiguous(), scale, zero)


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
