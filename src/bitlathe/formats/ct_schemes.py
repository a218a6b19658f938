"""Schemes in the words of the compressed-tensors library, and back.

The library says of weights, and of activations by the same type, how many bits, of which kind, and what shares a scale; what
the numbers then look like in a file is a group's `format`, which is always written out: left to guess, the library stores every
integer weight that has quantized activations as one byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from bitlathe.errors import FormatError
from bitlathe.formats.stored import some
from bitlathe.numerics.scheme import GRIDS, SCHEMES, Scheme, static
from bitlathe.plan import LayerPlan

PACKED = CompressionFormat.pack_quantized
INT = CompressionFormat.int_quantized
FLOAT = CompressionFormat.float_quantized
MXFP4 = CompressionFormat.mxfp4_pack_quantized
MXFP8 = CompressionFormat.mxfp8_quantized
NVFP4 = CompressionFormat.nvfp4_pack_quantized

# Schemes the library knows by one fixed layout; their scales are no 16-bit floats and their weights are decoded in bf16.
FIXED: dict[CompressionFormat, Scheme] = {
    MXFP4: SCHEMES["MXFP4A16"],
    MXFP8: SCHEMES["MXFP8A16"],
    NVFP4: SCHEMES["NVFP4A16"],
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {"torch.bfloat16": "bf16", "bfloat16": "bf16", "torch.float16": "fp16", "float16": "fp16"}

_TOLD = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic")


def layout_of(row: LayerPlan) -> CompressionFormat:
    """The library's name for how the weight of a row with a scheme that it knows is stored."""
    weight = row.weight
    assert weight is not None
    for layout, fixed in FIXED.items():
        if weight == fixed:
            return layout
    if GRIDS[weight.grid].kind != "int":
        return FLOAT
    return INT if weight.grid == "INT8" and row.input is not None and row.input.grid == "INT8" else PACKED


def weight_arguments(scheme: Scheme) -> QuantizationArgs | None:
    """A scheme of weights in the library's words; None where it has none."""
    rows, columns = scheme.block
    integers = GRIDS[scheme.grid].kind == "int"
    if scheme.block == (1, 0):
        extent: dict[str, Any] = {"strategy": "channel"}
    elif integers and rows == 1 and columns > 1:
        extent = {"strategy": "group", "group_size": columns}
    elif scheme.grid == "E4M3" and scheme.block == (0, 0):
        extent = {"strategy": "tensor"}
    elif scheme.grid == "E4M3" and rows > 1 and columns > 1:
        extent = {"strategy": "block", "block_structure": [rows, columns]}
    else:
        extent = {}
    return _arguments(scheme, extent, dynamic=False, locally=False)


def input_arguments(scheme: Scheme) -> QuantizationArgs | None:
    """A scheme of activations in the library's words; None where it has none."""
    rows, columns = scheme.block
    if scheme.block == (1, 0):
        extent: dict[str, Any] = {"strategy": "token"}
    elif scheme.block == (0, 0):
        extent = {"strategy": "tensor"}
    else:
        extent = {"strategy": "group", "group_size": columns} if rows == 1 and columns > 1 else {}
    return _arguments(scheme, extent, dynamic=not static(scheme), locally="local")


def _arguments(scheme: Scheme, extent: dict[str, Any], *, dynamic: bool, locally: bool | str) -> QuantizationArgs | None:
    """extent: what shares a scale that is a 16-bit float. locally: `dynamic` of a scheme whose scales have a scale."""
    grid, scale = GRIDS[scheme.grid], scheme.scale
    if scheme.reader_bound or grid.unsigned:
        return None  # its readers cast scales to the model's dtype
    common: dict[str, Any] = {"num_bits": grid.bits, "symmetric": not scheme.asymmetric, "dynamic": dynamic}
    common["type"] = "int" if grid.kind == "int" else "float"
    if scheme == FIXED[NVFP4]:
        common |= {"strategy": "tensor_group", "group_size": 16, "dynamic": locally}
        return QuantizationArgs(scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn, **common)
    if scheme in FIXED.values():
        common |= {"strategy": "group", "group_size": 32}
        return QuantizationArgs(scale_dtype=torch.uint8, zp_dtype=torch.uint8, **common)
    if not extent or not (grid.kind == "int" or scheme.grid == "E4M3"):
        return None
    if scale is None or scale.scale is not None or scale.grid not in ("BF16", "FP16"):
        return None
    return QuantizationArgs(scale_dtype=DTYPES[scale.grid.lower()], **extent, **common)


def row_of(group: QuantizationScheme, default_layout: str, dtype: str) -> LayerPlan:
    """The row of a group's linears; the inverse of the functions above. dtype: the plan's. Raises FormatError for another."""
    weights, inputs = group.weights, group.input_activations
    layout = CompressionFormat(group.format or default_layout)
    if weights is None:
        raise FormatError(f"the group of {some(group.targets)} has no weights scheme: it cannot be read as a plan")
    row = LayerPlan(
        weight=_weight_scheme(weights, layout, dtype), input=None if inputs is None else _input_scheme(inputs, dtype)
    )
    written = None if row.weight is None else weight_arguments(row.weight)
    if written is None or _facts(written) != _facts(weights) or layout_of(row) != _plain(layout):
        raise FormatError(
            f"the group of {some(group.targets)} is stored as {layout.value} with {_shown(weights)}, which this program does "
            "not read. transformers with compressed-tensors may"
        )
    asked = None if row.input is None else input_arguments(row.input)
    if inputs is not None and (asked is None or _facts(asked) != _facts(inputs)):
        raise FormatError(
            f"the group of {some(group.targets)} has activations with {_shown(inputs)}, which this program does not run. "
            "transformers with compressed-tensors may"
        )
    return row


def _plain(layout: CompressionFormat) -> CompressionFormat:
    """An older name of the same bytes."""
    return FLOAT if layout == CompressionFormat.naive_quantized else layout


def _weight_scheme(weights: QuantizationArgs, layout: CompressionFormat, dtype: str) -> Scheme | None:
    block = {
        "tensor": (0, 0),
        "channel": (1, 0),
        "group": (1, weights.group_size or 0),
        "block": tuple(weights.block_structure or ()),
    }.get(_facts(weights)["strategy"], ())
    grid = {PACKED: f"INT{weights.num_bits}", INT: f"INT{weights.num_bits}", FLOAT: "E4M3"}.get(_plain(layout))
    if grid not in GRIDS or len(block) != 2:
        return FIXED.get(layout)
    return Scheme(grid=grid, block=block, scale=Scheme(grid=dtype.upper()), asymmetric=_zero_points(weights))


def _input_scheme(inputs: QuantizationArgs, dtype: str) -> Scheme | None:
    if inputs.scale_dtype == torch.uint8:
        return FIXED[MXFP4 if inputs.num_bits == 4 else MXFP8]
    strategy = _facts(inputs)["strategy"]
    if strategy == "tensor_group":
        return FIXED[NVFP4]
    block = {"tensor": (0, 0), "token": (1, 0), "group": (1, inputs.group_size or 0)}.get(strategy)
    grid = f"INT{inputs.num_bits}" if inputs.type == "int" else "E4M3"
    if grid not in GRIDS or block is None:
        return None
    return Scheme(grid=grid, block=block, scale=Scheme(grid=dtype.upper()), asymmetric=_zero_points(inputs))


def _zero_points(arguments: QuantizationArgs) -> bool:
    return arguments.type == "int" and not arguments.symmetric


def _facts(arguments: QuantizationArgs) -> dict[str, Any]:
    """What of a group's arguments says how numbers are stored and made."""
    return {key: value for key, value in arguments.model_dump(mode="json").items() if key in _TOLD and value is not None}


def _shown(arguments: QuantizationArgs) -> str:
    return ", ".join(f"{fact} {value}" for fact, value in _facts(arguments).items())


def dtype_of(config: Mapping[str, Any], groups: list[QuantizationScheme]) -> str:
    """ "bf16" or "fp16": the dtype of 16-bit scales. Raises FormatError where there is no such dtype."""
    given = {str(group.weights.scale_dtype) for group in groups if group.weights is not None} & set(NAMES)
    if len(given) > 1:
        raise FormatError(f"the groups' scales are of several dtypes, {', '.join(sorted(given))}: no plan can say that")
    hint = str(config.get("dtype", "bfloat16"))
    if not given and hint not in NAMES:
        raise FormatError(f"the model's dtype is {hint}; a plan's is bfloat16 or float16. Load the folder with transformers")
    return NAMES[given.pop() if given else hint]
