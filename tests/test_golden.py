"""Law 8: a change that is not meant to change numbers changes no byte of an export.

The weights are whole numbers by a fixed recipe, rounding to nearest needs no text, and the schemes here take nothing but
single IEEE operations: the hashes hold on every machine and with every version of the libraries. When bytes are meant to
change, run this file with pytest and put what the failing test prints in the place of GOLDEN.
"""

from __future__ import annotations

import hashlib
import json
from math import prod
from pathlib import Path
from pprint import pformat
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitlathe

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 48,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
_BLOCK = "model.layers.0."
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (48, 128),
    f"{_BLOCK}input_layernorm.weight": (128,),
    f"{_BLOCK}self_attn.q_proj.weight": (128, 128),
    f"{_BLOCK}self_attn.k_proj.weight": (64, 128),
    f"{_BLOCK}self_attn.v_proj.weight": (64, 128),
    f"{_BLOCK}self_attn.o_proj.weight": (128, 128),
    f"{_BLOCK}post_attention_layernorm.weight": (128,),
    f"{_BLOCK}mlp.gate_proj.weight": (256, 128),
    f"{_BLOCK}mlp.up_proj.weight": (256, 128),
    f"{_BLOCK}mlp.down_proj.weight": (128, 256),
    "model.norm.weight": (128,),
    "lm_head.weight": (48, 128),
}
# Scheme -> what the model is turned by. Rotations are sums in float64 rounded to bf16: their last bit does not reach a code.
SCHEMES = dict.fromkeys(
    ("W3A16", "W4A16G32", "W4A16G32_ASYM", "FP8_CHANNEL", "FP8_BLOCK", "MXFP4A16", "MXFP8A16", "NVFP4A16"), "none"
)
SCHEMES |= {"W4A4": "R1,R2,R4", "W8A8": "hadamard", "MXFP4": "R4"}
FORMATS = ("native", "compressed-tensors", "dense")

GOLDEN: dict[str, str] = {
    "FP8_BLOCK compressed-tensors": "d466acdd11bcf35b",
    "FP8_BLOCK dense": "a72647135197263f",
    "FP8_BLOCK native": "dfcef6b3a5905572",
    "FP8_CHANNEL compressed-tensors": "c4aeee86914964e6",
    "FP8_CHANNEL dense": "602e8c5cf331a469",
    "FP8_CHANNEL native": "41cabd15ec09b9c7",
    "MXFP4 compressed-tensors": "3a788cb43c5c6f59",
    "MXFP4 dense": "b6c4ba2167db5d90",
    "MXFP4 native": "e4ca51523c41615b",
    "MXFP4A16 compressed-tensors": "2579d2a2941c46de",
    "MXFP4A16 dense": "067d747c31deb654",
    "MXFP4A16 native": "63318b4957f38f78",
    "MXFP8A16 compressed-tensors": "b0d97ea9db5cc56f",
    "MXFP8A16 dense": "75c7796a29b8a184",
    "MXFP8A16 native": "43e9f21e7c821736",
    "NVFP4A16 compressed-tensors": "dcbeb3264f3c8b18",
    "NVFP4A16 dense": "4facd0667e341be0",
    "NVFP4A16 native": "2b17d97d01cc461d",
    "W3A16 compressed-tensors": "9da36659cb8b4f4a",
    "W3A16 dense": "e8a8271d6aea04a3",
    "W3A16 native": "00774cd7cdc60c96",
    "W4A16G32 compressed-tensors": "de2f3dab84a83f79",
    "W4A16G32 dense": "556fdaff5bdcec56",
    "W4A16G32 native": "e9986e48b879db40",
    "W4A16G32_ASYM compressed-tensors": "ed717e222de2f451",
    "W4A16G32_ASYM dense": "36d97740e68a19e5",
    "W4A16G32_ASYM native": "bc92198e1b03d617",
    "W4A4 compressed-tensors": "279fd6df48eb2556",
    "W4A4 dense": "859852e79908bb99",
    "W4A4 native": "ec97752f2d1c5d75",
    "W8A8 compressed-tensors": "6b7c27a8b40a0353",
    "W8A8 dense": "c633ad3e74b45b6d",
    "W8A8 native": "371b4768e70813b2",
}


def numbers(shape: tuple[int, ...], salt: int) -> Tensor:
    """Bell-shaped multiples of 1/4096, in bf16: four bytes of a hash of each index, summed."""
    mixed = (torch.arange(prod(shape)) + salt * 1_000_003) * 2_654_435_761 % 2**31
    mixed = (mixed ^ (mixed >> 15)) * 2_246_822_519 % 2**31
    mixed = (mixed ^ (mixed >> 13)) * 3_266_489_917 % 2**32
    total = sum((mixed >> shift) % 256 for shift in (0, 8, 16, 24))
    return ((total - 510).float() / 4096).to(torch.bfloat16).view(shape)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    tensors = {name: numbers(shape, salt) for salt, (name, shape) in enumerate(SHAPES.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def fingerprint(folder: Path) -> str:
    """Of the weights' files, their index, and what config.json says of ours."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*")):
        digest.update(path.name.encode() + path.read_bytes())
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if quantization.get("quant_method") == "bitlathe":  # what the other library says of itself changes with its version
        digest.update(json.dumps(quantization).encode())
    return digest.hexdigest()[:16]


def test_the_weights_are_the_recipe_s(model: Path) -> None:
    """So that a hash that changed cannot be their fault."""
    weights = load_file(model / "model.safetensors")
    digest = hashlib.sha256(b"".join(weights[name].view(torch.uint8).numpy().tobytes() for name in SHAPES))
    assert digest.hexdigest()[:16] == "6e9e7db690088cac"
    assert all(weights[name].unique().numel() > 64 and abs(weights[name].float().mean()) < 0.01 for name in SHAPES)


def test_no_byte_has_changed(model: Path, tmp_path: Path) -> None:
    found = {}
    for scheme, rotate in SCHEMES.items():
        out = tmp_path / scheme
        plain: dict[str, Any] = {"tuner": "rtn", "rtn": {"scale": "min-max"}, "device": "cpu", "overrides": {"lm_head": scheme}}
        bitlathe.quantize(str(model), out=out, scheme=scheme, formats=FORMATS, rotate=rotate, **plain)
        found |= {f"{scheme} {format}": fingerprint(out / format) for format in FORMATS}
    assert found == GOLDEN, f"GOLDEN: dict[str, str] = {pformat(found)}"
