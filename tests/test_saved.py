"""`save_pretrained` of what was loaded writes the same model, or refuses and names the folder to copy; R4 of the library."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitlathe
import bitlathe.hf
from bitlathe.errors import FormatError
from bitlathe.formats.base import Format
from bitlathe.formats.compressed_tensors import CompressedTensors
from bitlathe.formats.native import Native
from bitlathe.numerics import hadamard
from bitlathe.numerics.hadamard import turn_back
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import KV_SCHEMES, PRESETS
from bitlathe.plan import LayerPlan, Plan
from quantized_folder import LLAMA, TOKENS, make, random_model

pytestmark = pytest.mark.usefixtures("one_thread")

R1 = Rotation(space="residual", block=128)
R3 = Rotation(space="qk", block=32)
R4 = Rotation(space="mid", block=256, kind="hadamard")
BLOCKS = Rotation(space="mid", block=32, kind="hadamard")
FORMATS: dict[str, Format] = {"native": Native(), "compressed-tensors": CompressedTensors()}


def plan_of(scheme: str, *, online: Rotation | None = None, **more: Any) -> Plan:
    """Every linear but the head, those of the MLP's middle turned."""
    preset = PRESETS[scheme]
    rows = {
        name: LayerPlan(weight=preset.weight, input=preset.input, online=online if name.endswith("down_proj") else None)
        for name, module in random_model().named_modules()
        if isinstance(module, nn.Linear)
    }
    rotations = (*more.pop("rotations", ()), *([] if online is None else [online]))
    return Plan(linears=rows | {"lm_head": LayerPlan()}, rotations=rotations, **more)


# What a model does beyond its weights, and what the refusal calls it.
BEYOND = {
    "activations": (plan_of("W4A4"), "quantized activations"),
    "R4": (plan_of("W8A16", online=R4), "rotations that run online"),
    "R4 and activations": (plan_of("W8A8", online=R4), "quantized activations and its rotations that run online"),
    "R3": (plan_of("W8A16", rotations=(R3,)), "rotations that run online"),
    "cache": (plan_of("W8A16", kv=KV_SCHEMES["KV4"]), "quantized keys and values"),
}
HELD = [(name, format) for name in BEYOND for format in FORMATS if format == "native" or name not in ("R3", "cache")]


def folder_of(folder: Path, format: str, plan: Plan) -> Path:
    return make(folder, FORMATS[format], random_model(), plan).folder


def refuses(model: PreTrainedModel, message: str, tmp_path: Path) -> None:
    for saved in (model, copy.deepcopy(model)):
        with pytest.raises(FormatError, match=message):
            saved.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("name", "format"), HELD)
def test_what_weights_cannot_say_is_not_saved(name: str, format: str, tmp_path: Path) -> None:
    plan, called = BEYOND[name]
    folder = folder_of(tmp_path / "q", format, plan)
    model = bitlathe.load(folder, "cpu")
    place = re.escape(str(folder))
    refuses(model, f"the weights of {place} without its {called}, as .* Copy the files of {place} instead", tmp_path)
    torch.save(model, tmp_path / "pickled.pt")
    refuses(torch.load(tmp_path / "pickled.pt", weights_only=False), place, tmp_path)
    assert model.generate(TOKENS[:, :8], max_new_tokens=2, do_sample=False).shape == (2, 10)


@pytest.mark.parametrize("plan", [plan_of("W4A16"), plan_of("W4A16", rotations=(R1,))], ids=["plain", "folded"])
@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_what_weights_say_is_saved_dense(format: str, plan: Plan, tmp_path: Path) -> None:
    model = bitlathe.load(folder_of(tmp_path / "q", format, plan), "cpu")
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    for read in (AutoModelForCausalLM.from_pretrained(tmp_path / "again"), bitlathe.load(tmp_path / "again", "cpu")):
        assert torch.equal(read(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("online", [R4, BLOCKS], ids=["R4", "blocks"])
@pytest.mark.parametrize("scheme", ["W8A16", "W4A4"])
def test_transformers_does_not_save_what_it_would_lose(scheme: str, online: Rotation, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "q", "compressed-tensors", plan_of(scheme, online=online))
    model = AutoModelForCausalLM.from_pretrained(folder)
    place = re.escape(str(folder))
    refuses(model, f"write {place} without its transform_config.* Copy the files of {place} instead", tmp_path)


@torch.no_grad()
def test_transformers_saves_what_it_does_not_lose(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of(tmp_path / "q", "compressed-tensors", plan_of("W8A8")))
    model.save_pretrained(tmp_path / "again")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(read(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("name", ["activations", "R4", "R3", "cache"])
def test_transformers_does_not_save_the_native_format(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "q", "native", BEYOND[name][0])
    refuses(AutoModelForCausalLM.from_pretrained(folder), f"Copy the files of {re.escape(str(folder))} instead", tmp_path)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("read", [lambda folder: bitlathe.load(folder, "cpu"), AutoModelForCausalLM.from_pretrained])
def test_adapters_may_be_saved(
    read: Callable[[Path], PreTrainedModel], format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers goes on, to write adapters alone, where a quantizer says no without raising."""
    model = read(folder_of(tmp_path / "q", format, BEYOND["R4"][0]))
    monkeypatch.setattr(model, "_hf_peft_config_loaded", True, raising=True)
    assert model.hf_quantizer.is_serializable() is False


@pytest.mark.parametrize("online", [R4, BLOCKS], ids=["R4", "blocks"])
@torch.no_grad()
def test_the_library_turns_as_we_do(online: Rotation, tmp_path: Path) -> None:
    """Its own `apply_transform_config`, on the weights before they were turned, gives our weights and our outputs."""
    folder = folder_of(tmp_path / "q", "compressed-tensors", plan_of("W8A16", online=online))
    ours, theirs = bitlathe.load(folder, "cpu").float(), random_model(dtype=torch.float32)
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(LLAMA.num_hidden_layers)]
    for name in names:
        theirs.get_parameter(f"{name}.weight").copy_(turn_back(ours.get_parameter(f"{name}.weight").double(), online))
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]["transform_config"]
    apply_transform_config(theirs, TransformConfig.model_validate(stored))
    x = torch.randn(7, LLAMA.intermediate_size, generator=torch.Generator().manual_seed(0))
    for name in names:
        weight, expected = ours.get_parameter(f"{name}.weight"), theirs.get_submodule(name)(x)
        assert (theirs.get_parameter(f"{name}.weight") - weight).norm() <= 1e-6 * weight.norm()
        assert (ours.get_submodule(name)(x) - expected).norm() <= 1e-6 * expected.norm()
        assert (nn.functional.linear(x, weight) - expected).norm() > 0.1 * expected.norm()


@torch.no_grad()
def test_matrices_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of(tmp_path, "compressed-tensors", plan_of("W8A16", online=R4)))
    first = model(TOKENS).logits

    def make_again(*_: Any) -> Tensor:
        raise AssertionError("a matrix was made again")

    monkeypatch.setattr(hadamard, "_product", make_again)
    assert torch.equal(model(TOKENS).logits, first)
