"""The header of a GGUF file, under the names that transformers gives its tensors.

The file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) holds a magic number, counts, keys with values, a table of
tensors, and their bytes. Of the values only those of one number or one text are kept. Read here is what this program writes:
llama.cpp's names of the plain decoders, of which the family "llama" has the rows of queries and keys in another order, and
those of gemma, whose norms have 1 added to their weights, as their models do before they multiply.
"""

from __future__ import annotations

import re
import struct
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from bitlathe.errors import CheckpointError
from bitlathe.io.tensor_info import TensorInfo

FILE = "model.gguf"
_MAGIC, _VERSION = b"GGUF", 3

_PLAIN = ("F32", "F16", "BF16")
_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# llama.cpp's number of a type -> what it is read as, weights of a block, and its bytes.
_TYPES: dict[int, tuple[str, int, int]] = {
    int(kind): (kind.name if kind.name in _PLAIN else "U8", *GGML_QUANT_SIZES[kind])
    for kind in map(GGMLQuantizationType.__getitem__, (*_PLAIN, *_BLOCKS))
}
# Number of a kind of value -> how struct says it.
_NUMBERS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9

# Names of modules, outside of the blocks and in one.
_OUTSIDE: dict[str, str] = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE: dict[str, str] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Norms around an MLP: before it alone, or on both sides of it and of attention.
_BEFORE: dict[str, str] = {"post_attention_layernorm": "ffn_norm"}
_AROUND: dict[str, str] = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GEMMA = ("gemma2", "gemma3")
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_STORED = re.compile(r"blk\.(\d+)\.(.+)")


def stored_name(name: str, family: str) -> str | None:
    """llama.cpp's name of a tensor in its family of that name; None where it has none."""
    module, _, part = name.rpartition(".")
    inside = _inside(family)
    if (block := _BLOCK.fullmatch(module)) is not None:
        return f"blk.{block[1]}.{inside[block[2]]}.{part}" if block[2] in inside else None
    return f"{_OUTSIDE[module]}.{part}" if module in _OUTSIDE else None


def name_of(stored: str, family: str) -> str | None:
    """The inverse of `stored_name`."""
    module, _, part = stored.rpartition(".")
    names = {short: name for name, short in (_OUTSIDE | _inside(family)).items()}
    if (block := _STORED.fullmatch(module)) is not None:
        return f"model.layers.{block[1]}.{names[block[2]]}.{part}" if block[2] in names else None
    return f"{names[module]}.{part}" if module in names else None


def _inside(family: str) -> dict[str, str]:
    return _INSIDE | (_AROUND if family in _GEMMA else _BEFORE)


def added_to(stored: str, family: str) -> int:
    """What a file has added to every value of a tensor: gemma's norms multiply by 1 more than their weights."""
    return int(family in _GEMMA and stored.endswith("norm.weight"))


def heads_of(stored: str, family: str, heads: tuple[int, int]) -> int:
    """How many heads a tensor has whose rows llama.cpp wants in its own order; 0 where they stay. heads: of queries, keys."""
    if family != "llama":
        return 0
    part = stored.rpartition(".")[0].rpartition(".")[2]
    return {"attn_q": heads[0], "attn_k": heads[1]}.get(part, 0)


def read_gguf(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of a file by transformers' name; blocks of codes are bytes [rows, bytes a row]. Raises CheckpointError."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            if opened.read(4) != _MAGIC or _number(opened, "I") != _VERSION:
                raise CheckpointError(f"{file} is no GGUF file of version {_VERSION}. Download it again")
            count, keys = _number(opened, "Q"), _number(opened, "Q")
            values = {_text(opened): _value(opened, _number(opened, "I")) for _ in range(keys)}
            rows = [_row(opened) for _ in range(count)]
            end = opened.tell()
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: its header ends early or is none. Download it again") from error
    alignment = values.get("general.alignment") or 32
    base = -(-end // alignment) * alignment
    family = str(values.get("general.architecture"))
    queries = values.get(f"{family}.attention.head_count") or 0
    keys_ = values.get(f"{family}.attention.head_count_kv") or queries
    header = {}
    for stored, shape, kind, offset in rows:
        name = name_of(stored, family)
        if name is None:
            continue  # what is computed from config.json, such as the factors of rotary embeddings
        if kind not in _TYPES:
            raise CheckpointError(
                f"{file}: the tensor {stored} is of type {kind}, which is not read here. Use the original model"
            )
        dtype, weights, nbytes = _TYPES[kind]
        length = prod(shape) // weights * nbytes
        if base + offset + length > size:
            raise CheckpointError(f"{file} is truncated: {stored} ends beyond it. Download it again")
        held = (*shape[:-1], shape[-1] // weights * nbytes) if dtype == "U8" else shape
        heads, added = heads_of(stored, family, (queries, keys_)), added_to(stored, family)
        header[name] = TensorInfo(dtype, held, file, base + offset, length, heads, added)
    return header


def _row(file: BufferedReader) -> tuple[str, tuple[int, ...], int, int]:
    name = _text(file)
    shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))
    return name, shape[::-1], _number(file, "I"), _number(file, "Q")  # inner dimension first


def _number(file: BufferedReader, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _text(file: BufferedReader) -> str:
    return file.read(_number(file, "Q")).decode()


def _value(file: BufferedReader, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        return _number(file, _NUMBERS[kind])
    kind, count = _number(file, "I"), _number(file, "Q")
    if kind in _NUMBERS:
        file.seek(count * struct.calcsize(f"<{_NUMBERS[kind]}"), 1)
        return None
    for _ in range(count):
        _value(file, kind)
    return None
