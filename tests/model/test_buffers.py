"""Buffers that no checkpoint holds get the values of a model that was built with its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3 import Qwen3Config

from bitlathe.errors import UnsupportedModel
from bitlathe.model.buffers import materialise_buffers

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + 0.3 * i for i in range(16)],
    "original_max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "llama3-rope": LlamaConfig(**TINY, max_position_embeddings=512, rope_parameters=LLAMA3),
    "gemma2": Gemma2Config(**TINY, head_dim=32),
    "gemma3": Gemma3TextConfig(**TINY, head_dim=32, layer_types=["sliding_attention", "full_attention"]),
    "olmo2": Olmo2Config(**TINY),
    "phi3": Phi3Config(**TINY),
    "phi3-longrope": Phi3Config(**TINY, max_position_embeddings=512, rope_parameters=LONGROPE),
    "qwen3": Qwen3Config(**TINY, head_dim=32),
}


def on_meta(config: PretrainedConfig, dtype: torch.dtype):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", CONFIGS)
def test_buffers_are_those_of_a_built_model(family: str, dtype: torch.dtype) -> None:
    built = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype)
    model = on_meta(CONFIGS[family], dtype)
    materialise_buffers(model, [model], "cpu")
    buffers = dict(model.named_buffers())
    assert list(buffers) == [name for name, _ in built.named_buffers()]
    assert buffers
    for name, expected in built.named_buffers():
        assert buffers[name].dtype == expected.dtype
        assert torch.equal(buffers[name], expected), name
    assert all(parameter.is_meta for parameter in model.parameters())


def test_loaded_weights_and_other_modules_are_left_alone() -> None:
    model = on_meta(CONFIGS["gemma3"], torch.float32)
    table = nn.Parameter(torch.ones(64, 64))
    model.model.embed_tokens.weight = table
    materialise_buffers(model, [model.model.embed_tokens], "cpu")
    assert model.model.embed_tokens.weight is table
    assert torch.equal(table, torch.ones(64, 64))
    assert model.model.embed_tokens.embed_scale == 8
    assert all(buffer.is_meta for buffer in model.model.rotary_emb.buffers())


def test_a_value_that_is_there_is_kept() -> None:
    model = on_meta(CONFIGS["llama"], torch.float32)
    model.model.rotary_emb.inv_freq = torch.zeros(16)
    materialise_buffers(model, [model.model.rotary_emb], "cpu")
    assert not model.model.rotary_emb.inv_freq.any()
    assert model.model.rotary_emb.original_inv_freq.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_buffer_without_a_rule_is_refused(dtype: torch.dtype) -> None:
    model = on_meta(CONFIGS["llama"], torch.float32)
    model.model.norm.register_buffer("mystery", torch.empty(2, dtype=dtype, device="meta"), persistent=False)
    with pytest.raises(UnsupportedModel, match="'mystery'"):
        materialise_buffers(model, model.modules(), "cpu")
