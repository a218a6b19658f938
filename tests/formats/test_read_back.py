"""transformers with compressed-tensors, a reader that knows nothing of us, sees the weights that were measured, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.qwen2 import Qwen2Config

from bitlathe.formats.compressed_tensors import CompressedTensors
from bitlathe.numerics.scheme import SCHEMES
from quantized_folder import DTYPES, LLAMA, TOKENS, make, plan_for, random_model

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
BF16_ONLY = ("MXFP4A16", "MXFP8A16", "NVFP4A16")


pytestmark = pytest.mark.usefixtures("one_thread")


def read_back(
    folder: Path, schemes: dict[str, str], dtype: Literal["bf16", "fp16"] = "bf16", config: PretrainedConfig = LLAMA
) -> None:
    model = random_model(config, DTYPES[dtype])
    made = make(
        folder, CompressedTensors(), model, plan_for(model, {end: SCHEMES[name] for end, name in schemes.items()}, dtype)
    )
    assert made.weights
    read = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = read(TOKENS).logits  # the first forward pass decompresses
    for name, expected in made.weights.items():
        weight = read.get_parameter(f"{name}.weight")
        assert weight.dtype == expected.dtype
        assert torch.equal(weight.view(torch.int16), expected.view(torch.int16)), name
    assert torch.equal(logits, made.logits)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if not name.startswith("Q")])  # those are for gguf
def test_each_scheme(scheme: str, tmp_path: Path) -> None:
    read_back(tmp_path, {"proj": scheme})


@pytest.mark.parametrize(
    "scheme", ["W2A16", "W3A16G32", "W4A16G32_ASYM", "W8A16_CHANNEL", *(n for n in SCHEMES if "FP8_" in n)]
)
def test_in_fp16(scheme: str, tmp_path: Path) -> None:
    assert scheme not in BF16_ONLY
    read_back(tmp_path, {"proj": scheme}, "fp16")


def test_a_scheme_for_every_kind_of_linear(tmp_path: Path) -> None:
    mixed = {
        "layers.0.mlp.gate_proj": "FP8_BLOCK",
        "layers.0.mlp.up_proj": "FP8_TENSOR",
        "layers.1.mlp.down_proj": "MXFP8A16",
        "o_proj": "NVFP4A16",
        "down_proj": "W3A16G32",
        "v_proj": "MXFP4A16",
        "q_proj": "W4A16",
        "lm_head": "W8A16_CHANNEL",
    }
    read_back(tmp_path, mixed)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "NVFP4A16"])
def test_biases_and_a_tied_head(scheme: str, tmp_path: Path) -> None:
    shape = {key: value for key, value in LLAMA.to_dict().items() if key in SHAPE}
    read_back(tmp_path, {"proj": scheme}, config=Qwen2Config(**shape, tie_word_embeddings=True))
