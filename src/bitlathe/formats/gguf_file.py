"""A whole model as one GGUF file: its tensors under llama.cpp's names, what its config.json says, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors import safe_open

from bitlathe.errors import FormatError
from bitlathe.formats.base import Source
from bitlathe.formats.gguf_blocks import type_of
from bitlathe.formats.gguf_config import FAMILIES, describe, filled, frequencies, strange, unread
from bitlathe.formats.gguf_tokenizer import add_tokenizer, refuse_tokenizer
from bitlathe.io.checkpoint import DTYPES
from bitlathe.io.gguf import FILE, added_to, heads_of, stored_name
from bitlathe.io.tensor_info import to_pairs

_KEPT: dict[torch.dtype, GGMLQuantizationType] = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


class GgufFile:
    """The container of the format "gguf"."""

    file = FILE

    def refuse(self, config: Mapping[str, Any], folder: Path) -> None:
        """Raise FormatError for a model that cannot be written: see `strange`; or its tokenizer."""
        wrong = strange(config)
        if wrong is not None:
            raise FormatError(
                f"gguf: this program does not write {wrong}. Write the native format, or dense, which llama.cpp's own "
                "converter reads"
            )
        refuse_tokenizer(folder)

    def notes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """What transformers' loader does not read of the file's keys, though its model needs it."""
        left = unread(config)
        return (
            (
                f"transformers' loader of GGUF files does not read {', '.join(left)}, takes its own defaults for that, and "
                "would be silently wrong for this model: load the file with llama.cpp, or the folder with bitlathe.load",
            )
            if left
            else ()
        )

    def write(self, path: Path, shards: Sequence[Path], source: Source) -> None:
        """Write the tensors of `shards`, one at a time."""
        config, family = filled(source.config), FAMILIES[source.config["model_type"]]
        writer = GGUFWriter(path, family)
        describe(writer, config, source.plan, name=source.name)
        add_tokenizer(writer, source.folder, config["vocab_size"])
        extra = frequencies(config)
        if extra is not None:
            writer.add_tensor_info("rope_freqs.weight", extra.shape, np.dtype(np.float32), extra.nbytes)
        for name, stored in _names(shards):
            shape, kind, nbytes = _place(name, stored, source)
            plain = kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
            dtype = np.dtype({GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind, np.uint8))
            writer.add_tensor_info(_stored(name, family), shape, dtype, nbytes, raw_dtype=None if plain else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if extra is not None:
            writer.write_tensor_data(extra.numpy())
        heads = (config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"])
        ran = DTYPES["BF16" if source.plan.dtype == "bf16" else "F16"]
        for name, stored in _names(shards):
            tensor, called = stored.get_tensor(name), _stored(name, family)
            if added := added_to(called, family):
                # What the model multiplies by, bit for bit: it adds in float32 too, to a weight of its own dtype.
                tensor = tensor.to(ran).float() + added
            tensor = tensor.float() if tensor.ndim == 1 else tensor
            if count := heads_of(called, family, heads):
                tensor = to_pairs(tensor, count)
            writer.write_tensor_data(tensor.contiguous().flatten().view(torch.uint8).numpy())
        writer.close()


def _names(shards: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """Every tensor's name with the open file it is in, in a fixed order."""
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            for name in sorted(opened.keys()):
                yield name, opened


def _stored(name: str, family: str) -> str:
    stored = stored_name(name, family)
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
