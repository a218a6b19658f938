"""The gguf package: its container, and its dequantization in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from bitlathe.io.checkpoint import Checkpoint
from bitlathe.io.gguf import FILE, stored_name
from bitlathe.io.tensor_info import from_pairs
from bitlathe.readers.base import Opened


class _File:
    """Weights alone."""

    def __init__(self, folder: Path) -> None:
        reader = GGUFReader(folder / FILE)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        family = reader.fields["general.architecture"]
        self.family = bytes(family.parts[family.data[0]]).decode()
        self.heads = {name: info.heads for name, info in Checkpoint(folder).header.items()}
        # Our load rounds what it multiplies by to the dtype of the model.
        self.dtype = getattr(torch, str(Checkpoint(folder).config["dtype"]))

    def weight(self, linear: str, inputs: int) -> Tensor | None:
        """See `Opened`."""
        tensor = self.tensors[str(stored_name(f"{linear}.weight", self.family))]
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        heads = self.heads[f"{linear}.weight"]
        return (from_pairs(weight, heads) if heads else weight).to(self.dtype)

    def logits(self, tokens_BT: Tensor) -> Tensor | None:
        """None: the package runs no models."""


def opened(folder: Path) -> Opened:
    """A GGUF folder."""
    return _File(folder)
