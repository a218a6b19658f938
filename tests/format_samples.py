"""What the tests of formats quantize: weights, rows of plans, and layers of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from bitlathe.formats.base import Format, QuantLayer
from bitlathe.formats.compressed_tensors import CompressedTensors
from bitlathe.formats.dense import Dense
from bitlathe.formats.fp8 import Fp8
from bitlathe.formats.mlx import Mlx
from bitlathe.formats.native import Native
from bitlathe.numerics.activation import StaticScale, static_scale
from bitlathe.numerics.project import QuantTensor, quantize
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import LLAMA_CPP, PRESETS, SCHEMES, Scheme, per_tensor, per_token, static
from bitlathe.plan import LayerPlan, Plan

Dtype = Literal["bf16", "fp16"]
ROWS, COLUMNS = 160, 256  # the last block of 128 rows is ragged
# Formats of every scheme, and formats of a few.
WIDE: dict[str, Format] = {"native": Native(), "compressed-tensors": CompressedTensors()}
NARROW: dict[str, Format] = {"mlx": Mlx(), "fp8": Fp8()}
HELD = WIDE | NARROW
WRITTEN: dict[str, Format] = HELD | {"dense": Dense()}  # codes do not come back from all of them
# Schemes with layouts of their own, which compressed-tensors has no words for.
APART = (*LLAMA_CPP, "FP8_BLOCK_DYNAMIC")
INT8 = SCHEMES["W8A16_CHANNEL"]

# A rotation that every format with rotations can run online.
TURNED = Rotation(space="mid", block=64, kind="hadamard")

# Rows that no name stands for. The library has words for all of them.
ROWS_BESIDE = {
    "asymmetric activations": LayerPlan(weight=SCHEMES["W4A16"], input=per_token("INT4", asymmetric=True)),
    "asymmetric and static": LayerPlan(weight=INT8, input=per_tensor("INT8", asymmetric=True)),
    "asymmetric bytes": LayerPlan(weight=SCHEMES["W8A16_CHANNEL_ASYM"], input=per_token("INT8")),
    "six bits a token": LayerPlan(weight=SCHEMES["W3A16G32"], input=per_token("INT6")),
    "a scale for 64 inputs": LayerPlan(
        weight=SCHEMES["FP8_BLOCK"], input=Scheme(grid="E4M3", block=(1, 64), scale=Scheme(grid="BF16"))
    ),
    "MXFP4 with MXFP8": LayerPlan(weight=SCHEMES["MXFP4A16"], input=SCHEMES["MXFP8A16"]),
    "W4 with E4M3": LayerPlan(weight=SCHEMES["W4A16"], input=per_token("E4M3")),
    "a clipped static range": LayerPlan(weight=INT8, input=per_tensor("INT8"), clip=0.9),
    "turned": LayerPlan(weight=SCHEMES["W4A16"], input=per_token("INT4"), online=TURNED),
}


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Groups of every size of magnitude, one of them zero, one constant."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 2, rows).unsqueeze(1)
    w[1], w[2] = 0, 0.3
    return w


def bits_of(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def facts(q: QuantTensor | StaticScale | None) -> object:
    """Everything a quantized tensor is, comparable bit for bit."""
    if q is None:
        return None
    if isinstance(q, StaticScale):
        return bits_of(q.scale), None if q.zero is None else bits_of(q.zero)
    zero = None if q.zero is None else bits_of(q.zero)
    return q.scheme, tuple(q.shape), bits_of(q.codes), zero, facts(q.scale), facts(q.minimum)


def row_named(name: str, dtype: Dtype) -> LayerPlan:
    preset = PRESETS[name].served_in(dtype)
    return LayerPlan(weight=preset.weight, input=preset.input)


def layer_of(row: LayerPlan, dtype: str, seed: int = 0, *, shape: tuple[int, int] = (ROWS, COLUMNS)) -> QuantLayer:
    assert row.weight is not None
    low, high = torch.tensor(-3.0), torch.tensor(4.5)
    fixed = static_scale(low, high, row.input, dtype, clip=row.clip) if row.input is not None and static(row.input) else None
    return QuantLayer(quantize(weight(*shape, seed), row.weight), fixed)


def plan_of(rows: Mapping[str, LayerPlan | Scheme | None], dtype: Dtype = "bf16") -> Plan:
    """Rows, or the schemes of weights alone."""
    linears = {name: row if isinstance(row, LayerPlan) else LayerPlan(weight=row) for name, row in rows.items()}
    online = tuple(dict.fromkeys(row.online for row in linears.values() if row.online is not None))
    return Plan(linears=linears, dtype=dtype, rotations=online)
