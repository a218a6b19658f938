"""Checkpoints that their makers publish in FP8 are originals: what is made of one is what is made of its floats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitlathe
from bitlathe.errors import CheckpointError
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.dequantized import Dequantized, as_original
from families import save_model, write_text
from test_convert import tensors

pytestmark = pytest.mark.usefixtures("one_thread")

# Keys and values have 192 rows: the last block of them is ragged.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 96}
SAID: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
SMALL: dict[str, Any] = {"tuner": "rtn", "samples": 4, "seqlen": 24}
Q = "model.layers.0.self_attn.q_proj.weight"


def in_blocks(weight: Tensor, side: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and the float32 weight that they are, block by block."""
    rows, columns = weight.shape
    codes, floats = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    scales = torch.empty(-(-rows // side), -(-columns // side))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side)
            scales[i, j] = weight[at].abs().max().float() / 448
            codes[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
            floats[at] = codes[at].float() * scales[i, j]
    return codes, scales, floats


def publish(folder: Path, family: str = "llama", said: dict[str, Any] | None = None, **changes: Any) -> Path:
    """folder/fp8, a random model in FP8, and folder/floats, the same in float32; both are bfloat16 by their config.json."""
    save_model(folder / "floats", family, **WIDE | changes)
    shutil.copytree(folder / "floats", folder / "fp8")
    published: dict[str, Tensor] = {}
    floats = load_file(folder / "floats" / "model.safetensors")
    for name, tensor in dict(floats).items():
        published[name] = tensor
        if name.endswith("_proj.weight"):
            published[name], published[f"{name}_scale_inv"], floats[name] = in_blocks(tensor)
    save_file(floats, folder / "floats" / "model.safetensors", metadata={"format": "pt"})
    rewrite(folder / "fp8", published, SAID if said is None else said)
    return write_text(folder / "text.txt", 900)


def rewrite(folder: Path, published: dict[str, Tensor], said: dict[str, Any] | None = None) -> Path:
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"] = said or config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen3_moe", {"moe_intermediate_size": 128})])
def test_what_is_made_of_it_is_what_is_made_of_floats(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    text = publish(tmp_path, family, **changes)
    for source in ("fp8", "floats"):
        out = tmp_path / f"of-{source}"
        bitlathe.quantize(
            str(tmp_path / source), out=out, scheme="W4A16G32", calib=str(text), overrides={"*.o_proj": "keep"}, **SMALL
        )
    assert tensors(tmp_path / "of-fp8") == tensors(tmp_path / "of-floats")
    ours, theirs = (json.loads((tmp_path / f"of-{source}" / "config.json").read_bytes()) for source in ("fp8", "floats"))
    assert ours == theirs and ours["quantization_config"]["quant_method"] == "bitlathe"
    report = json.loads((tmp_path / "of-fp8" / "report.json").read_bytes())
    assert any("published in FP8" in note for note in report["notes"])


def test_evaluation_rotations_and_search_take_it_for_an_original(tmp_path: Path) -> None:
    text = publish(tmp_path)
    bitlathe.quantize(str(tmp_path / "fp8"), out=tmp_path / "q", scheme="W8A16G32", calib=str(text), rotate="R1,R2", **SMALL)
    measured: list[dict[str, Any]] = [
        bitlathe.evaluate(tmp_path / "q", against=tmp_path / source, text=str(text), seqlen=24) for source in ("fp8", "floats")
    ]
    assert [measure.pop("against") for measure in measured] == [str(tmp_path / source) for source in ("fp8", "floats")]
    assert measured[0] == measured[1]
    assert 0 < measured[0]["kl_mean"]["value"] < 1e-2
    fields: dict[str, Any] = {"calib": str(text), "seqlen": 24, "search": {"tokens": 240, "held_out": 120}}
    fields |= {"schemes": "W3A16G32,W8A16G32", "bits": 6.0}
    plans = [bitlathe.search(str(tmp_path / source), **fields) for source in ("fp8", "floats")]
    assert plans[0] == plans[1]


def test_as_a_model_it_is_codes(tmp_path: Path) -> None:
    """`load`, `inspect` and `convert` have the method's activations too."""
    text = publish(tmp_path)
    rows = {row["name"]: (row["scheme"], row["activations"]) for row in bitlathe.inspect(tmp_path / "fp8")["linears"]}
    assert rows[Q.removesuffix(".weight")] == ("FP8_BLOCK_DYNAMIC", "E4M3 in groups of 128")
    assert rows["lm_head"][0] is None
    bitlathe.convert(tmp_path / "fp8", out=tmp_path / "native")
    tokens = torch.arange(3, 23)[None]
    loaded = [bitlathe.load(tmp_path / name, "cpu")(tokens).logits for name in ("fp8", "native", "floats")]
    assert torch.equal(loaded[0], loaded[1]) and not torch.equal(loaded[0], loaded[2])
    assert bitlathe.evaluate(tmp_path / "fp8", against=tmp_path / "fp8", text=str(text), seqlen=24)["kl_mean"]["value"] > 0


@pytest.mark.parametrize(
    ("said", "scales"),
    [
        ({}, lambda scales: scales.bfloat16()),
        ({"scale_fmt": "ue8m0"}, lambda scales: scales.log2().ceil().exp2().to(torch.float8_e8m0fnu)),
        ({"weight_block_size": None, "activation_scheme": "static"}, lambda scales: scales.max()),
        ({"weight_block_size": [64, 32]}, lambda scales: scales.repeat_interleave(2, 0)[:3].repeat_interleave(4, 1)),
    ],
    ids=["bf16", "powers of two", "one a matrix", "other blocks"],
)
def test_other_scales(tmp_path: Path, said: dict[str, Any], scales: Any) -> None:
    publish(tmp_path)
    published = load_file(tmp_path / "fp8" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    for other in [key for key in published if key.endswith("_scale_inv")]:
        if other != f"{name}_scale_inv":
            weight = other.removesuffix("_scale_inv")
            published[weight] = published[weight].bfloat16()
            del published[other]
    published[f"{name}_scale_inv"] = scales(published[f"{name}_scale_inv"]).clone()
    published["model.layers.1.self_attn.k_proj.activation_scale"] = torch.tensor(0.5)
    checkpoint = as_original(Checkpoint(rewrite(tmp_path / "fp8", published, SAID | said)))
    assert not [key for key in checkpoint.header if "scale" in key]
    assert checkpoint.header[name].dtype == "F32" and "quantization_config" not in checkpoint.config
    spread = published[f"{name}_scale_inv"].float().reshape(-1, 1) if said.get("weight_block_size", 0) is None else None
    if spread is None:
        rows, columns = (SAID | said)["weight_block_size"]
        spread = published[f"{name}_scale_inv"].float().repeat_interleave(rows, 0)[:192].repeat_interleave(columns, 1)
    read = checkpoint.read([name, Q])
    assert torch.equal(read[name], published[name].float() * spread)
    assert torch.equal(read[Q], published[Q]) and list(read) == [name, Q]
    assert checkpoint.fingerprint() == Checkpoint(tmp_path / "fp8").fingerprint()


def test_weights_are_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, read = publish(tmp_path), Checkpoint.read
    seen: list[set[str]] = []

    def watched(self: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
        found = read(self, list(names))
        seen.append({name.split(".")[2] for name in found if name.startswith("model.layers.")})
        return found

    monkeypatch.setattr(Checkpoint, "read", watched)
    bitlathe.quantize(str(tmp_path / "fp8"), out=tmp_path / "q", scheme="W4A16G32", calib=str(text), **SMALL)
    assert set().union(*seen) == {"0", "1"} and max(map(len, seen)) == 1


@pytest.mark.parametrize(
    ("key", "tensor", "said", "told"),
    [
        (f"{Q}_scale_inv", None, {}, f"{Q} is in FP8, and there is no {Q}_scale_inv"),
        (f"{Q}_scale_inv", torch.ones(2, 1), {}, r"has scales F32 \[2, 1\], where its blocks need \[3, 1\]"),
        (f"{Q}_scale_inv", torch.ones(3, 1, dtype=torch.int8), {}, "has scales I8"),
        (Q, torch.ones(384, 64, dtype=torch.int8), {}, r"is I8 \[384, 64\] with scales"),
        ("lm_head.weight_scale_inv", torch.ones(1, 1), {}, r"lm_head\.weight is BF16"),
        (f"{Q}_scale_inv", torch.ones(3, 2), {"weight_block_size": [128, 96]}, "has 256 inputs, which are no multiple of 96"),
        (f"{Q}_scale_inv", torch.ones(3, 1), {"weight_block_size": 128}, "weight_block_size is 128"),
    ],
)
def test_what_cannot_be_dequantized_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, tensor: Tensor | None, said: dict[str, Any], told: str
) -> None:
    publish(tmp_path)
    published = load_file(tmp_path / "fp8" / "model.safetensors")
    if tensor is None:
        del published[key]
    else:
        published[key] = tensor
    rewrite(tmp_path / "fp8", published, SAID | said)
    monkeypatch.setattr(Checkpoint, "read", None)
    with pytest.raises(CheckpointError, match=told):
        bitlathe.quantize(str(tmp_path / "fp8"), out=tmp_path / "q", scheme="W4A16G32", **SMALL)
    assert not (tmp_path / "q").exists()


def test_results_of_ours_and_other_methods_are_no_originals(tmp_path: Path) -> None:
    text = publish(tmp_path, head_dim=32)
    asked = SMALL | {"calib": str(text), "formats": "fp8,gptq"}
    for name, scheme in (("fp8", "FP8_BLOCK_DYNAMIC"), ("gptq", "W4A16G32")):
        bitlathe.quantize(str(tmp_path / "floats"), out=tmp_path / name / "q", **asked | {"formats": name, "scheme": scheme})
        checkpoint = Checkpoint(tmp_path / name / "q")
        assert as_original(checkpoint) is checkpoint
        with pytest.raises(CheckpointError, match="quantized already"):
            bitlathe.quantize(str(tmp_path / name / "q"), out=tmp_path / "again", scheme="W4A16G32", **SMALL)
    (tmp_path / "fp8" / "q" / "report.json").unlink()
    assert isinstance(as_original(Checkpoint(tmp_path / "fp8" / "q")), Dequantized)
