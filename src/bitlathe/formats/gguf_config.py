"""What a GGUF file says of a model beside its tensors and its tokenizer, and what it has no words for.

llama.cpp knows much of a family without being told (src/models in its source): which layers of gemma slide and on what base
their rotary embeddings turn, and what queries are scaled by. A config.json that says anything else is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import pi
from typing import Any

import torch
from gguf import GGUFWriter, LlamaFileType, RopeScalingType
from torch import Tensor
from transformers import AutoConfig

from bitlathe.formats.gguf_blocks import type_of
from bitlathe.plan import Plan

# model_type of config.json -> llama.cpp's name of the family.
FAMILIES: dict[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
_ROPES = ("default", "linear", "llama3")
_QUANTIZATION_VERSION = 2  # of llama.cpp's block types
# What llama.cpp shows for a file whose most common type this is.
_SHOWN: dict[str, LlamaFileType] = {
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": LlamaFileType.MOSTLY_Q5_1,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q2_K": LlamaFileType.MOSTLY_Q2_K,
    "Q3_K": LlamaFileType.MOSTLY_Q3_K_M,
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_M,
    "Q5_K": LlamaFileType.MOSTLY_Q5_K_M,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
}
# Of gemma: every so many layers one sees all of the text.
_PERIODS: dict[str, int] = {"gemma2": 2, "gemma3_text": 6}
# Layers of the models of 27B, which alone do not scale queries by the size of a head.
_LARGEST: dict[str, int] = {"gemma2": 46, "gemma3_text": 62}
_UNREAD = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_LOCAL_BASE = 10000.0  # of gemma3's rotary embeddings in layers that slide


def filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with what transformers takes for keys that it leaves out or says in an older way."""
    own = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    return AutoConfig.for_model(config["model_type"], **own).to_dict()


def strange(config: Mapping[str, Any]) -> str | None:
    """What a config.json says that is not written, in words; None where all of it is."""
    family = config.get("model_type")
    if family not in FAMILIES:
        return f"the family {family!r} (written are {', '.join(FAMILIES)})"
    config = filled(config)
    gemma = family in _PERIODS
    ropes = _ROPES[:2] if gemma else _ROPES
    kind = _rope(config).get("rope_type", "default")
    act, runs = config.get("hidden_activation") or config.get("hidden_act"), "gelu_pytorch_tanh" if gemma else "silu"
    wrong = {
        f"rotary embeddings of the type {kind!r} (written are {', '.join(ropes)})": kind not in ropes,
        f"an MLP with {act} ({runs} is written)": act != runs,
        "an MLP with biases": bool(config.get("mlp_bias")),
        "a sliding window of attention": not gemma
        and bool(config.get("sliding_window") and config.get("use_sliding_window", family == "mistral")),
    }
    if gemma:
        wrong |= _strange_gemma(config)
    return next((words for words, there in wrong.items() if there), None)


def _strange_gemma(config: Mapping[str, Any]) -> dict[str, bool]:
    """What may be strange of a filled config.json of gemma, and whether it is."""
    family, depth = config["model_type"], config["num_hidden_layers"]
    heads, scale, period = config["num_attention_heads"], config["query_pre_attn_scalar"], _PERIODS[family]
    scaled = config["hidden_size"] // heads if depth == _LARGEST[family] else config["head_dim"]
    full = [(layer + 1) % period == 0 for layer in range(depth)]
    first, last = config["attn_logit_softcapping"], config["final_logit_softcapping"]
    local = config["rope_parameters"].get("sliding_attention", {"rope_theta": _LOCAL_BASE})
    turned = (local["rope_theta"], local.get("rope_type", "default"))
    return {
        f"queries scaled by {scale} (llama.cpp takes {scaled})": scale != scaled,
        f"layers that see all of the text where llama.cpp takes every one in {period}": full
        != [kind == "full_attention" for kind in config["layer_types"]],
        "attention without a sliding window": not config["sliding_window"],
        f"sliding layers with rotary embeddings of {turned} (llama.cpp takes {_LOCAL_BASE})": turned
        != (_LOCAL_BASE, "default"),
        "attention in both directions": bool(config["use_bidirectional_attention"]),
        "attention with biases": config["attention_bias"],
        "gemma2 without both of its soft caps": family == "gemma2" and not (first and last),
        "gemma3 with soft caps of attention": family != "gemma2" and bool(first),
        "gemma2 with a head of its own": family == "gemma2" and not config["tie_word_embeddings"],
    }


def unread(config: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json that transformers does not look for in a GGUF file, and that are not at their defaults."""
    own, plain = filled(config), filled({"model_type": config["model_type"]})
    turned = _rope(own).get("rope_type", "default") != "default"
    return [
        *(key for key in _UNREAD if own.get(key) != plain.get(key)),
        *(["the scaling of rotary embeddings"] if turned else []),
    ]


def describe(writer: GGUFWriter, config: Mapping[str, Any], plan: Plan, *, name: str) -> None:
    """Write the keys of a model. config: filled; name: the model's."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    rope = _rope(config)
    types = Counter(type_of(scheme) or "" for name, scheme in plan.quantized.items() if ".layers." in name)
    writer.add_name(name)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_file_type(_SHOWN[types.most_common(1)[0][0]] if types else LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config["model_type"] in _PERIODS:
        writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a filled config.json says of rotary embeddings; where layers differ, of those that see all of the text."""
    said = config["rope_parameters"]
    return dict(said.get("full_attention", said))


def frequencies(config: Mapping[str, Any]) -> Tensor | None:
    """What Llama 3.1 divides the frequencies of its rotary embeddings by, float32 [half a head]; None for other models.

    config: filled.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base = rope["rope_theta"]
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / (2 * pi * base ** (torch.arange(0, size, 2, dtype=torch.float64) / size))
    smooth = (turns - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(turns < low, float(factor), torch.where(turns > high, 1.0, between)).float()
