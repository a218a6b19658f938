"""Dense folders of models that do more than their weights say: read by those who know, and nobody else runs them wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import bitlathe
import bitlathe.hf
from bitlathe.errors import CheckpointError, FormatError
from bitlathe.model.layers import QuantLinear
from bitlathe.recipe import merge
from bitlathe.report import Note, inspect
from families import save_model, write_text
from frozen import Frozen
from test_pipeline import listen_to
from test_rotated import said, same

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"samples": 6, "seqlen": 24, "batch_size": 2, "iters": 3}
ASKED: dict[str, Any] = SMALL | {"tuner": "rtn", "formats": ("native", "dense")}

# transformers before it has been told of the format, then all who read it.
FRESH = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
try:
    AutoModelForCausalLM.from_pretrained(folder / "dense")
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error) or "conversion of the weights" in str(error), error
else:
    raise SystemExit("transformers alone loaded what it cannot run")
import bitlathe, bitlathe.hf
from test_rotated import said
read = [bitlathe.load(folder / name, "cpu") for name in ("native", "dense")]
read.append(AutoModelForCausalLM.from_pretrained(folder / "dense"))
torch.save([said(model) for model in read], sys.argv[2])
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 400)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A4, R4 online": ("llama", {"scheme": "W4A4", "rotate": "R1,R2,R4", "tuner": "signround"}),
    "R1 online": ("gemma2", {"scheme": "W4A4", "rotate": "R1,R2,R4"}),
    "only inputs of down_proj": ("qwen2", {"scheme": "W8A16G32", "rotate": "R4"}),
    "some experts": ("olmoe", {"scheme": "W8A16G32", "overrides": {"*.experts.1.*": "W8A8_STATIC"}}),
}


@pytest.mark.parametrize(("family", "asked"), CASES.values(), ids=CASES)
def test_in_a_fresh_process(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, family: str, asked: dict[str, Any]
) -> None:
    save_model(tmp_path / "m", family)
    frozen = Frozen(monkeypatch)
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **ASKED | asked)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FRESH, str(tmp_path / "q"), str(tmp_path / "said.pt")]
    subprocess.run(command, check=True, env=environment)
    in_memory = said(frozen.model())
    for model in torch.load(tmp_path / "said.pt"):
        assert same(model, in_memory)
    assert not same(in_memory, said(bitlathe.load(tmp_path / "m", "cpu")))


SCHEMES = ("W4A4", "W4A8", "W8A8", "W8A8_STATIC", "FP8_DYNAMIC", "FP8_STATIC", "MXFP4", "MXFP8", "NVFP4")


@pytest.mark.parametrize(
    ("scheme", "dtype"), [*((scheme, "bf16") for scheme in SCHEMES), ("W8A8_STATIC", "fp16"), ("MXFP4", "fp16")]
)
def test_every_scheme_with_activations(tmp_path: Path, text: Path, scheme: str, dtype: str) -> None:
    save_model(tmp_path / "m", "qwen2", hidden_size=128, intermediate_size=256, head_dim=32)
    asked = ASKED | {"scheme": scheme, "dtype": dtype, "rotate": "R1,R2"}
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **asked)
    native, dense = (said(bitlathe.load(tmp_path / "q" / format, "cpu")) for format in ("native", "dense"))
    assert same(native, dense)
    assert same(native, said(AutoModelForCausalLM.from_pretrained(tmp_path / "q" / "dense")))


DOWN, UP, GATE = (f"model.layers.1.mlp.{name}_proj" for name in ("down", "up", "gate"))
MIXED: dict[str, Any] = {
    "scheme": "W4A16G32",
    "rotate": "R1,R2,R4",
    "overrides": {"*.up_proj": "INT8", "*.gate_proj": "INT4", "lm_head": "keep"},
}


@pytest.fixture
def mixed(tmp_path: Path, text: Path) -> Path:
    """The dense folder, beside the native one, of weights alone, weights that are turned, and activations."""
    save_model(tmp_path / "m")
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **ASKED | MIXED)
    return tmp_path / "q" / "dense"


def test_linears_of_which_only_the_weight_is_quantized_are_ordinary(mixed: Path) -> None:
    tensors = {name: tensor for file in mixed.glob("*.safetensors") for name, tensor in load_file(file).items()}
    native, dense = bitlathe.load(mixed.parent / "native", "cpu"), bitlathe.load(mixed, "cpu")
    ordinary = [name for name, module in native.named_modules() if isinstance(module, nn.Linear)]
    ordinary = [name for name in ordinary if not name.endswith(("down_proj", "up_proj", "gate_proj"))]
    assert len(ordinary) == 2 * 4 + 1
    for name in ordinary:
        weight = native.get_parameter(f"{name}.weight")
        assert torch.equal(tensors[f"{name}.weight"], weight)
        assert type(dense.get_submodule(name)) is nn.Linear
    for name in (DOWN, UP, GATE):
        weight = native.get_parameter(f"{name}.weight")
        assert torch.equal(tensors[f"{name}.weight"], weight.view(torch.int16).flatten())
        assert isinstance(dense.get_submodule(name), QuantLinear)
    stored = json.loads((mixed / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "bitlathe"
    assert sorted(stored["kept"]) == sorted(ordinary)
    assert all(group["scheme"] == {"grid": "BF16"} for group in stored["groups"])
    assert [rotation["space"] for rotation in stored["rotations"]] == ["residual", "value", "mid"]


def test_what_inspect_says(mixed: Path) -> None:
    found = inspect(mixed)
    rows = {row["name"]: row for row in found["linears"]}
    assert found["format"] == "dense"
    assert [rows[name]["scheme"] for name in (DOWN, UP, GATE, "lm_head")] == ["W4A16G32", "W8A8", "W4A4", None]
    assert (rows[GATE]["bits"], rows[GATE]["activations"]) == (16, "INT4 per token")
    assert found["bits_quantized"] == found["bits_linears"] == found["bits_checkpoint"] == 16
    assert [rotation["online"] for rotation in found["rotations"]] == [False, False, True]
    (mixed / "report.json").unlink()
    found = inspect(mixed)
    rows = {row["name"]: row for row in found["linears"]}
    assert [rows[name]["scheme"] for name in (DOWN, UP)] == ["BF16", "BF16 with INT8 per token"]
    assert found["quantized"] == 2 * 3
    assert found["bits_quantized"] == 16


def test_it_is_evaluated_as_what_it_is(mixed: Path, text: Path) -> None:
    asked: dict[str, Any] = {"text": str(text), "seqlen": 24, "windows": 4, "device": "cpu"}
    found = [
        bitlathe.evaluate(mixed.parent / format, against=mixed.parent.parent / "m", **asked) for format in ("native", "dense")
    ]
    assert found[0]["kl_mean"] == found[1]["kl_mean"] and found[0]["kl_mean"]["value"] > 0
    assert found[0]["perplexity"] == found[1]["perplexity"]


def test_it_is_neither_saved_nor_quantized_again(mixed: Path, text: Path, tmp_path: Path) -> None:
    for model in (bitlathe.load(mixed, "cpu"), AutoModelForCausalLM.from_pretrained(mixed)):
        with pytest.raises(FormatError, match=f"Copy the files of {mixed} instead"):
            model.save_pretrained(tmp_path / "again")
    with pytest.raises(CheckpointError, match=f"{mixed} is quantized already"):
        bitlathe.quantize(str(mixed), out=tmp_path / "again", calib=str(text), **ASKED)


@pytest.mark.parametrize(
    ("asked", "alone"),
    [
        ({"scheme": "W4A16G32", "rotate": "R1,R2"}, True),
        ({"scheme": "W4A16G32", "rotate": "R1,R4"}, False),
        ({"scheme": "INT8"}, False),
    ],
)
def test_who_reads_it_is_told(tmp_path: Path, text: Path, asked: dict[str, Any], *, alone: bool) -> None:
    save_model(tmp_path / "m")
    recipe = {"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text)} | ASKED | asked
    notes = listen_to(merge(recipe | {"formats": "fake"}), Note)
    card = (tmp_path / "q" / "README.md").read_text()
    assert any("transformers alone stops at them" in note.text for note in notes) != alone
    assert ("import bitlathe.hf  #" in card) != alone
    assert f"library_name: {'transformers' if alone else 'bitlathe'}" in card
    assert "[!WARNING]" not in card
    assert ("quantization_config" in json.loads((tmp_path / "q" / "config.json").read_text())) != alone
