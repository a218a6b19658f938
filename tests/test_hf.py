"""transformers loads the native format after `import bitlathe.hf`, and stops without it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaForCausalLM
from transformers.models.qwen2 import Qwen2Config

import bitlathe.hf  # noqa: F401
from bitlathe import load
from bitlathe.errors import CheckpointError, FormatError
from bitlathe.formats.native import Native
from bitlathe.numerics.scheme import SCHEMES, Scheme
from quantized_folder import LLAMA, TOKENS, Made, make, plan_for, random_model

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
TINY = {key: LLAMA.to_dict()[key] for key in SHAPE} | {"pad_token_id": 0}
MIXED: dict[str, Scheme | None] = {
    "q_proj": SCHEMES["W3A16G32_ASYM"],
    "k_proj": None,
    "v_proj": SCHEMES["NVFP4A16"],
    "o_proj": SCHEMES["FP8_BLOCK"],
    "down_proj": SCHEMES["MXFP4A16"],
    "up_proj": SCHEMES["MXFP8A16"],
    "gate_proj": SCHEMES["W5A16_CHANNEL"],
}

FRESH = """
import sys, warnings
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()
logging.set_verbosity_error()
folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder)
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error), error
else:
    raise SystemExit("transformers loaded codes that it does not know")
import bitlathe, bitlathe.hf

logging.set_verbosity_warning()
print("--- loading", file=sys.stderr)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
print("--- loaded", file=sys.stderr)
tokens = torch.arange(2, 50).view(2, 24)
with torch.no_grad():
    torch.save([m(tokens).logits for m in (theirs, bitlathe.load(folder, "cpu"))], sys.argv[2])
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def made(folder: Path) -> Made:
    model = random_model()
    return make(folder, Native(), model, plan_for(model, MIXED))


def test_a_fresh_process(tmp_path: Path) -> None:
    there = made(tmp_path / "model")
    result = subprocess.run(
        [sys.executable, "-c", FRESH, str(there.folder), str(tmp_path / "logits")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    said = result.stderr.partition("--- loading\n")[2].partition("--- loaded\n")[0]
    assert said == ""
    theirs, ours = torch.load(tmp_path / "logits")
    assert torch.equal(theirs, ours)
    assert torch.equal(theirs, there.logits)


@pytest.mark.parametrize(
    "config",
    [Qwen2Config(**TINY, tie_word_embeddings=True), Gemma3TextConfig(**TINY, head_dim=32, layer_types=["full_attention"] * 2)],
    ids=["qwen2", "gemma3"],
)
def test_biases_tied_heads_and_generation(config: Qwen2Config | Gemma3TextConfig, tmp_path: Path) -> None:
    model = random_model(config)
    make(tmp_path, Native(), model, plan_for(model, MIXED))
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path), load(tmp_path, "cpu")
    assert not theirs.training
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, ours(TOKENS).logits)
        new, expected = (m.generate(TOKENS[:, :8], max_new_tokens=4, do_sample=False) for m in (theirs, ours))
    assert torch.equal(new, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_arguments_do_not_reach_codes(dtype: torch.dtype, device_map: str | None, tmp_path: Path) -> None:
    there = made(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map=device_map)
    for name, weight in there.weights.items():
        assert torch.equal(read.get_parameter(f"{name}.weight"), weight.to(read.device, dtype)), name
    assert read.dtype == dtype
    if dtype == torch.bfloat16 and read.device.type == "cpu":
        with torch.no_grad():
            assert torch.equal(read(TOKENS).logits, there.logits)


def test_offloaded_codes_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(FormatError, match=r"model\.layers\.1\.\S+ out of memory"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload", offload_buffers=True
        )


DAMAGES = {
    "self_attn.q_proj": ("weight", "weight_zero", "weight_scale"),
    "self_attn.v_proj": ("weight", "weight_scale", "weight_scale_scale"),
    "self_attn.o_proj": ("weight", "weight_scale"),
    "mlp.down_proj": ("weight", "weight_scale"),
}


@pytest.mark.parametrize(("linear", "stream"), [(linear, stream) for linear, streams in DAMAGES.items() for stream in streams])
def test_a_missing_stream_is_refused(linear: str, stream: str, tmp_path: Path) -> None:
    file = made(tmp_path).folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.{linear}.{stream}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{tmp_path}, model\.layers\.1\.{linear}: there is no tensor '{stream}'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", [lambda stream: stream[:-1], lambda stream: stream.view(torch.int8)], ids=["short", "cast"])
def test_a_stream_of_another_kind_is_refused(damage: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    file = made(tmp_path).folder / "model.safetensors"
    name = "model.layers.0.mlp.up_proj"
    tensors = load_file(file)
    tensors[f"{name}.weight_scale"] = damage(tensors[f"{name}.weight_scale"]).clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{tmp_path}, {name}: the tensor 'weight_scale' is"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_weights_without_a_file_are_refused(tmp_path: Path) -> None:
    folder = made(tmp_path).folder
    with pytest.raises(CheckpointError, match="no file to read codes from"):
        LlamaForCausalLM.from_pretrained(
            None, config=AutoConfig.from_pretrained(folder), state_dict=load_file(folder / "model.safetensors")
        )


def test_it_is_not_saved_again(tmp_path: Path) -> None:
    made(tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(FormatError, match=rf"configuration of codes of {tmp_path / 'model'}. Copy the files"):
        read.save_pretrained(tmp_path / "again")
    stored = read.config.to_dict()["quantization_config"]
    assert Native().parse(
        stored, [name for name, module in random_model().named_modules() if "proj" in name or name == "lm_head"]
    )
