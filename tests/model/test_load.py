"""A folder comes back as the model that was made: the same weights, the same logits, able to generate."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.mistral import MistralConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from bitlathe import load, quantize
from bitlathe.errors import CheckpointError, RecipeError
from bitlathe.formats.base import Format
from bitlathe.formats.compressed_tensors import CompressedTensors
from bitlathe.formats.dense import Dense
from bitlathe.formats.native import Native
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.layers import QuantLinear
from bitlathe.model.source import open_model
from bitlathe.numerics.scheme import SCHEMES
from families import save_model, write_text
from quantized_folder import DTYPES, LLAMA, TOKENS, make, plan_for, random_model

FORMATS: dict[str, Format] = {"native": Native(), "compressed-tensors": CompressedTensors(), "dense": Dense()}
TINY = {key: LLAMA.to_dict()[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LLAMA,
    "mistral": MistralConfig(**TINY),
    "qwen2": Qwen2Config(**TINY, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**TINY, head_dim=32),
    "gemma2": Gemma2Config(**TINY, head_dim=32, sliding_window=16),
    "gemma3": Gemma3TextConfig(**TINY, head_dim=32, layer_types=["sliding_attention", "full_attention"], sliding_window=16),
    "olmo2": Olmo2Config(**TINY),
    "phi3": Phi3Config(**TINY),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def check(folder: Path, format: Format, config: PretrainedConfig, dtype: Literal["bf16", "fp16"] = "bf16") -> None:
    model = random_model(config, DTYPES[dtype])
    made = make(folder, format, model, plan_for(model, {"proj": SCHEMES["W4A16G32"]}, dtype))
    read = load(folder, "cpu")
    with torch.no_grad():
        assert torch.equal(read(TOKENS).logits, made.logits)
        new, expected = (m.generate(TOKENS[:, :8], max_new_tokens=4, do_sample=False) for m in (read, model))
    assert torch.equal(new, expected)
    assert not read.training
    assert read.dtype == DTYPES[dtype]
    assert not any(parameter.requires_grad for parameter in read.parameters())
    for name, weight in made.weights.items():
        assert torch.equal(read.get_parameter(f"{name}.weight"), weight)
        assert isinstance(read.get_submodule(name), QuantLinear) == (format.name != "dense")
    if config.tie_word_embeddings:
        assert read.get_output_embeddings().weight is read.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family: str, tmp_path: Path) -> None:
    check(tmp_path, Native(), FAMILIES[family])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_each_format(format: Format, dtype: Literal["bf16", "fp16"], tmp_path: Path) -> None:
    check(tmp_path, format, LLAMA, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_original(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(LLAMA, dtype)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    read = load(str(tmp_path), "cpu")
    assert read.dtype == dtype
    assert read.generation_config.max_new_tokens == 3
    with torch.no_grad():
        assert torch.equal(read(TOKENS).logits, model(TOKENS).logits)


def test_a_head_that_is_quantized(tmp_path: Path) -> None:
    model = random_model()
    made = make(tmp_path, Native(), model, plan_for(model, {"lm_head": SCHEMES["W8A16"], "q_proj": SCHEMES["NVFP4A16"]}))
    with torch.no_grad():
        assert torch.equal(load(tmp_path, "cpu")(TOKENS).logits, made.logits)


def test_refusals(tmp_path: Path) -> None:
    model = random_model()
    make(tmp_path, Native(), model, plan_for(model, {"q_proj": SCHEMES["W4A16"]}))
    with pytest.raises(RecipeError, match="device"):
        load(tmp_path, "cuda:99")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["groups"][0]["scheme"]["block"] = [1, 64]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj: the tensor 'weight_scale'"):
        load(tmp_path, "cpu")
    config["quantization_config"] = {"quant_method": "exl3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="exl3"):
        load(tmp_path, "cpu")


def test_weights_name_the_linear_they_cannot_decode(tmp_path: Path) -> None:
    model = random_model()
    make(tmp_path, Native(), model, plan_for(model, {"q_proj": SCHEMES["W4A16"]}))
    name, file = "model.layers.1.self_attn.q_proj", tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{name}.weight_scale"]
    save_file(tensors, file)
    _, weights = open_model(Checkpoint(tmp_path), device=torch.device("cpu"))
    expected = rf"^{tmp_path}, {name}: there is no tensor 'weight_scale'"
    for reading in (lambda: weights.layer(name), lambda: weights.read([f"{name}.weight"]), lambda: load(tmp_path, "cpu")):
        with pytest.raises(CheckpointError, match=expected):
            reading()


@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "NVFP4"])
@pytest.mark.parametrize("format", ["native", "compressed-tensors", "dense"])
def test_a_static_scale_is_read_without_its_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, format: Literal["native", "compressed-tensors", "dense"]
) -> None:
    save_model(tmp_path / "m")
    text = str(write_text(tmp_path / "text.txt", 100))
    asked = {"scheme": scheme, "tuner": "rtn", "samples": 4, "seqlen": 16, "calib": text, "formats": (format,)}
    quantize(str(tmp_path / "m"), out=tmp_path / "q", **asked)
    _, weights = open_model(Checkpoint(tmp_path / "q"), device=torch.device("cpu"))
    name = "model.layers.1.mlp.down_proj"
    decoded = weights.layer(name).input
    assert decoded is not None
    read: list[str] = []
    original = Checkpoint.read

    def watched(self: Checkpoint, names: Iterable[str]) -> dict[str, torch.Tensor]:
        read.extend(names := list(names))
        return original(self, names)

    monkeypatch.setattr(Checkpoint, "read", watched)
    alone = weights.static_scale(name)
    assert alone is not None and torch.equal(alone.scale, decoded.scale)
    assert read and all(tensor.startswith(f"{name}.input_") for tensor in read)
    read.clear()
    assert weights.static_scale("lm_head") is None and not read
