"""decode(encode(q)) == q and parse(config(plan)) == plan, for every format and every scheme it accepts."""

from __future__ import annotations

import json
from typing import Literal

import pytest
import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from bitlathe.errors import CheckpointError, FormatError
from bitlathe.formats.base import Format, QuantLayer
from bitlathe.formats.compressed_tensors import CompressedTensors
from bitlathe.formats.dense import Dense
from bitlathe.formats.native import Native
from bitlathe.numerics.project import QuantTensor, dequantize, quantize
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import SCHEMES, Scheme
from bitlathe.plan import LayerPlan, Plan

Dtype = Literal["bf16", "fp16"]
ROWS, COLUMNS = 160, 256  # the last block of 128 rows is ragged
HELD: dict[str, Format] = {"native": Native(), "compressed-tensors": CompressedTensors()}
BF16_ONLY = ("MXFP4A16", "MXFP8A16", "NVFP4A16")


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Groups of every size of magnitude, one of them zero, one constant."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 2, rows).unsqueeze(1)
    w[1], w[2] = 0, 0.3
    return w


def bits_of(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def facts(q: QuantTensor | None) -> object:
    """Everything a quantized tensor is, comparable bit for bit."""
    if q is None:
        return None
    return q.scheme, tuple(q.shape), bits_of(q.codes), None if q.zero is None else bits_of(q.zero), facts(q.scale)


def accepted(format: Format) -> list[tuple[str, Dtype]]:
    bf16: list[tuple[str, Dtype]] = [(name, "bf16") for name in SCHEMES]
    fp16: list[tuple[str, Dtype]] = [(name, "fp16") for name in SCHEMES if "G32" in name or not name.startswith("W")]
    return bf16 + [pair for pair in fp16 if format.name == "native" or pair[0] not in BF16_ONLY]


CASES = [(format, name, dtype) for format in HELD for name, dtype in accepted(HELD[format])]


def plan_of(schemes: dict[str, Scheme | None], dtype: Dtype = "bf16") -> Plan:
    return Plan(linears={name: LayerPlan(weight=scheme) for name, scheme in schemes.items()}, dtype=dtype)


@pytest.mark.parametrize(("name", "scheme", "dtype"), CASES)
def test_codes_come_back(name: str, scheme: str, dtype: Dtype) -> None:
    held = SCHEMES[scheme].served_in(dtype)
    layer = QuantLayer(quantize(weight(ROWS, COLUMNS), held))
    tensors = HELD[name].encode(layer, dtype)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert facts(HELD[name].decode(tensors, held, (ROWS, COLUMNS)).weight) == facts(layer.weight)


@pytest.mark.parametrize(("name", "scheme", "dtype"), CASES)
def test_plans_come_back(name: str, scheme: str, dtype: Dtype) -> None:
    held = SCHEMES[scheme].served_in(dtype)
    plan = plan_of({"a.q": held, "a.k": held, "a.o": None, "lm_head": None}, dtype)
    HELD[name].check(plan, dict.fromkeys(plan.linears, (ROWS, COLUMNS)), {"a.q": "a.qk", "a.k": "a.qk"})
    stored = json.loads(json.dumps(HELD[name].config(plan)))
    parsed = HELD[name].parse(stored, list(plan.linears))
    assert parsed == plan
    assert list(parsed.linears) == list(plan.linears)


@pytest.mark.parametrize("format", HELD.values(), ids=HELD)
def test_mixed_plans_come_back_in_order(format: Format) -> None:
    schemes = [SCHEMES[name] for name in ("W4A16", "W3A16G32", "NVFP4A16", "FP8_BLOCK", "W4A16", "MXFP4A16", "MXFP8A16")]
    plan = plan_of(
        {f"layers.{index}.o": scheme for index, scheme in enumerate(schemes)} | {"layers.1.down": None, "lm_head": None}
    )
    parsed = format.parse(json.loads(json.dumps(format.config(plan))), list(plan.linears))
    assert parsed == plan
    assert list(parsed.linears) == list(plan.linears)


@pytest.mark.parametrize("format", HELD.values(), ids=HELD)
def test_other_programs_keys_are_passed_over(format: Format) -> None:
    plan = plan_of({"a": SCHEMES["W4A16"], "lm_head": None})
    stored = format.config(plan)
    assert stored is not None
    assert (
        format.parse(stored | {"version": "0.20.0", "sparsity_config": {}, "transform_config": {}}, list(plan.linears)) == plan
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_native_tensors_are_words_no_loader_casts_and_no_linear_takes(scheme: str) -> None:
    tensors = Native().encode(QuantLayer(quantize(weight(ROWS, COLUMNS), SCHEMES[scheme])), "bf16")
    assert all(tensor.dtype in (torch.uint8, torch.int16, torch.int32) and tensor.ndim == 1 for tensor in tensors.values())
    assert "weight" in tensors


@pytest.mark.parametrize("scheme", ["W3A16G32_ASYM", "NVFP4A16", "FP8_BLOCK"])
def test_native_layout_is_what_encode_writes(scheme: str) -> None:
    tensors = Native().encode(QuantLayer(quantize(weight(ROWS, COLUMNS), SCHEMES[scheme])), "bf16")
    layout = Native().layout(SCHEMES[scheme], (ROWS, COLUMNS))
    assert layout == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_native_bytes() -> None:
    symmetric = Scheme(grid="INT3", block=(1, 0), scale=Scheme(grid="BF16"))
    scale = QuantTensor(Scheme(grid="BF16"), (1, 1), torch.tensor([[-1.5]], dtype=torch.bfloat16))
    codes = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3]], dtype=torch.int8)  # + 4: 0 1 2 ... 7, three bits each
    tensors = Native().encode(QuantLayer(QuantTensor(symmetric, (1, 8), codes, scale)), "bf16")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "weight": [0b10_001_000, 0b1_100_011_0, 0b111_110_10],
        "weight_scale": [0xBFC0 - 0x10000],
    }
    asymmetric = Scheme(grid="INT4", block=(1, 2), scale=Scheme(grid="BF16"), asymmetric=True)
    scale = QuantTensor(Scheme(grid="BF16"), (1, 2), torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    codes, zero = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8), torch.tensor([[7, 9]], dtype=torch.uint8)
    tensors = Native().encode(QuantLayer(QuantTensor(asymmetric, (1, 4), codes, scale, zero)), "bf16")
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
    tensors = CompressedTensors().encode(QuantLayer(QuantTensor(scheme, (16, 8), codes, scale, zero)), "bf16")
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
    tensors = CompressedTensors().encode(QuantLayer(mx), "bf16")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "weight_packed": [[0xF1] * 16],
        "weight_scale": [[130]],
    }
    assert unpack_fp4_from_uint8(tensors["weight_packed"], 1, 32).tolist() == [[0.5, -6.0] * 16]
    nv = SCHEMES["NVFP4A16"]
    assert nv.scale is not None
    outer = QuantTensor(Scheme(grid="FP32"), (1, 1), torch.tensor([[0.25]]))
    inner = QuantTensor(nv.scale, (1, 2), torch.tensor([[1.0, 448.0]]).to(torch.float8_e4m3fn), outer)
    tensors = CompressedTensors().encode(QuantLayer(QuantTensor(nv, (1, 32), codes, inner)), "bf16")
    assert tensors["weight_packed"].tolist() == [[0xF1] * 16]
    assert tensors["weight_scale"].view(torch.uint8).tolist() == [[0x38, 0x7E]]
    assert tensors["weight_global_scale"].tolist() == [4.0]


def test_compressed_tensors_fp8_bytes() -> None:
    scheme = SCHEMES["FP8_TENSOR"]
    scale = QuantTensor(Scheme(grid="BF16"), (1, 1), torch.tensor([[0.5]], dtype=torch.bfloat16))
    codes = torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn)
    tensors = CompressedTensors().encode(QuantLayer(QuantTensor(scheme, (1, 2), codes, scale)), "bf16")
    assert tensors["weight"].dtype == torch.float8_e4m3fn
    assert tensors["weight"].view(torch.uint8).tolist() == [[0x38, 0xFE]]
    assert tensors["weight_scale"].tolist() == [0.5]


def test_the_library_decodes_every_power_of_two_exactly() -> None:
    exponents = torch.arange(1, 255, dtype=torch.uint8)
    assert decompress_mx_scale(exponents).tolist() == [2.0 ** (exponent - 127) for exponent in range(1, 255)]


@pytest.mark.parametrize("format", HELD.values(), ids=HELD)
def test_tensors_of_another_linear_are_refused(format: Format) -> None:
    scheme = SCHEMES["W4A16"]
    tensors = format.encode(QuantLayer(quantize(weight(ROWS, COLUMNS), scheme)), "bf16")
    with pytest.raises(CheckpointError, match="weight_scale"):
        format.decode({name: tensor for name, tensor in tensors.items() if name != "weight_scale"}, scheme, (ROWS, COLUMNS))
    with pytest.raises(CheckpointError, match="where its scheme needs"):
        format.decode(tensors, scheme, (2 * ROWS, COLUMNS))


def test_native_refuses_other_versions_and_models() -> None:
    native, plan = Native(), plan_of({"a": SCHEMES["W4A16"], "b": None})
    stored = native.config(plan)
    with pytest.raises(FormatError, match="format_version 2"):
        native.parse(stored | {"format_version": 2}, ["a", "b"])
    with pytest.raises(FormatError, match="same linears: c"):
        native.parse(stored, ["a", "b", "c"])
    with pytest.raises(FormatError, match="same linears: b"):
        native.parse(stored, ["a"])
    with pytest.raises(FormatError, match=r"damaged.*unknown grid 'INT9'"):
        native.parse(stored | {"groups": [{"scheme": {"grid": "INT9"}, "linears": ["a"]}]}, ["a", "b"])


def test_native_keeps_rotations() -> None:
    plan = plan_of({"a": SCHEMES["W4A16"]}).model_copy(update={"rotations": (Rotation(space="mid", block=32),)})
    assert Native().parse(Native().config(plan), ["a"]) == plan


def test_dense_holds_the_numbers_and_no_codes() -> None:
    dense, scheme = Dense(), SCHEMES["W2A16G32"].served_in("fp16")
    q = quantize(weight(ROWS, COLUMNS), scheme)
    dense.check(plan_of({"a": scheme}, "fp16"), {"a": (ROWS, COLUMNS)}, {})
    tensors = dense.encode(QuantLayer(q), "fp16")
    assert list(tensors) == ["weight"]
    assert bits_of(tensors["weight"]) == bits_of(dequantize(q, torch.float16))
    assert dense.config(plan_of({"a": scheme}, "fp16")) is None
    with pytest.raises(FormatError, match="--format native"):
        dense.decode(tensors, scheme, (ROWS, COLUMNS))
    with pytest.raises(FormatError, match=r"plan\.json"):
        dense.parse({}, ["a"])


CT = CompressedTensors()
SHAPES = {"x.q": (128, 256), "x.k": (128, 256), "x.o": (128, 256)}
FUSED = {"x.q": "x.qkv", "x.k": "x.qkv"}
W4 = SCHEMES["W4A16"]


@pytest.mark.parametrize(
    ("schemes", "dtype", "told"),
    [
        ({"x.q": None, "x.k": None, "x.o": None}, "bf16", "quantizes nothing.*dense"),
        ({"x.q": W4, "x.k": None, "x.o": W4}, "bf16", r"different schemes for x\.q, x\.k.*one matrix.*native"),
        ({"x.q": W4, "x.k": SCHEMES["W8A16"], "x.o": W4}, "bf16", r"different schemes for x\.q, x\.k"),
        ({"x.o": SCHEMES["W4A16_ASYM"], "x.q": W4}, "bf16", r"zero points beside other schemes \(x\.o\).*native"),
        ({"x.o": SCHEMES["NVFP4A16"]}, "fp16", r"x\.o: NVFP4A16: .*--dtype bf16"),
        ({"x.o": SCHEMES["MXFP4A16"]}, "fp16", r"--dtype bf16"),
        ({"x.o": SCHEMES["MXFP8A16"]}, "fp16", r"--dtype bf16"),
        ({"x.o": W4}, "fp16", r"scales are BF16 and readers would cast them to the plan's fp16"),
        ({"x.o": Scheme(grid="INT4", block=(2, 32), scale=Scheme(grid="BF16"))}, "bf16", "no layout.*native format"),
        ({"x.o": Scheme(grid="E2M1", block=(1, 16), scale=Scheme(grid="BF16"))}, "bf16", "no layout"),
    ],
)
def test_compressed_tensors_refusals(schemes: dict[str, Scheme | None], dtype: Dtype, told: str) -> None:
    with pytest.raises(FormatError, match=told):
        CT.check(plan_of(schemes, dtype), SHAPES, FUSED)


def test_compressed_tensors_refuses_what_does_not_fill_words() -> None:
    channel, grouped = SCHEMES["W4A16_CHANNEL"], SCHEMES["W4A16G32_ASYM"]
    with pytest.raises(FormatError, match="a row of 100 codes"):
        CT.check(plan_of({"a": channel}), {"a": (128, 100)}, {})
    with pytest.raises(FormatError, match="a column of 100 zero points"):
        CT.check(plan_of({"a": SCHEMES["W3A16G32_ASYM"]}), {"a": (100, 128)}, {})
    with pytest.raises(FormatError, match="no multiple of 32"):
        CT.check(plan_of({"a": grouped}), {"a": (128, 104)}, {})
    with pytest.raises(FormatError, match=r"rotations.*native"):
        CT.check(plan_of({"a": channel}).model_copy(update={"rotations": (Rotation(space="mid"),)}), {"a": (128, 128)}, {})


def group(**changed: object) -> dict[str, object]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "strategy": "group", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | changed, "input_activations": None}},
    }


def test_a_configuration_of_another_writer_is_read() -> None:
    linears = ["layers.0.q", "layers.0.down", "lm_head"]
    plan = CT.parse(group(observer="minmax", actorder="weight"), linears)
    assert plan == plan_of({"layers.0.q": W4, "layers.0.down": W4, "lm_head": None})
    assert CT.parse(group() | {"dtype": "float16"}, linears).dtype == "fp16"
    eight = {"targets": ["re:.*down"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}
    mixed = group() | {"format": "mixed-precision"}
    mixed["config_groups"] = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}, "format": "pack-quantized"},
        "group_1": eight | {"format": "float-quantized"},
    }
    plan = CT.parse(mixed, linears)
    assert plan == plan_of({"layers.0.q": W4, "layers.0.down": SCHEMES["FP8_CHANNEL"], "lm_head": None})


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (group() | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "kv_cache_scheme"),
        (group() | {"transform_config": {"config_groups": {"R4": {}}}}, "transform_config"),
        (group() | {"format": "int-quantized"}, "int-quantized with num_bits 4"),
        (group(num_bits=8, type="float"), "type float"),
        (group(type="float", symmetric=False, strategy="tensor", group_size=None) | {"format": "float-quantized"}, "symmetric"),
        (group(num_bits=1), "num_bits 1"),
        (group() | {"config_groups": {"group_0": {"targets": ["Linear"], "what": 1}}}, "does not accept"),
        (group() | {"dtype": "float32"}, "float32"),
        (
            group() | {"config_groups": {"g": {"targets": ["Linear"], "input_activations": {"dynamic": True}}}},
            "input_activations",
        ),
    ],
)
def test_what_a_plan_cannot_say_is_refused(config: dict[str, object], told: str) -> None:
    with pytest.raises(FormatError, match=told):
        CT.parse(config, ["a", "lm_head"])


def test_the_library_reads_the_configuration_back() -> None:
    plan = plan_of({"a": W4, "b": SCHEMES["NVFP4A16"], "lm_head": None})
    stored = CT.config(plan)
    read = QuantizationConfig.model_validate(stored)
    assert read.model_dump(mode="json") == stored
    assert stored["format"] == "mixed-precision"
    assert [(group["format"], group["targets"]) for group in stored["config_groups"].values()] == [
        ("pack-quantized", ["a"]),
        ("nvfp4-pack-quantized", ["b"]),
    ]
    single = CT.config(plan_of({"a": W4, "b": W4, "lm_head": None}))
    assert single["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert (single["format"], single["ignore"]) == ("pack-quantized", ["lm_head"])
