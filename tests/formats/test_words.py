"""gptq, awq and auto-round: codes and configurations come back, words are where their readers look, and what none can say is
refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitlathe
from bitlathe.errors import CheckpointError, FormatError
from bitlathe.formats.auto_round import AutoRound
from bitlathe.formats.awq import Awq
from bitlathe.formats.base import Format, QuantLayer
from bitlathe.formats.gptq import Gptq
from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.scheme import KV_SCHEMES, PRESETS, Scheme
from bitlathe.plan import LayerPlan, Plan
from format_samples import COLUMNS, ROWS, facts, layer_of, plan_of, row_named
from test_convert import quantized, tensors

FORMATS: dict[str, Format] = {"gptq": Gptq(), "awq": Awq(), "auto-round": AutoRound()}
WIDTHS = {"gptq": "2348", "awq": "4", "auto-round": "234568"}
HELD = [
    (format, scheme)
    for format, widths in WIDTHS.items()
    for scheme in PRESETS
    if scheme[0] == "W" and "A16" in scheme and scheme[1] in widths and (format != "awq" or "ASYM" in scheme)
]
SHAPES = {"model.layers.0.q": (ROWS, COLUMNS), "model.layers.0.k": (32, COLUMNS), "model.layers.1.o": (ROWS, COLUMNS)}


def planned(scheme: str, **others: str) -> Plan:
    rows = {name: row_named(others.get(name.rpartition(".")[2], scheme), "fp16") for name in SHAPES}
    return plan_of({**rows, "model.layers.1.down": None, "lm_head": None}, "fp16")


def shapes(plan: Plan) -> dict[str, tuple[int, int]]:
    return {name: SHAPES.get(name, (ROWS, COLUMNS)) for name in plan.linears}


def parsed(format: Format, plan: Plan) -> Plan:
    return format.parse(json.loads(json.dumps(format.config(plan))), list(plan.linears))


@pytest.mark.parametrize(("name", "scheme"), HELD)
def test_codes_and_plans_come_back_and_bits_are_counted(name: str, scheme: str) -> None:
    format, row, plan = FORMATS[name], row_named(scheme, "fp16"), planned(scheme)
    format.check(plan, shapes(plan), {})
    assert parsed(format, plan) == plan
    for shape in SHAPES.values():
        layer = layer_of(row, "fp16", shape=shape)
        stored = format.encode(layer, row, "fp16")
        assert facts(format.decode(stored, row, shape).weight) == facts(layer.weight)
        assert format.bits(row, shape) == 8 * sum(tensor.nbytes for tensor in stored.values())
        assert all(tensor.is_contiguous() for tensor in stored.values())


@pytest.mark.parametrize("name", ["gptq", "auto-round"])
@pytest.mark.parametrize("schemes", [("W4A16", "W8A16_CHANNEL", "W3A16G32"), ("W8A16_ASYM", "W2A16G64_ASYM", "W3A16_ASYM")])
def test_mixed_plans_come_back(name: str, schemes: tuple[str, str, str]) -> None:
    plan = planned(schemes[0], k=schemes[1], o=schemes[2])
    FORMATS[name].check(plan, shapes(plan), {})
    assert parsed(FORMATS[name], plan) == plan


def coded(bits: int, codes: torch.Tensor, *, zeros: torch.Tensor | None = None) -> QuantLayer:
    """Codes [outputs, inputs] with one scale a row, that of row i being i + 1."""
    rows, columns = codes.shape
    scale = Scheme(grid="FP16")
    scheme = Scheme(grid=f"INT{bits}", block=(1, 0), scale=scale, asymmetric=zeros is not None)
    scales = QuantTensor(scale, (rows, 1), torch.arange(1, rows + 1).half().unsqueeze(1))
    return QuantLayer(QuantTensor(scheme, (rows, columns), codes, scales, zeros))


def words(*values: int) -> list[int]:
    """Unsigned words as int32 shows them."""
    return [value - 2**32 if value >= 2**31 else value for value in values]


def test_gptq_words_of_four_bits() -> None:
    codes = (torch.arange(8) - 8).to(torch.int8).repeat(8, 1)  # stored as 0, 1 ... 7
    layer = coded(4, codes)
    found = Gptq().encode(layer, LayerPlan(weight=layer.weight.scheme), "fp16")
    assert found["qweight"].tolist() == [words(0x76543210) * 8]
    assert found["qzeros"].tolist() == [words(0x77777777)]
    assert found["scales"].tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]
    assert found["g_idx"].tolist() == [0] * 8
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }


def test_gptq_words_of_three_bits_straddle() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[:, 10], codes[:, 21] = 0b101, 0b110  # bits 30 .. 32 and 63 .. 65
    zeros = torch.full((32, 1), 1, dtype=torch.uint8)
    layer = coded(3, codes, zeros=zeros)
    found = Gptq().encode(layer, LayerPlan(weight=layer.weight.scheme), "fp16")
    assert found["qweight"][:, 5].tolist() == words(0x40000000, 0x00000001, 0x00000003)
    # ones as they are: the second version of the layout
    assert found["qzeros"].tolist() == [words(0x49249249, 0x92492492, 0x24924924)]


def test_awq_words_are_in_an_order_of_their_own() -> None:
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(1).repeat(1, 8)  # column i of [inputs, outputs] holds i
    layer = coded(4, codes, zeros=(torch.arange(8, dtype=torch.uint8) + 8).unsqueeze(1))
    found = Awq().encode(layer, LayerPlan(weight=layer.weight.scheme), "fp16")
    assert found["qweight"].tolist() == [words(0x75316420)] * 8
    assert found["qzeros"].tolist() == [words(0xFDB9ECA8)]


REFUSED: list[tuple[str, Plan, str]] = [
    ("gptq", planned("W5A16"), "2, 3, 4, 8 bits"),
    ("gptq", plan_of({"a": row_named("W4A16", "bf16")}), "--dtype fp16"),
    ("gptq", planned("W4A16", k="W4A16_ASYM"), "one kind"),
    ("gptq", planned("FP8_CHANNEL"), "integers"),
    ("gptq", planned("W4A8"), "activations"),
    ("gptq", planned("W4A16").model_copy(update={"kv": KV_SCHEMES["KV4"]}), "--kv"),
    ("gptq", plan_of({"lm_head": row_named("W4A16", "fp16")}, "fp16"), "output head"),
    ("gptq", plan_of({"a": None}, "fp16"), "dense format"),
    ("gptq", planned("Q4_1"), "llama.cpp"),
    ("auto-round", planned("Q4_0"), "llama.cpp"),
    ("awq", planned("W4A16"), "_ASYM"),
    ("awq", planned("W8A16_ASYM"), "4 bits"),
    ("awq", planned("W4A16_ASYM", k="W4A16G32_ASYM"), "one scheme"),
    ("auto-round", planned("W4A16_ASYM", k="W8A16"), "one kind"),
    ("auto-round", planned("FP8_BLOCK"), "integers"),
]


@pytest.mark.parametrize(("name", "plan", "words"), REFUSED)
def test_what_cannot_be_held_is_refused(name: str, plan: Plan, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        FORMATS[name].check(plan, shapes(plan), {})


def test_rows_that_do_not_fill_words_and_split_groups_are_refused() -> None:
    plan = plan_of({"a": row_named("W3A16_CHANNEL", "fp16"), "b": row_named("W4A16_CHANNEL", "fp16")}, "fp16")
    with pytest.raises(FormatError, match="36 inputs of 3 bits"):
        Gptq().check(plan, {"a": (32, 36), "b": (32, 32)}, {})
    with pytest.raises(FormatError, match="20 outputs of 3 bits"):
        AutoRound().check(plan, {"a": (20, 32), "b": (32, 32)}, {})
    with pytest.raises(FormatError, match="whole group"):
        Gptq().check(plan, {"a": (32, 32), "b": (32, 32)}, {"a": "ab", "b": "ab"})


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "packing_format": "auto_round:auto_gptq"}


@pytest.mark.parametrize(
    ("format", "config", "words"),
    [
        (Gptq(), GPTQ | {"lm_head": True}, "output head"),
        (Gptq(), GPTQ | {"bits": 5}, "bits 5"),
        (Gptq(), GPTQ | {"sym": False}, "gptq_v2"),
        (Gptq(), GPTQ | {"checkpoint_format": "marlin"}, "marlin"),
        (Awq(), {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemv"}, "gemv"),
        (AutoRound(), AUTO | {"data_type": "mx_fp"}, "mx_fp"),
        (AutoRound(), AUTO | {"act_bits": 8}, "act_bits 8"),
        (AutoRound(), AUTO | {"packing_format": "auto_round:marlin"}, "marlin"),
    ],
)
def test_other_programs_files_that_no_plan_says_are_refused(format: Format, config: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        format.parse(config, ["model.layers.0.q", "lm_head"])


def test_other_programs_words_for_the_same() -> None:
    linears = ["model.layers.0.q", "model.layers.1.q", "lm_head"]
    kept = GPTQ | {"dynamic": {r"-:.*layers\.0": {}, r"+:model\..*": {"bits": 8, "group_size": -1}}}
    found = Gptq().parse(kept, linears)
    assert found.linears == {
        "model.layers.0.q": LayerPlan(),
        "model.layers.1.q": row_named("W8A16_CHANNEL", "fp16"),
        "lm_head": LayerPlan(),
    }
    extra = {"block_name_to_quantize": "model.layers", "extra_config": {r".*\.1\..*": {"bits": 16}}}
    assert list(AutoRound().parse(AUTO | extra, linears).quantized) == ["model.layers.0.q"]


def test_asymmetric_codes_of_four_bits_as_the_auto_round_package_writes_them() -> None:
    row, config = row_named("W4A16_ASYM", "fp16"), AUTO | {"sym": False, "packing_format": "auto_round:auto_awq"}
    assert AutoRound().parse(config, ["model.layers.0.q"]).linears == {"model.layers.0.q": row}
    layer = layer_of(row, "fp16")
    decoded = AutoRound().decode(Awq().encode(layer, row, "fp16"), row, (ROWS, COLUMNS))
    assert facts(decoded.weight) == facts(layer.weight)
    with pytest.raises(FormatError, match="auto_awq"):
        AutoRound().parse(config | {"bits": 8}, ["model.layers.0.q"])


def test_files_that_belong_to_another_configuration_are_found() -> None:
    row, shape = row_named("W4A16", "fp16"), (ROWS, COLUMNS)
    stored = Gptq().encode(layer_of(row, "fp16"), row, "fp16")
    with pytest.raises(CheckpointError, match="desc_act"):
        Gptq().decode(stored | {"g_idx": stored["g_idx"].flip(0)}, row, shape)
    with pytest.raises(CheckpointError, match="symmetric"):
        Gptq().decode(stored | {"qzeros": stored["qzeros"] - 1}, row, shape)
    with pytest.raises(CheckpointError, match="scales"):
        Gptq().decode(stored | {"scales": stored["scales"].float()}, row, shape)


@pytest.mark.parametrize(("format", "scheme"), [("gptq", "W4A16"), ("awq", "W4A16G32_ASYM"), ("auto-round", "W3A16G32")])
def test_from_a_model_to_a_model_and_from_format_to_format(format: str, scheme: str, tmp_path: Path) -> None:
    quantized(tmp_path / "q", formats=("native", format), scheme=scheme, rotate="R1,R2")
    folder = tmp_path / "q" / format
    assert json.loads((folder / "config.json").read_bytes())["dtype"] == "float16"
    report = json.loads((folder / "report.json").read_bytes())
    assert any("hold scales in" in note for note in report["notes"])
    x = torch.tensor([[5, 9, 4]])
    assert torch.equal(bitlathe.load(folder)(x).logits, bitlathe.load(tmp_path / "q" / "native")(x).logits)
    for name in ("report.json", "plan.json"):
        (folder / name).unlink()
    bitlathe.convert(folder, out=tmp_path / "native")
    bitlathe.convert(tmp_path / "native", out=tmp_path / "back", formats=format)
    assert tensors(tmp_path / "back") == tensors(folder)


def test_a_dtype_that_the_readers_do_not_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="--dtype fp16"):
        quantized(tmp_path / "q", formats="gptq", dtype="bf16")
