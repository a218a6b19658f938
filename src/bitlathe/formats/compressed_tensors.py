"""compressed-tensors, the format of its own library, of transformers and of vLLM (quant_method "compressed-tensors").

The configuration is built from the library's own types, and integers are packed by its own packer. Its compressors are never
used, because they divide the weight by its scales and round again.

How the library decodes, and so what is refused here (read in its version 0.20, and tested against it):

    pack-quantized, float-quantized     in the dtype of the scales, which transformers holds in the dtype of the model: 16-bit
                                        scales of another dtype than the plan's would be cast on the way in
    mxfp4-pack-, nvfp4-pack-quantized,  always in bf16: a model that runs in fp16 would be given bf16 weights
    mxfp8-quantized
    pack-quantized with zero points     by transformers only while it loads and only by one scheme for all (see `config`)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.utils.match import match_name
from pydantic import ValidationError
from torch import Tensor

from bitlathe.errors import FormatError
from bitlathe.formats.base import QuantLayer
from bitlathe.formats.stored import refuse_split_groups, some, take
from bitlathe.numerics.bits import pack, unpack
from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.scheme import GRIDS, SCHEMES, Scheme, name_of
from bitlathe.plan import LayerPlan, Plan

METHOD = "compressed-tensors"

PACKED = CompressionFormat.pack_quantized
FLOAT = CompressionFormat.float_quantized
MXFP4 = CompressionFormat.mxfp4_pack_quantized
MXFP8 = CompressionFormat.mxfp8_quantized
NVFP4 = CompressionFormat.nvfp4_pack_quantized
MIXED = CompressionFormat.mixed_precision

# Schemes the library knows by one fixed layout; their scales are no 16-bit floats and they are decoded in bf16.
FIXED: dict[CompressionFormat, Scheme] = {
    MXFP4: SCHEMES["MXFP4A16"],
    MXFP8: SCHEMES["MXFP8A16"],
    NVFP4: SCHEMES["NVFP4A16"],
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {"torch.bfloat16": "bf16", "bfloat16": "bf16", "torch.float16": "fp16", "float16": "fp16"}
WORD = 32  # bits of the integers that codes are packed into


class CompressedTensors:
    """compressed-tensors, weights only."""

    name = "compressed-tensors"

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError for what the library has no layout for, or would decode to other weights than ours."""
        if not plan.quantized:
            raise FormatError("compressed-tensors cannot hold a plan that quantizes nothing: write the dense format instead")
        if plan.rotations:
            raise FormatError(
                "compressed-tensors cannot record rotations of the model: leave them out, or write the native format, which can"
            )
        refused: dict[str, list[str]] = {}
        for name, scheme in plan.quantized.items():
            reason = _reason(scheme, plan.dtype) or _misfit(scheme, shapes[name])
            if reason is not None:
                refused.setdefault(f"{name_of(scheme)}: {reason}", []).append(name)
        if refused:
            told = "; ".join(f"{some(names)}: {reason}" for reason, names in refused.items())
            raise FormatError(f"compressed-tensors cannot hold {told}. The native format holds every scheme")
        schemes = set(plan.quantized.values())
        asymmetric = [name for name, scheme in plan.quantized.items() if scheme.asymmetric]
        if asymmetric and len(schemes) > 1:
            raise FormatError(
                f"compressed-tensors cannot hold zero points beside other schemes ({some(asymmetric)}): transformers reads "
                "them only where all linears share one scheme. Choose symmetric schemes, one for all, or the native format"
            )
        refuse_split_groups(plan, fused, self.name)

    def encode(self, layer: QuantLayer, dtype: str) -> dict[str, Tensor]:
        """The library's tensors of a linear."""
        tensors = _encode(layer.weight)
        assert _same(_decode(tensors, layer.weight.scheme, layer.weight.shape), layer.weight)
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantLayer:
        """The inverse of `encode`. Raises CheckpointError for tensors that are not of this scheme and shape."""
        return QuantLayer(_decode(tensors, scheme, shape))

    def config(self, plan: Plan) -> dict[str, Any]:
        """A group for each scheme: of all linears when there is one, of full names when there are more."""
        groups: dict[Scheme, list[str]] = {}
        for name, scheme in plan.quantized.items():
            if (reason := _reason(scheme, plan.dtype)) is not None:
                raise FormatError(f"compressed-tensors cannot hold {name}, {name_of(scheme)}: {reason}")
            groups.setdefault(scheme, []).append(name)
        formats = {layout_of(scheme) for scheme in groups}
        config = QuantizationConfig(
            config_groups={
                f"group_{index}": QuantizationScheme(
                    targets=["Linear"] if len(groups) == 1 else names, weights=_arguments(scheme), format=layout_of(scheme)
                )
                for index, (scheme, names) in enumerate(groups.items())
            },
            format=(MIXED if len(formats) != 1 else formats.pop()).value,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=[name for name, row in plan.linears.items() if row.weight is None],
        )
        # How transformers loads lazily has no place for packed zero points, and stops at their shape; how it dequantizes while
        # it loads has. That way decodes every linear by the first group, which is why `check` wants one scheme.
        asymmetric = any(scheme.asymmetric for scheme in groups)
        return config.model_dump(mode="json") | ({"dequantize": True} if asymmetric else {})

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """The inverse of `config`; other writers' configurations are read as far as a plan can say what they say.

        The plan's dtype is what the configuration gives for its scales, else what `config` holds under "dtype" (put there
        config.json's own: the library writes it nowhere else), else bf16. Raises FormatError for the rest.
        """
        known = {key: value for key, value in config.items() if key in QuantizationConfig.model_fields}
        try:
            stored = QuantizationConfig.model_validate(known)
        except (ValidationError, ValueError, NotImplementedError, KeyError) as error:
            raise FormatError(f"the compressed-tensors library does not accept the quantization_config: {error}") from error
        _refuse_beyond_weights(config, stored)
        groups = [group for group in stored.config_groups.values() if isinstance(group, QuantizationScheme)]
        dtype = _dtype_of(config, groups)
        schemes = {id(group): _scheme_of(group, stored.format, dtype) for group in groups}
        rows = {}
        for name in linears:
            group = None if _matches(name, stored.ignore or []) else _group_of(name, groups)
            rows[name] = LayerPlan(weight=None if group is None else schemes[id(group)])
        return Plan.model_validate({"linears": rows, "dtype": dtype})


def layout_of(scheme: Scheme) -> CompressionFormat:
    """The library's name for how a scheme that it knows is stored."""
    for layout, fixed in FIXED.items():
        if scheme == fixed:
            return layout
    return PACKED if GRIDS[scheme.grid].kind == "int" else FLOAT


def _reason(scheme: Scheme, dtype: str) -> str | None:
    """Why the library cannot hold a scheme in a plan of this dtype, with the way out; None when it can."""
    if _arguments(scheme) is None:
        return "the library has no layout for it; choose another scheme"
    if scheme in FIXED.values():
        return None if dtype == "bf16" else "the library decodes it in bf16 and the plan's dtype is fp16; use --dtype bf16"
    grid = scheme.scale.grid if scheme.scale is not None else ""
    if grid != dtype.upper():
        return f"its scales are {grid} and readers would cast them to the plan's {dtype}; use scales of the plan's dtype"
    return None


def _misfit(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why a matrix of `shape` cannot be stored by a scheme that the library knows; None when it can."""
    rows, columns = shape
    if not scheme.fits(shape):
        return f"{columns} inputs are no multiple of {scheme.block[1]}; choose one scale a row (_CHANNEL), or keep it"
    bits = GRIDS[scheme.grid].bits
    if layout_of(scheme) == PACKED and columns * bits % WORD:
        return f"a row of {columns} codes does not fill whole 32-bit words, as serving engines need; keep it"
    if scheme.asymmetric and rows * bits % WORD:
        return f"a column of {rows} zero points does not fill whole 32-bit words, as serving engines need; keep it"
    return None


def _arguments(scheme: Scheme) -> QuantizationArgs | None:
    """A scheme in the library's words; None where it has none."""
    common: dict[str, Any] = {"num_bits": GRIDS[scheme.grid].bits, "symmetric": not scheme.asymmetric, "dynamic": False}
    common["type"] = "int" if GRIDS[scheme.grid].kind == "int" else "float"
    if scheme == FIXED[NVFP4]:
        held = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
        return QuantizationArgs(strategy="tensor_group", group_size=16, **held, **common)  # pyright: ignore[reportArgumentType]
    if scheme in FIXED.values():
        held = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
        return QuantizationArgs(strategy="group", group_size=32, **held, **common)  # pyright: ignore[reportArgumentType]
    scale = scheme.scale
    if scale is None or scale.scale is not None or scale.grid not in ("BF16", "FP16"):
        return None
    extent = _extent(scheme)
    return None if extent is None else QuantizationArgs(scale_dtype=DTYPES[scale.grid.lower()], **extent, **common)


def _extent(scheme: Scheme) -> dict[str, Any] | None:
    """What shares one scale, in the library's words; None where it has none for the grid."""
    rows, columns = scheme.block
    if (rows, columns) == (1, 0):
        return {"strategy": "channel"}
    if GRIDS[scheme.grid].kind == "int":
        return {"strategy": "group", "group_size": columns} if rows == 1 and columns > 1 else None
    if scheme.grid != "E4M3":
        return None
    if (rows, columns) == (0, 0):
        return {"strategy": "tensor"}
    return {"strategy": "block", "block_structure": [rows, columns]} if rows > 1 and columns > 1 else None


def _scheme_of(group: QuantizationScheme, default_layout: str, dtype: str) -> Scheme:
    """The scheme of a group; the inverse of `_arguments` and `layout_of`."""
    weights, layout = group.weights, CompressionFormat(group.format or default_layout)
    if weights is None:
        raise FormatError(f"the group of {some(group.targets)} has no weights scheme: it cannot be read as a plan")
    facts = _facts(weights)
    block = {
        "tensor": (0, 0),
        "channel": (1, 0),
        "group": (1, weights.group_size or 0),
        "block": tuple(weights.block_structure or ()),
    }.get(facts["strategy"], ())
    grid = {PACKED: f"INT{weights.num_bits}", FLOAT: "E4M3", CompressionFormat.naive_quantized: "E4M3"}.get(layout)
    scheme = FIXED.get(layout)
    if grid in GRIDS and len(block) == 2:
        scheme = Scheme(
            grid=grid, block=block, scale=Scheme(grid=dtype.upper()), asymmetric=layout == PACKED and not weights.symmetric
        )
    written = None if scheme is None else _arguments(scheme)
    if scheme is None or written is None or _facts(written) != facts:
        told = ", ".join(f"{fact} {value}" for fact, value in facts.items())
        raise FormatError(
            f"the group of {some(group.targets)} is stored as {layout.value} with {told}, which this program does not read. "
            "transformers with compressed-tensors may"
        )
    return scheme


def _facts(weights: QuantizationArgs) -> dict[str, Any]:
    """What of a group's arguments says how its weights are stored."""
    told = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure")
    return {key: value for key, value in weights.model_dump(mode="json").items() if key in told and value is not None}


def _dtype_of(config: Mapping[str, Any], groups: list[QuantizationScheme]) -> str:
    """ "bf16" or "fp16": the dtype of 16-bit scales."""
    given = {str(group.weights.scale_dtype) for group in groups if group.weights is not None} & set(NAMES)
    if len(given) > 1:
        raise FormatError(f"the groups' scales are of several dtypes, {', '.join(sorted(given))}: no plan can say that")
    hint = str(config.get("dtype", "bfloat16"))
    if not given and hint not in NAMES:
        raise FormatError(f"the model's dtype is {hint}; a plan's is bfloat16 or float16. Load the folder with transformers")
    return NAMES[given.pop() if given else hint]


def _refuse_beyond_weights(config: Mapping[str, Any], stored: QuantizationConfig) -> None:
    beyond = [key for key in ("transform_config", "sparsity_config", "kv_cache_scheme") if config.get(key)]
    for group in stored.config_groups.values():
        if isinstance(group, QuantizationScheme):
            beyond += [key for key in ("input_activations", "output_activations") if dict(group)[key] is not None]
    if beyond:
        raise FormatError(
            f"the quantization_config has {', '.join(dict.fromkeys(beyond))}, which plans of this version cannot say, so "
            "the model would not be the one that was made. Load the folder with its own reader"
        )


def _matches(name: str, targets: list[str]) -> bool:
    return any(target == "Linear" or match_name(name, target) for target in targets)


def _group_of(name: str, groups: list[QuantizationScheme]) -> QuantizationScheme | None:
    """The group of a linear as the library chooses it: exact names first, then regular expressions, then the class."""
    targets = {target: group for group in reversed(groups) for target in reversed(group.targets)}
    for target in sorted(targets, key=lambda target: (target == "Linear", "re:" in target, target)):
        if _matches(name, [target]):
            return targets[target]
    return None


def _encode(q: QuantTensor) -> dict[str, Tensor]:
    scale, layout = q.scale, layout_of(q.scheme)
    assert scale is not None
    scales = scale.codes.contiguous()
    if layout == MXFP4:
        return {"weight_packed": pack(q.codes, 4), "weight_scale": scales}
    if layout == NVFP4:
        assert scale.scale is not None
        # A power of two, so that dividing by its inverse, as readers do, is multiplying by it.
        inverse = scale.scale.codes.reshape(1).reciprocal()
        return {"weight_packed": pack(q.codes, 4), "weight_scale": scales, "weight_global_scale": inverse}
    if layout != PACKED:
        return {"weight": q.codes.contiguous(), "weight_scale": scales.flatten() if q.scheme.block == (0, 0) else scales}
    bits = GRIDS[q.scheme.grid].bits
    tensors = {
        "weight_packed": pack_to_int32(_signed(q.codes, bits), bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero is not None:
        tensors["weight_zero_point"] = pack_to_int32(_signed(q.zero, bits), bits, packed_dim=0).contiguous()
    return tensors


def _decode(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantTensor:
    (rows, columns), blocks, layout = shape, scheme.blocks(shape), layout_of(scheme)
    assert scheme.scale is not None
    if layout in (MXFP4, NVFP4):
        codes = unpack(take(tensors, "weight_packed", torch.uint8, (rows, columns // 2)), 4, columns=columns)
        return QuantTensor(scheme, shape, codes, _decode_scale(tensors, scheme, blocks))
    if layout != PACKED:
        codes = take(tensors, "weight", torch.float8_e4m3fn, shape)
        return QuantTensor(scheme, shape, codes, _decode_scale(tensors, scheme, blocks))
    bits = GRIDS[scheme.grid].bits
    packed = take(tensors, "weight_packed", torch.int32, (rows, -(-columns * bits // WORD)))
    codes, zero = unpack_from_int32(packed, bits, torch.Size(shape)), None
    if scheme.asymmetric:
        zeros = take(tensors, "weight_zero_point", torch.int32, (-(-rows * bits // WORD), blocks[1]))
        zero = _unsigned(unpack_from_int32(zeros, bits, torch.Size(blocks), packed_dim=0), bits)
        codes = _unsigned(codes, bits)
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


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes less 2^(bits-1), as int8; signed ones as they are."""
    return codes if codes.dtype == torch.int8 else (codes - 2 ** (bits - 1)).view(torch.int8)


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    return codes.contiguous().view(torch.uint8) + 2 ** (bits - 1)


def _same(a: QuantTensor | None, b: QuantTensor | None) -> bool:
    """Whether two quantized tensors are equal, bit for bit."""
    if a is None or b is None:
        return a is b
    zeros = a.zero is b.zero if a.zero is None or b.zero is None else torch.equal(a.zero, b.zero)
    codes = torch.equal(a.codes.contiguous().view(torch.uint8), b.codes.contiguous().view(torch.uint8))
    return a.scheme == b.scheme and a.shape == b.shape and codes and zeros and _same(a.scale, b.scale)
