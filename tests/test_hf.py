"""transformers loads the native format after `import bitlathe.hf`, and stops without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.qwen2 import Qwen2Config

import bitlathe.hf  # noqa: F401
from bitlathe import load
from bitlathe.errors import FormatError
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


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def test_it_is_not_saved_again(tmp_path: Path) -> None:
    made(tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="not serializable"):
        read.save_pretrained(tmp_path / "again")
    stored = read.config.to_dict()["quantization_config"]
    assert Native().parse(
        stored, [name for name, module in random_model().named_modules() if "proj" in name or name == "lm_head"]
    )
