"""A whole model as one GGUF file: its tensors under llama.cpp's names, what its config.json says, and its tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from safetensors import safe_open
from torch import Tensor

from bitlathe.errors import FormatError
from bitlathe.formats.base import Source
from bitlathe.formats.gguf_blocks import type_of
from bitlathe.formats.gguf_tokenizer import add_tokenizer, refuse_tokenizer
from bitlathe.io.checkpoint import DTYPES
from bitlathe.io.gguf import FILE, heads_of, stored_name
from bitlathe.io.tensor_info import to_pairs

# model_type of config.json -> llama.cpp's name of the family.
_FAMILIES: dict[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ROPES = ("default", "linear", "llama3")
_KEPT: dict[torch.dtype, GGMLQuantizationType] = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
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


class GgufFile:
    """The container of the format "gguf"."""

    file = FILE

    def refuse(self, config: Mapping[str, Any], folder: Path) -> None:
        """Raise FormatError for a model that cannot be written: its family, its rotary embeddings, or its tokenizer."""
        family, rope = config.get("model_type"), _rope(config)
        wrong = None
        if family not in _FAMILIES:
            wrong = f"the family {family!r} (written are {', '.join(_FAMILIES)})"
        elif rope.get("rope_type", "default") not in _ROPES:
            wrong = f"rotary embeddings of the type {rope['rope_type']!r} (written are {', '.join(_ROPES)})"
        elif config.get("sliding_window") and config.get("use_sliding_window", family == "mistral"):
            wrong = "a sliding window of attention"
        elif config.get("mlp_bias"):
            wrong = "an MLP with biases"
        if wrong is not None:
            raise FormatError(
                f"gguf: this program does not write {wrong}. Write the native format, or dense, which llama.cpp's own "
                "converter reads"
            )
        refuse_tokenizer(folder)

    def write(self, path: Path, shards: Sequence[Path], source: Source) -> None:
        """Write the tensors of `shards`, one at a time."""
        config, family = source.config, _FAMILIES[source.config["model_type"]]
        writer = GGUFWriter(path, family)
        _describe(writer, source)
        add_tokenizer(writer, source.folder, config["vocab_size"])
        extra = _frequencies(config)
        if extra is not None:
            writer.add_tensor_info("rope_freqs.weight", extra.shape, np.dtype(np.float32), extra.nbytes)
        for name, stored in _names(shards):
            shape, kind, nbytes = _place(name, stored, source)
            plain = kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
            dtype = np.dtype({GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind, np.uint8))
            writer.add_tensor_info(_stored(name), shape, dtype, nbytes, raw_dtype=None if plain else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if extra is not None:
            writer.write_tensor_data(extra.numpy())
        heads = (config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"])
        for name, stored in _names(shards):
            tensor = stored.get_tensor(name)
            tensor = tensor.float() if tensor.ndim == 1 else tensor
            if count := heads_of(_stored(name), family, heads):
                tensor = to_pairs(tensor, count)
            writer.write_tensor_data(tensor.contiguous().flatten().view(torch.uint8).numpy())
        writer.close()


def _names(shards: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """Every tensor's name with the open file it is in, in a fixed order."""
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            for name in sorted(opened.keys()):
                yield name, opened


def _stored(name: str) -> str:
    stored = stored_name(name)
    assert stored is not None, name
    return stored


def _place(name: str, stored: Any, source: Source) -> tuple[Sequence[int], GGMLQuantizationType, int]:
    """Shape, type and bytes of a tensor in the file; of codes, and of bf16, the shape in bytes."""
    view = stored.get_slice(name)
    shape = view.get_shape()
    kind = type_of(source.plan.quantized.get(name.removesuffix(".weight")))
    if kind is not None:
        return shape, GGMLQuantizationType[kind], shape[0] * shape[1]
    if len(shape) == 1:
        return shape, GGMLQuantizationType.F32, 4 * shape[0]
    kept = _KEPT[DTYPES[view.get_dtype()]]
    nbytes = shape[0] * shape[1] * (4 if kept == GGMLQuantizationType.F32 else 2)
    return ([shape[0], 2 * shape[1]] if kept == GGMLQuantizationType.BF16 else shape), kept, nbytes


def _describe(writer: GGUFWriter, source: Source) -> None:
    config = source.config
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    rope = _rope(config)
    types = Counter(type_of(scheme) or "" for name, scheme in source.plan.quantized.items() if ".layers." in name)
    writer.add_name(source.folder.name)
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
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of rotary embeddings, under new or old keys."""
    said = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    return said | ({"rope_type": said["type"]} if "type" in said and "rope_type" not in said else {})


def _frequencies(config: Mapping[str, Any]) -> Tensor | None:
    """What Llama 3.1 divides the frequencies of its rotary embeddings by, float32 [half a head]; None for other models."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / (2 * pi * base ** (torch.arange(0, size, 2, dtype=torch.float64) / size))
    smooth = (turns - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(turns < low, float(factor), torch.where(turns > high, 1.0, between)).float()
