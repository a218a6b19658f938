"""One tiny random model of every family, saved as a folder."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from quantized_folder import random_model

VOCABULARY = 96
_LETTERS = string.ascii_letters + string.digits
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
# What makes each family different from llama, turned on; the window is shorter than the text of the tests.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"attention_bias": True},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 4.0},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo2": {},
    "phi3": {"tie_word_embeddings": False},
    "qwen2_moe": {"qkv_bias": True, "shared_expert_intermediate_size": 64, "moe_intermediate_size": 32, **_EXPERTS},
    # Every second block is dense.
    "qwen3_moe": {"moe_intermediate_size": 32, "decoder_sparse_step": 2, **_EXPERTS},
    "olmoe": _EXPERTS,
}
FAMILIES = tuple(_OWN)


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    own = {**_COMMON, **_OWN[family], **changes}
    if family in ("phi3", "olmoe", "qwen2_moe"):
        del own["head_dim"]
    return AutoConfig.for_model(family, **own)


def save_model(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> PreTrainedModel:
    """A random model of the family in `folder`, with a tokenizer of one token a letter."""
    model = random_model(config_of(family, **changes), dtype)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(BPE({"<unk>": 0, **{letter: index + 3 for index, letter in enumerate(_LETTERS)}}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>").save_pretrained(folder)
    return model


def write_text(path: Path, letters: int) -> Path:
    """A text of about `letters` tokens for `save_model`'s tokenizer."""
    picks = torch.randint(len(_LETTERS), (letters,), generator=torch.Generator().manual_seed(letters))
    path.write_text("".join(_LETTERS[index] for index in picks.tolist()), encoding="utf-8")
    return path
