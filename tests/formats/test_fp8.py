"""Folders of the fp8 method: to the byte, by their configuration, as transformers reads them, and as the native folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import bitlathe
from bitlathe.errors import CheckpointError, FormatError
from bitlathe.formats.base import QuantLayer
from bitlathe.formats.fp8 import Fp8
from bitlathe.numerics.project import QuantTensor, dequantize
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import KV_SCHEMES, SCHEMES
from bitlathe.plan import LayerPlan
from bitlathe.readers import READERS
from families import VOCABULARY, save_model, write_text
from format_samples import TURNED, Dtype, bits_of, layer_of, plan_of, row_named
from quantized_folder import DTYPES, LLAMA, TOKENS, make, random_model
from test_convert import tensors

pytestmark = pytest.mark.usefixtures("one_thread")

FP8 = Fp8()
ROW = row_named("FP8_BLOCK_DYNAMIC", "bf16")
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
EXPERTS: dict[str, Any] = WIDE | {"moe_intermediate_size": 128}


def test_bytes() -> None:
    """Codes are the bytes of E4M3, and a scale is what its block is multiplied by."""
    assert ROW.weight is not None and ROW.weight.scale is not None
    codes = torch.zeros(128, 256, dtype=torch.uint8)
    codes[0, :3], codes[127, 255] = torch.tensor([0x38, 0xB8, 0x7E]), 0x01  # 1, -1, 448, 2^-9
    scale = QuantTensor(ROW.weight.scale, (1, 2), torch.tensor([[0.1, 3.0]]))
    q = QuantTensor(ROW.weight, (128, 256), codes.view(torch.float8_e4m3fn), scale)
    stored = FP8.encode(QuantLayer(q), ROW, "bf16")
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in stored.items()} == {
        "weight": (torch.float8_e4m3fn, [128, 256]),
        "weight_scale_inv": (torch.float32, [1, 2]),
    }
    assert torch.equal(stored["weight"].view(torch.uint8), codes)
    weight = dequantize(FP8.decode(stored, ROW, (128, 256)).weight, torch.float32)
    tenth = torch.tensor(0.1)
    assert torch.equal(weight[0, :3], torch.stack([tenth, -tenth, tenth * 448]))
    assert weight[127, 255].item() == 3 * 2**-9


def test_scales_in_16_bits_are_read_as_they_are() -> None:
    stored = FP8.encode(layer_of(ROW, "bf16", shape=(128, 256)), ROW, "bf16")
    stored["weight_scale_inv"] = stored["weight_scale_inv"].bfloat16()
    scale = FP8.decode(stored, ROW, (128, 256)).weight.scale
    assert scale is not None and torch.equal(scale.codes, stored["weight_scale_inv"].float())
    with pytest.raises(CheckpointError, match=r"weight_scale_inv' is .*float32 \[1, 2\]"):
        FP8.decode(stored | {"weight_scale_inv": torch.ones(2, 1)}, ROW, (128, 256))


def test_configuration() -> None:
    experts = [f"m.mlp.experts.{number}.up_proj" for number in (0, 1)]
    plan = plan_of({"m.q": ROW, "m.mlp.gate": None, **dict.fromkeys(experts), "lm_head": None})
    config = FP8.config(plan)
    assert config == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "fmt": "e4m3",
        "modules_to_not_convert": ["m.mlp.gate", *experts, "lm_head", "m.mlp.experts"],
    }
    linears = list(plan.linears)
    assert FP8.parse(config, linears) == plan
    # What others write: no list, or one that holds norms too, or the modules above linears.
    del config["modules_to_not_convert"]
    assert FP8.parse(config, ["m.q", "lm_head"]) == plan_of({"m.q": ROW, "lm_head": None})
    others = config | {"modules_to_not_convert": ["m.norm", "mlp.gate", "m.mlp.experts"], "dtype": "bfloat16"}
    assert FP8.parse(others, [*linears, "m.mlp.gate_proj"]).quantized.keys() == {"m.q", "m.mlp.gate_proj"}
    for said in (
        {"activation_scheme": "static"},
        {"weight_block_size": None},
        {"weight_block_size": [1, 32]},
        {"fmt": "e5m2"},
        {"scale_fmt": "ue8m0"},
        {"dtype": "float32"},
    ):
        with pytest.raises(FormatError, match=r"transformers"):
            FP8.parse(config | said, ["m.q"])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (row_named("FP8_BLOCK", "bf16"), "FP8_BLOCK: .*choose FP8_BLOCK_DYNAMIC"),
        (LayerPlan(weight=ROW.weight), "choose FP8_BLOCK_DYNAMIC"),
        (row_named("FP8_DYNAMIC", "bf16"), "FP8_DYNAMIC: .*choose FP8_BLOCK_DYNAMIC"),
        (LayerPlan(weight=SCHEMES["FP8_BLOCK"], input=ROW.input), "E4M3 in groups of 128: .*choose FP8_BLOCK_DYNAMIC"),
        (LayerPlan(input=ROW.input), "a kept weight with activations"),
        (ROW.model_copy(update={"clip": 0.9}), "--act-clip 1"),
        (ROW.model_copy(update={"online": TURNED}), "leave that rotation out"),
    ],
)
def test_rows_that_are_refused(row: LayerPlan, told: str) -> None:
    plan = plan_of({"a": row, "b": ROW})
    with pytest.raises(FormatError, match=f"fp8 cannot hold .*{told}.*native format"):
        FP8.check(plan, {"a": (128, 128), "b": (128, 128)}, {})


def test_plans_that_are_refused() -> None:
    plan, shapes = plan_of({"a": ROW, "b": None}), {"a": (256, 128), "b": (256, 128), "lm_head": (256, 128)}
    for refused, told in (
        (plan_of({"a": None}), "quantizes nothing: write the dense"),
        (plan.model_copy(update={"kv": KV_SCHEMES["KV4"]}), "--kv"),
        (plan.model_copy(update={"rotations": (Rotation(space="qk", block=32),)}), "R3"),
        (plan_of({"lm_head": ROW}), "the output head"),
        (plan_of({"model.embed_tokens": ROW}), "embeddings"),
    ):
        with pytest.raises(FormatError, match=told):
            FP8.check(refused, shapes, {})
    with pytest.raises(FormatError, match="different schemes for a, b"):
        FP8.check(plan, shapes, {"a": "ab", "b": "ab"})


@pytest.mark.parametrize(("rows", "fits"), [(3, True), (64, True), (128, True), (160, False), (192, False), (384, True)])
def test_rows_that_transformers_would_cut_otherwise(rows: int, fits: bool) -> None:  # noqa: FBT001
    """Its own function is asked what it makes of the blocks."""
    layer, plan = layer_of(ROW, "bf16", shape=(rows, 256)), plan_of({"a": ROW})
    theirs = Fp8Dequantize(None).convert(FP8.encode(layer, ROW, "bf16"))["weight"]
    assert torch.equal(theirs, dequantize(layer.weight, torch.float32)) == fits
    if fits:
        FP8.check(plan, {"a": (rows, 256)}, {})
        return
    with pytest.raises(FormatError, match=f"{rows} outputs are no multiple of 128"):
        FP8.check(plan, {"a": (rows, 256)}, {})


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_reads_the_weights(tmp_path: Path, dtype: Dtype) -> None:
    """Bit for bit; of activations its loader on a CPU knows nothing."""
    model = random_model(LLAMA, DTYPES[dtype])
    rows = {name: ROW for name in FP8.parse(FP8.config(plan_of({"a": ROW})), linears_in(model)).quantized}
    rows |= {"model.layers.1.self_attn.o_proj": LayerPlan()}
    made = make(tmp_path, FP8, model, plan_of(rows | {"lm_head": None}, dtype))
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert len(made.weights) == 13
    for name, expected in made.weights.items():
        assert bits_of(read.get_parameter(f"{name}.weight")) == bits_of(expected), name
    with torch.no_grad():
        assert torch.equal(read(TOKENS).logits, made.logits)


def linears_in(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("experts", ["quantized", "kept"])
def test_experts(tmp_path: Path, experts: str) -> None:
    """transformers fuses them, from codes and from floats; ours rounds their activations too."""
    save_model(tmp_path / "m", "qwen3_moe", **EXPERTS)
    text = write_text(tmp_path / "text.txt", 400)
    overrides = {"*.experts.*": "keep"} if experts == "kept" else {}
    asked: dict[str, Any] = {"scheme": "FP8_BLOCK_DYNAMIC", "overrides": overrides, "tuner": "rtn", "samples": 2, "seqlen": 24}
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), formats="native,fp8,dense", **asked)
    tokens = torch.arange(3, 23)[None]
    native, ours = (bitlathe.load(tmp_path / "q" / name, "cpu") for name in ("native", "fp8"))
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q" / "fp8", dtype="auto", quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, native(tokens).logits)
        theirs = read.get_parameter("model.layers.1.mlp.experts.down_proj")[2]
        name = "model.layers.1.mlp.experts.2.down_proj"
        identity = torch.eye(128, dtype=torch.bfloat16)
        # An identity is rounded to itself.
        assert torch.equal(native.get_submodule(name)(identity).T, theirs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_folder_is_the_native_one(tmp_path: Path, dtype: str) -> None:
    """With activations rounded, and back again by convert, to the byte."""
    save_model(tmp_path / "m", **WIDE)
    text = write_text(tmp_path / "text.txt", 400)
    asked: dict[str, Any] = {"overrides": {"*.o_proj": "keep"}, "tuner": "rtn", "samples": 4, "seqlen": 24, "dtype": dtype}
    asked |= {"scheme": "FP8_BLOCK_DYNAMIC", "rotate": "R1,R2", "calib": str(text), "formats": "native,fp8"}
    plan = bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", **asked)
    assert len(plan.quantized) == 12
    tokens = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    native, fp8 = (bitlathe.load(tmp_path / "q" / name, "cpu") for name in ("native", "fp8"))
    with torch.no_grad():
        assert bits_of(native(tokens).logits) == bits_of(fp8(tokens).logits)
    for source, format in (("native", "fp8"), ("fp8", "native")):
        bitlathe.convert(tmp_path / "q" / source, out=tmp_path / source, formats=format)
        assert tensors(tmp_path / source) == tensors(tmp_path / "q" / format)
        for name in ("config.json", "plan.json"):
            assert (tmp_path / source / name).read_bytes() == (tmp_path / "q" / format / name).read_bytes()
    report = json.loads((tmp_path / "q" / "fp8" / "report.json").read_bytes())
    assert any("keeps activations in 16 bits" in note for note in report["notes"])


def test_verify_asks_transformers(tmp_path: Path) -> None:
    """Whose weights are the codes', and whose logits are ours where activations are not rounded either."""
    asked = {"scheme": "FP8_BLOCK_DYNAMIC", "tuner": "rtn", "calib": "builtin", "seqlen": 64, "samples": 2}
    bitlathe.quantize("builtin", out=tmp_path / "q", formats="fp8", **asked)
    result = bitlathe.verify(tmp_path / "q")
    found = {row["reader"]: (row["linears"], row["unequal"], row["same"]) for row in result["readers"]}
    assert found == {"bitlathe": (28, 0, True), "transformers for fp8": (28, 0, True)}
    assert result["readers"][1]["kl"] <= READERS["transformers for fp8"].most
