"""Models with experts, from end to end: experts that no token reached, routers, and who reads the folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import bitlathe
import bitlathe.hf
from bitlathe.errors import FormatError, PlanError
from bitlathe.model.block import Block
from bitlathe.recipe import merge
from bitlathe.report import BlockReport, Note, inspect
from families import save_model, write_text
from test_pipeline import KILLED, content, listen_to
from test_rotated import Frozen, said, same

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"samples": 6, "seqlen": 24, "batch_size": 2, "iters": 3, "scheme": "W4A16G32", "tuner": "rtn"}
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "moe_intermediate_size": 64}
# Six tokens in all, each of which chooses one expert of twelve.
STARVED: dict[str, Any] = {"num_experts": 12, "num_experts_per_tok": 1, "decoder_sparse_step": 1}
FEW: dict[str, Any] = {"samples": 2, "seqlen": 3, "batch_size": 1}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 400)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("tuner", ["rtn", "signround"])
@pytest.mark.parametrize("scheme", ["W4A16G32_ASYM", "NVFP4", "W8A8_STATIC"])
def test_experts_that_no_token_reached(tmp_path: Path, text: Path, tuner: str, scheme: str) -> None:
    """They are rounded to nearest, and the run says so."""
    save_model(tmp_path / "m", "qwen3_moe", **STARVED)
    recipe: dict[str, Any] = {"model": str(tmp_path / "m"), "calib": str(text)} | SMALL | FEW | {"scheme": scheme}
    plain = recipe | {"out": tmp_path / "plain", "tuner": "rtn", "rtn": {"scale": "min-max"}}
    reports = listen_to(merge(recipe | {"out": tmp_path / "q", "tuner": tuner}), BlockReport)
    assert all(report.note and "no token of the calibration text reached" in report.note for report in reports[:2])
    assert all(report.loss_after is not None and report.loss_after < 1e9 for report in reports[:2])
    run = listen_to(merge(plain), BlockReport)
    assert all(report.note is None for report in run)
    ours, theirs = (tensors_in(tmp_path / folder) for folder in ("q", "plain"))
    assert all(torch.isfinite(tensor).all() for tensor in ours.values() if tensor.is_floating_point())
    weights = [name for name in ours if ".experts." in name and name.endswith("proj.weight")]
    assert len(weights) == 2 * 12 * 3
    if tuner == "signround":
        same_codes = [name for name in weights if torch.equal(ours[name], theirs[name])]
        assert len(same_codes) >= 2 * 6 * 3  # six tokens reach six experts a block at most
    if scheme == "W8A8_STATIC":
        scales = {ours[f"model.layers.0.mlp.experts.{number}.up_proj.input_scale"].item() for number in range(12)}
        assert len(scales) == 1
        assert scales != {ours["model.layers.0.mlp.experts.0.down_proj.input_scale"].item()}


def test_draws_of_signs_with_few_tokens(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m", "qwen3_moe", **STARVED)
    asked = SMALL | FEW | {"scheme": "W4A4", "rotate": "R1:random,R4:random", "rotation_trials": 2}
    plan = bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **asked)
    assert plan.linears["model.layers.0.mlp.experts.11.down_proj"].online is not None
    costs = {rotation["name"]: rotation for rotation in inspect(tmp_path / "q")["rotations"]}
    # A token goes through one expert of twelve in each of two blocks: 32 numbers, read and written in 16 bits.
    assert (costs["R4"]["linears"], costs["R4"]["bytes"]) == (2 * 12, 2 * 4 * 32)


def test_one_tensor_wide_scale_for_all_experts(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "m", "qwen2_moe", **WIDE)
    seen: list[dict[str, float]] = []
    peaks = Block.peaks

    def watched(self: Block, names: Any) -> Any:
        found = peaks(self, names)
        seen.append({name: peak.item() for name, peak in found.items()})
        return found

    monkeypatch.setattr(Block, "peaks", watched)
    asked = SMALL | {"scheme": "NVFP4A16", "smooth": False}
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **asked)
    weights = tensors_in(tmp_path / "m")
    for block, found in enumerate(seen[:2]):
        mlp = f"model.layers.{block}.mlp"
        for group in (f"{mlp}.experts.", f"{mlp}.shared_expert.down_proj"):
            peak = max(tensor.abs().max().item() for name, tensor in weights.items() if name.startswith(group))
            assert {value for name, value in found.items() if name.startswith(group)} == {peak}


def test_routers_are_never_quantized(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m", "qwen2_moe")
    asked = {"calib": str(text), **SMALL, "rtn": {"scale": "min-max"}}
    plan = bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", **asked | {"overrides": {"*.mlp.*": "W8A16G32"}})
    routers = {f"model.layers.{block}.mlp.{name}" for block in (0, 1) for name in ("gate", "shared_expert_gate")}
    assert set(plan.linears) - set(plan.quantized) == {*routers, "lm_head"}
    kept = {row["name"]: row["kept"] for row in inspect(tmp_path / "q")["linears"] if row["kept"]}
    assert {name for name, reason in kept.items() if "routers" in reason} == routers
    with pytest.raises(PlanError, match=r"mlp\.gate"):
        bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "again", **asked | {"overrides": {"*.mlp.gate": "W8A16G32"}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.experts.1.*": "W8A16G32"}, r"different schemes for model\.layers\.0\.mlp\.experts\."),
        ({"*.experts.*": "W4A16G32_ASYM"}, "zero points"),
        ({"*": "W4A16G32_ASYM"}, r"zero points of experts.*symmetric"),
    ],
)
def test_what_compressed_tensors_cannot_hold(tmp_path: Path, overrides: dict[str, str], message: str) -> None:
    save_model(tmp_path / "m", "olmoe")
    asked = SMALL | {"overrides": overrides | {"lm_head": "keep"}, "formats": "compressed-tensors"}
    with pytest.raises(FormatError, match=message):
        bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", **asked)
    assert not (tmp_path / "q").exists()


SCHEMES = ("W4A16G32", "W4A4", "W8A8", "FP8_DYNAMIC", "MXFP8", "NVFP4", "W8A8_STATIC")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded_are_what_was_frozen(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """With the shared expert, which transformers gives a matrix of tokens, and not a batch."""
    save_model(tmp_path / "m", "qwen2_moe", **WIDE)
    frozen = Frozen(monkeypatch)
    formats = ("native", "compressed-tensors")
    asked = SMALL | {"scheme": scheme, "tuner": "signround", "rotate": "R1,R2,R4", "formats": formats}
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **asked)
    in_memory = said(frozen.model())
    for format in formats:
        assert same(said(bitlathe.load(tmp_path / "q" / format, "cpu")), in_memory), format
        assert same(said(AutoModelForCausalLM.from_pretrained(tmp_path / "q" / format)), in_memory), format


ALONE = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[2])
torch.save(AutoModelForCausalLM.from_pretrained(sys.argv[1])(tokens, use_cache=False).logits.detach(), sys.argv[2])
"""


@pytest.mark.parametrize(
    ("scheme", "overrides", "read"),
    [
        ("W4A16G32", {}, True),
        ("W3A16_CHANNEL", {}, True),
        ("FP8_CHANNEL", {}, True),
        ("FP8_TENSOR", {}, True),
        ("MXFP4A16", {}, True),
        ("FP8_CHANNEL", {"*.experts.*": "W8A16G32"}, True),
        ("W8A8", {"*.experts.*": "W4A16G32"}, True),
        ("NVFP4A16", {}, False),
        ("W4A4", {}, False),
        ("W8A8", {}, False),
        ("W4A16G32", {"*.experts.*": "keep"}, False),
        ("W4A16G32", {"*.1.mlp.experts.*": "W8A16G32"}, False),
    ],
)
def test_transformers_alone(tmp_path: Path, text: Path, scheme: str, overrides: dict[str, str], read: bool) -> None:  # noqa: FBT001
    """It reads experts as they are, or the run and the card say that it does not."""
    save_model(tmp_path / "m", "qwen3_moe", decoder_sparse_step=1, **WIDE)
    asked = {"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), "formats": "compressed-tensors"}
    notes = listen_to(merge(asked | SMALL | {"scheme": scheme, "overrides": overrides}), Note)
    card = (tmp_path / "q" / "README.md").read_text()
    tokens = torch.arange(3, 23)[None]
    torch.save(tokens, tmp_path / "said.pt")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "q"), str(tmp_path / "said.pt")]
    stopped = subprocess.run(command, check=False, capture_output=True).returncode != 0
    with torch.no_grad():
        expected = bitlathe.load(tmp_path / "q", "cpu")(tokens, use_cache=False).logits
        taught = AutoModelForCausalLM.from_pretrained(tmp_path / "q")(tokens, use_cache=False).logits
    assert torch.equal(taught, expected)
    assert (not stopped and torch.equal(torch.load(tmp_path / "said.pt"), expected)) == read
    assert any("transformers alone does not read the experts" in note.text for note in notes) != read
    assert ("import bitlathe.hf" in card) != read


@pytest.mark.parametrize("dense", ["W4A16G32", "keep"])
def test_a_dense_block_beside_experts(tmp_path: Path, text: Path, dense: str) -> None:
    """The names of its gate and up are a pattern, which transformers reads too."""
    save_model(tmp_path / "m", "qwen3_moe", **WIDE)
    overrides = {"*.experts.*": "W8A16G32", "*.mlp.gate_proj": dense, "*.mlp.up_proj": dense}
    asked = SMALL | {"scheme": "FP8_CHANNEL", "overrides": overrides, "formats": ("native", "compressed-tensors")}
    plan = bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **asked)
    config = json.loads((tmp_path / "q" / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    names = [*config["ignore"], *(name for group in config["config_groups"].values() for name in group["targets"])]
    assert [name for name in names if name.startswith("re:")] == [r"re:model\.layers\.0\.mlp\.(gate|up|gate_up)_proj$"]
    assert len({plan.linears[f"model.layers.0.mlp.{own}_proj"] for own in ("gate", "up")}) == 1
    tokens = torch.arange(3, 23)[None]
    torch.save(tokens, tmp_path / "said.pt")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "q" / "compressed-tensors"), str(tmp_path / "said.pt")]
    subprocess.run(command, check=True, capture_output=True)
    with torch.no_grad():
        expected = bitlathe.load(tmp_path / "q" / "native", "cpu")(tokens, use_cache=False).logits
        ours = bitlathe.load(tmp_path / "q" / "compressed-tensors", "cpu")(tokens, use_cache=False).logits
    assert torch.equal(ours, expected)
    assert torch.equal(torch.load(tmp_path / "said.pt"), expected)


def test_a_run_that_is_killed_and_continued(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m", "qwen3_moe", num_hidden_layers=3)
    asked = SMALL | {"scheme": "W4A4", "tuner": "signround", "rotate": "hadamard"}
    recipe = {"model": str(tmp_path / "m"), "calib": str(text), **asked}
    listen_to(merge(recipe | {"out": tmp_path / "whole"}))
    recipe |= {"out": str(tmp_path / "q")}
    died = subprocess.run([sys.executable, "-c", KILLED, json.dumps(recipe), "2", "after"], check=False)
    assert died.returncode == -9
    blocks = listen_to(merge(recipe), BlockReport)
    assert [block.resumed for block in blocks] == [True, True, False, False]
    assert content(tmp_path / "q") == content(tmp_path / "whole")


def test_dense_and_evaluated(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m", "olmoe")
    formats = ("native", "dense")
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **SMALL | {"formats": formats})
    found = [
        bitlathe.evaluate(tmp_path / "q" / format, against=tmp_path / "m", text=str(text), seqlen=24, windows=4, device="cpu")
        for format in formats
    ]
    assert found[0]["perplexity"] == found[1]["perplexity"]
    assert 0 < found[0]["kl_mean"]["value"] < 1
