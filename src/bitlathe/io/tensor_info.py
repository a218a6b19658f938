"""Where a tensor of a checkpoint lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """dtype: its safetensors name ("BF16"); offset: bytes from the start of `file`. heads: of how many heads the rows lie in
    llama.cpp's order, 0 where they lie as they are. added: what was added to every value, in float32."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    heads: int = 0
    added: int = 0


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * size of one, ...] in llama.cpp's order: what its rotary embedding turns together lies side by side."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def from_pairs(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_pairs`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
