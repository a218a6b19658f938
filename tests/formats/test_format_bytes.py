"""Formats to the byte, and what they say of bytes and configurations that are not theirs."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

from bitlathe.errors import CheckpointError, FormatError
from bitlathe.formats.base import Format, QuantLayer
from bitlathe.formats.compressed_tensors import CompressedTensors
from bitlathe.formats.dense import Dense
from bitlathe.formats.native import Native
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.project import QuantTensor, dequantize
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import KV_SCHEMES, PRESETS, SCHEMES, Scheme, per_token
from bitlathe.plan import LayerPlan
from format_samples import COLUMNS, ROWS, ROWS_BESIDE, TURNED, WIDE, bits_of, layer_of, plan_of, row_named


@pytest.mark.parametrize("scheme", PRESETS)
def test_native_tensors_are_words_no_loader_casts_and_no_linear_takes(scheme: str) -> None:
    row = row_named(scheme, "bf16")
    tensors = Native().encode(layer_of(row, "bf16"), row, "bf16")
    assert all(tensor.dtype in (torch.uint8, torch.int16, torch.int32) and tensor.ndim == 1 for tensor in tensors.values())
    assert "weight" in tensors


@pytest.mark.parametrize(
    "row",
    [
        *(row_named(name, "bf16") for name in ("W3A16G32_ASYM", "NVFP4", "FP8_BLOCK", "W4A4", "W8A8_STATIC")),
        ROWS_BESIDE["asymmetric and static"],
    ],
)
def test_native_layout_is_what_encode_writes(row: LayerPlan) -> None:
    tensors = Native().encode(layer_of(row, "bf16"), row, "bf16")
    layout = Native().layout(row, (ROWS, COLUMNS))
    assert layout == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_native_bytes() -> None:
    symmetric = Scheme(grid="INT3", block=(1, 0), scale=Scheme(grid="BF16"))
    scale = QuantTensor(Scheme(grid="BF16"), (1, 1), torch.tensor([[-1.5]], dtype=torch.bfloat16))
    codes = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3]], dtype=torch.int8)  # + 4: 0 1 2 ... 7, three bits each
    tensors = Native().encode(QuantLayer(QuantTensor(symmetric, (1, 8), codes, scale)), LayerPlan(weight=symmetric), "bf16")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "weight": [0b10_001_000, 0b1_100_011_0, 0b111_110_10],
        "weight_scale": [0xBFC0 - 0x10000],
    }
    asymmetric = Scheme(grid="INT4", block=(1, 2), scale=Scheme(grid="BF16"), asymmetric=True)
    scale = QuantTensor(Scheme(grid="BF16"), (1, 2), torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    codes, zero = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8), torch.tensor([[7, 9]], dtype=torch.uint8)
    tensors = Native().encode(
        QuantLayer(QuantTensor(asymmetric, (1, 4), codes, scale, zero)), LayerPlan(weight=asymmetric), "bf16"
    )
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "weight": [0x21, 0xF3],
        "weight_zero": [0x97],
        "weight_scale": [0x3F80, 0x4000],
    }


def test_compressed_tensors_integer_bytes() -> None:
    scheme = Scheme(grid="INT4", block=(1, 4), scale=Scheme(grid="BF16"), asymmetric=True)
    scale = QuantTensor(Scheme(grid="BF16"), (16, 2), torch.ones(16, 2, dtype=torch.bfloat16))
    codes = torch.arange(8, dtype=torch.uint8).repeat(16, 1)
    zero = torch.stack([torch.arange(16, dtype=torch.uint8), torch.full((16,), 15, dtype=torch.uint8)], dim=1)
    tensors = CompressedTensors().encode(
        QuantLayer(QuantTensor(scheme, (16, 8), codes, scale, zero)), LayerPlan(weight=scheme), "bf16"
    )
    assert tensors["weight_packed"].dtype == torch.int32
    assert tensors["weight_packed"].tolist() == [[0x76543210]] * 16  # low bits first, value - 8 + 8
    assert tensors["weight_zero_point"].tolist() == [[0x76543210, -1], [0xFEDCBA98 - 2**32, -1]]  # along dimension 0
    assert tensors["weight_shape"].tolist() == [16, 8]
    assert tensors["weight_scale"].shape == (16, 2)


def test_compressed_tensors_fp4_bytes() -> None:
    codes = torch.tensor([[1, 15] * 16], dtype=torch.uint8)  # 0.5 in the low nibble, -6 in the high one
    mx = QuantTensor(
        SCHEMES["MXFP4A16"], (1, 32), codes, QuantTensor(Scheme(grid="E8M0"), (1, 1), torch.tensor([[130]]).byte())
    )
    tensors = CompressedTensors().encode(QuantLayer(mx), LayerPlan(weight=mx.scheme), "bf16")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "weight_packed": [[0xF1] * 16],
        "weight_scale": [[130]],
    }
    assert unpack_fp4_from_uint8(tensors["weight_packed"], 1, 32).tolist() == [[0.5, -6.0] * 16]
    nv = SCHEMES["NVFP4A16"]
    assert nv.scale is not None
    outer = QuantTensor(Scheme(grid="FP32"), (1, 1), torch.tensor([[0.25]]))
    inner = QuantTensor(nv.scale, (1, 2), torch.tensor([[1.0, 448.0]]).to(torch.float8_e4m3fn), outer)
    tensors = CompressedTensors().encode(QuantLayer(QuantTensor(nv, (1, 32), codes, inner)), LayerPlan(weight=nv), "bf16")
    assert tensors["weight_packed"].tolist() == [[0xF1] * 16]
    assert tensors["weight_scale"].view(torch.uint8).tolist() == [[0x38, 0x7E]]
    assert tensors["weight_global_scale"].tolist() == [4.0]


def test_compressed_tensors_fp8_bytes() -> None:
    scheme = SCHEMES["FP8_TENSOR"]
    scale = QuantTensor(Scheme(grid="BF16"), (1, 1), torch.tensor([[0.5]], dtype=torch.bfloat16))
    codes = torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn)
    tensors = CompressedTensors().encode(
        QuantLayer(QuantTensor(scheme, (1, 2), codes, scale)), LayerPlan(weight=scheme), "bf16"
    )
    assert tensors["weight"].dtype == torch.float8_e4m3fn
    assert tensors["weight"].view(torch.uint8).tolist() == [[0x38, 0xFE]]
    assert tensors["weight_scale"].tolist() == [0.5]


def test_the_library_decodes_every_power_of_two_exactly() -> None:
    exponents = torch.arange(1, 255, dtype=torch.uint8)
    assert decompress_mx_scale(exponents).tolist() == [2.0 ** (exponent - 127) for exponent in range(1, 255)]


def test_bytes_of_static_scales() -> None:
    row = row_named("W8A8_STATIC", "bf16")
    fixed = StaticScale(torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([-3], dtype=torch.int8))
    weight = layer_of(row, "bf16").weight
    tensors = Native().encode(QuantLayer(weight, fixed), ROWS_BESIDE["asymmetric and static"], "bf16")
    assert {name: tensor.tolist() for name, tensor in tensors.items() if "input" in name} == {
        "input_scale": [0x3FC0],
        "input_zero": [253],
    }
    tensors = CompressedTensors().encode(QuantLayer(weight, fixed), ROWS_BESIDE["asymmetric and static"], "bf16")
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items() if "input" in name} == {
        "input_scale": (torch.bfloat16, [1.5]),
        "input_zero_point": (torch.int8, [-3]),
    }
    assert tensors["weight"].dtype == torch.int8
    row = row_named("NVFP4", "bf16")
    nv = QuantLayer(layer_of(row, "bf16").weight, StaticScale(torch.tensor([2.0])))
    assert Native().encode(nv, row, "bf16")["input_scale"].tolist() == [0x40000000]
    assert CompressedTensors().encode(nv, row, "bf16")["input_global_scale"].tolist() == [2.0]


@pytest.mark.parametrize("format", WIDE.values(), ids=WIDE)
def test_tensors_of_another_linear_are_refused(format: Format) -> None:
    row = row_named("W8A8_STATIC", "bf16")
    tensors = format.encode(layer_of(row, "bf16"), row, "bf16")
    for lost in ("weight", "weight_scale", "input_scale"):
        with pytest.raises(CheckpointError, match=f"no tensor '{lost}'"):
            format.decode({name: tensor for name, tensor in tensors.items() if name != lost}, row, (ROWS, COLUMNS))
    with pytest.raises(CheckpointError, match="where its scheme needs"):
        format.decode(tensors, row, (2 * ROWS, COLUMNS))
    with pytest.raises(CheckpointError, match=r"'input_scale' is torch\.float32"):
        format.decode(tensors | {"input_scale": torch.ones(1)}, row, (ROWS, COLUMNS))


def test_dense_holds_the_numbers_and_no_codes() -> None:
    dense, row = Dense(), row_named("W2A16G32", "fp16")
    q = layer_of(row, "fp16").weight
    plan = plan_of({"a": row}, "fp16")
    dense.check(plan.model_copy(update={"rotations": (Rotation(space="residual", block=32),)}), {"a": (ROWS, COLUMNS)}, {})
    tensors = dense.encode(QuantLayer(q), row, "fp16")
    assert list(tensors) == ["weight"]
    assert bits_of(tensors["weight"]) == bits_of(dequantize(q, torch.float16))
    assert dense.config(plan) is None
    with pytest.raises(FormatError, match="--format native"):
        dense.decode(tensors, row, (ROWS, COLUMNS))
    with pytest.raises(FormatError, match=r"plan\.json"):
        dense.parse({}, ["a"])


@pytest.mark.parametrize("scheme", ["W4A16", "W4A4"])
def test_dense_refuses_what_it_has_no_stream_for(scheme: str) -> None:
    row, shapes = row_named(scheme, "bf16"), dict.fromkeys("abc", (ROWS, COLUMNS))
    plain = plan_of({"a": row, "b": None, "c": None})
    for plan, told in (
        (plain.model_copy(update={"kv": KV_SCHEMES["KV8"]}), "INT8 asymmetric per token.*--kv.*native"),
        (plain.model_copy(update={"rotations": (Rotation(space="qk", block=64),)}), "R3.*out of --rotate.*native"),
        (plan_of({"a": row, "b": LayerPlan(online=TURNED), "c": LayerPlan(input=per_token("INT8"))}), "inputs of b, c: .*kept"),
    ):
        with pytest.raises(FormatError, match=told):
            Dense().check(plan, shapes, {})


def test_dense_bytes_of_a_linear_whose_input_is_rounded() -> None:
    row = row_named("W8A8_STATIC", "bf16")
    scale = QuantTensor(Scheme(grid="BF16"), (1, 1), torch.tensor([[0.5]], dtype=torch.bfloat16))
    assert row.weight is not None
    q = QuantTensor(row.weight, (1, 2), torch.tensor([[2, -3]], dtype=torch.int8), scale)
    fixed = StaticScale(torch.tensor([1.5], dtype=torch.bfloat16))
    tensors = Dense().encode(QuantLayer(q, fixed), row, "bf16")
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()} == {
        "weight": (torch.int16, [0x3F80, 0xBFC0 - 0x10000]),  # 1 and -1.5
        "input_scale": (torch.int16, [0x3FC0]),
    }


def test_native_refuses_other_versions_and_models() -> None:
    native, plan = Native(), plan_of({"a": SCHEMES["W4A16"], "b": None})
    stored = native.config(plan)
    with pytest.raises(FormatError, match=r"format_version 4; .* versions 1, 2, 3\. "):
        native.parse(stored | {"format_version": 4}, ["a", "b"])
    with pytest.raises(FormatError, match="same linears: c"):
        native.parse(stored, ["a", "b", "c"])
    with pytest.raises(FormatError, match="same linears: b"):
        native.parse(stored, ["a"])
    with pytest.raises(FormatError, match=r"damaged.*unknown grid 'INT9'"):
        native.parse(stored | {"groups": [{"scheme": {"grid": "INT9"}, "linears": ["a"]}]}, ["a", "b"])
    with pytest.raises(FormatError, match=r"damaged.*less than or equal to 1"):
        native.parse(stored | {"groups": [{"clip": 2, "linears": ["a"]}]}, ["a", "b"])
