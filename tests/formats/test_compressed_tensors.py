"""compressed-tensors: what it refuses, and what its configurations say, those of other writers included."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

from bitlathe.errors import FormatError
from bitlathe.formats.compressed_tensors import CompressedTensors
from bitlathe.numerics.hadamard import turn
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import KV_SCHEMES, SCHEMES, Scheme, per_token
from bitlathe.plan import LayerPlan
from format_samples import Dtype, plan_of, row_named

CT = CompressedTensors()
SHAPES = {"x.q": (128, 256), "x.k": (128, 256), "x.o": (128, 256)}
FUSED = {"x.q": "x.qkv", "x.k": "x.qkv"}
W4 = SCHEMES["W4A16"]
RANDOM = Rotation(space="mid", block=64)
ODD = Rotation(space="mid", block=96, kind="hadamard")


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
        (
            {"x.o": LayerPlan(weight=W4, input=per_token("E2M1"))},
            "bf16",
            "W4A16 with E2M1 per token: .*no layout",
        ),
        ({"x.o": LayerPlan(weight=W4, input=per_token("INT4").served_in("fp16"))}, "bf16", "its scales are FP16"),
        ({"x.o": LayerPlan(weight=W4, input=per_token("INT4"), clip=0.9)}, "bf16", r"x\.o: .* not of 0\.9 of it.*--act-clip 1"),
        ({"x.o": LayerPlan(weight=SCHEMES["NVFP4A16"], input=SCHEMES["NVFP4A16"], clip=0.9)}, "bf16", "--act-clip 1"),
        (
            {"x.q": W4, "x.k": W4, "x.o": LayerPlan(input=per_token("INT4"))},
            "bf16",
            r"x\.o: a kept weight .* keep both or none",
        ),
        ({"x.q": W4, "x.k": LayerPlan(weight=W4, input=per_token("INT8"))}, "bf16", r"different schemes for x\.q, x\.k"),
        ({"x.o": LayerPlan(weight=W4, online=RANDOM)}, "bf16", r"x\.o: W4A16: R4 .* random signs.*R4:hadamard.*native"),
        ({"x.o": LayerPlan(weight=W4, online=ODD)}, "bf16", r"x\.o: W4A16: R4 .* blocks of 96.*--rotation-block 32"),
        (
            {"x.o": LayerPlan(weight=SCHEMES["W4A16_ASYM"], input=per_token("INT8"))},
            "bf16",
            "zero points of weights.*activations",
        ),
    ],
)
def test_refusals(schemes: dict[str, LayerPlan | Scheme | None], dtype: Dtype, told: str) -> None:
    with pytest.raises(FormatError, match=told):
        CT.check(plan_of(schemes, dtype), SHAPES, FUSED)


def test_what_does_not_fit_is_refused() -> None:
    channel, grouped = SCHEMES["W4A16_CHANNEL"], SCHEMES["W4A16G32_ASYM"]
    with pytest.raises(FormatError, match="a row of 100 codes"):
        CT.check(plan_of({"a": channel}), {"a": (128, 100)}, {})
    with pytest.raises(FormatError, match="a column of 100 zero points"):
        CT.check(plan_of({"a": SCHEMES["W3A16G32_ASYM"]}), {"a": (100, 128)}, {})
    with pytest.raises(FormatError, match="no multiple of 32"):
        CT.check(plan_of({"a": grouped}), {"a": (128, 104)}, {})
    grouped_inputs = LayerPlan(weight=channel, input=Scheme(grid="INT8", block=(1, 64), scale=Scheme(grid="BF16")))
    with pytest.raises(FormatError, match="no multiple of 64"):
        CT.check(plan_of({"a": grouped_inputs}), {"a": (128, 96)}, {})


def test_what_is_beyond_linears_is_refused() -> None:
    plan, shapes = plan_of({"a": W4}), {"a": (128, 128)}
    CT.check(plan.model_copy(update={"rotations": (Rotation(space="residual", block=96), Rotation(space="value"))}), shapes, {})
    with pytest.raises(FormatError, match=r"R3.*native"):
        CT.check(plan.model_copy(update={"rotations": (Rotation(space="qk", block=64),)}), shapes, {})
    with pytest.raises(FormatError, match=r"INT4 asymmetric per token.*--kv.*native"):
        CT.check(plan.model_copy(update={"kv": KV_SCHEMES["KV4"]}), shapes, {})


def group(**changed: object) -> dict[str, object]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "strategy": "group", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | changed, "input_activations": None}},
    }


def with_inputs(kind: str = "input_activations", **arguments: object) -> dict[str, object]:
    stored = group()
    groups = stored["config_groups"]
    assert isinstance(groups, dict)
    return stored | {"config_groups": {"group_0": groups["group_0"] | {kind: arguments}}}


def transforms(**changed: object) -> dict[str, dict[str, object]]:
    """A transform_config as another writer has it."""
    apply = [
        {"targets": "re:.*a$", "location": "input"},
        {"targets": ["re:.*a$"], "location": "weight_input", "inverse": True},
    ]
    return {"config_groups": {"R4": {"type": "hadamard", "apply": apply} | changed}}


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
        (group() | {"transform_config": {"config_groups": {"R4": {}}}}, "does not accept the transform_config"),
        (group() | {"format": "int-quantized"}, "int-quantized with num_bits 4"),
        (group(num_bits=8, type="float"), "type float"),
        (group(type="float", symmetric=False, strategy="tensor", group_size=None) | {"format": "float-quantized"}, "symmetric"),
        (group(num_bits=1), "num_bits 1"),
        (group() | {"config_groups": {"group_0": {"targets": ["Linear"], "what": 1}}}, "does not accept"),
        (group() | {"dtype": "float32"}, "float32"),
        (with_inputs(num_bits=8, dynamic=True), "activations with .*strategy tensor, dynamic True"),
        (with_inputs(num_bits=4, type="float", strategy="token", dynamic=True), "activations with num_bits 4, type float"),
        (with_inputs("output_activations", num_bits=8, strategy="token", dynamic=True), "output_activations"),
        (group(num_bits=8, group_size=None, strategy="channel") | {"format": "int-quantized"}, "int-quantized with num_bits 8"),
        (group() | {"transform_config": transforms(type="random-hadamard")}, "R4.*type random-hadamard"),
        (group() | {"transform_config": transforms(randomize=True)}, "randomized"),
        (group() | {"transform_config": transforms(head_dim=96)}, "R4.*blocks of 96"),
        (group() | {"transform_config": transforms(apply=[{"targets": ["a"], "location": "k_cache"}])}, "turns k_cache"),
        (group() | {"transform_config": {"config_groups": {"u": transforms()["config_groups"]["R4"]}}}, "no rotation's"),
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


def test_names_are_those_that_serving_engines_look_for() -> None:
    """The head beside the class of linears, and gate and up of a dense block beside experts by one pattern."""
    with_head = CT.config(plan_of({"a.q": W4, "lm_head": W4}))
    assert with_head["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    gate, up, expert = "m.0.mlp.gate_proj", "m.0.mlp.up_proj", "m.1.mlp.experts.0.up_proj"
    pattern = r"re:m\.0\.mlp\.(gate|up|gate_up)_proj$"
    eight, other = SCHEMES["W8A16"], "m.0.mlp.down_proj"
    stored = CT.config(plan_of({gate: W4, up: W4, other: W4, expert: eight}))
    assert [group["targets"] for group in stored["config_groups"].values()] == [[expert], [pattern, other]]
    assert CT.config(plan_of({gate: None, other: W4, up: None, expert: W4}))["ignore"] == [pattern]
    assert CT.config(plan_of({gate: None, other: W4, up: None}))["ignore"] == [gate, up]


def test_online_rotations_of_another_writer_are_read() -> None:
    folded = {"type": "hadamard", "apply": [{"targets": ["re:.*b$"], "location": "weight_output"}]}
    groups = {"R1": folded, **transforms(head_dim=64)["config_groups"]}
    plan = CT.parse(group() | {"transform_config": {"config_groups": groups}}, ["x.a", "x.b", "lm_head"])
    turned = Rotation(space="mid", block=64, kind="hadamard")
    assert plan.rotations == (turned,)
    assert plan.linears == {"x.a": LayerPlan(weight=W4, online=turned), "x.b": LayerPlan(weight=W4), "lm_head": LayerPlan()}
    whole = CT.parse(group() | {"transform_config": transforms()}, ["x.a"]).linears["x.a"].online
    assert whole == Rotation(space="mid", block=0, kind="hadamard")


def test_presets_are_the_librarys() -> None:
    same = {"W4A4G128": "W4A4", "W4A8": "W4A8", "W8A8": "W8A8", "FP8_DYNAMIC": "FP8_DYNAMIC"}
    for ours, theirs in {**same, "MXFP4": "MXFP4", "MXFP8": "MXFP8", "NVFP4": "NVFP4"}.items():
        stored = CT.config(plan_of({"a": row_named(ours, "bf16")}))["config_groups"]["group_0"]
        known = preset_name_to_scheme(theirs, ["Linear"]).model_dump(mode="json")
        for kind in ("weights", "input_activations"):
            # Scales are of the dtype that the library gives them anyway; an observer is for making them.
            beside = {"scale_dtype", "observer"} if ours in same else {"observer"}
            ours_said, theirs_said = ({k: v for k, v in d[kind].items() if k not in beside} for d in (stored, known))
            assert ours_said == theirs_said


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "pack-quantized") for name in ("W4A4", "W4A4G128", "W4A8", "W8A16")),
        *((name, "int-quantized") for name in ("W8A8", "W8A8_STATIC")),
        *((name, "float-quantized") for name in ("FP8_DYNAMIC", "FP8_STATIC", "FP8_BLOCK")),
        *(("MXFP4", "mxfp4-pack-quantized"), ("MXFP8", "mxfp8-quantized"), ("NVFP4", "nvfp4-pack-quantized")),
    ],
)
def test_every_group_says_its_format(name: str, layout: str) -> None:
    stored = CT.config(plan_of({"a": row_named(name, "bf16")}))
    assert stored["format"] == stored["config_groups"]["group_0"]["format"] == layout


def test_rotations_are_written_as_the_library_reads_them() -> None:
    turned = Rotation(space="mid", block=64, kind="hadamard")
    row = LayerPlan(weight=W4, input=per_token("INT4"))
    stored = CT.config(plan_of({"a.q": row, "a.down": row.model_copy(update={"online": turned})}))
    assert stored["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert stored["transform_config"] == {
        "config_groups": {
            "R4": {
                "type": "hadamard",
                "apply": [
                    {"targets": ["a.down"], "location": "input", "inverse": False, "ignore": []},
                    {"targets": ["a.down"], "location": "weight_input", "inverse": True, "ignore": []},
                ],
                "randomize": False,
                "requires_grad": False,
                "head_dim": 64,
                "precision": "torch.float32",
            }
        }
    }
    # The library's matrix is the one that turns inputs here; it is its own inverse.
    matrix = deterministic_hadamard_matrix(64, torch.float64)
    assert torch.equal(turn(torch.eye(64, dtype=torch.float64), turned), matrix / 8)
    assert torch.equal(matrix, matrix.T)
