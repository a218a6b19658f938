"""The mlx package: its own dequantization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from torch import Tensor

from bitlathe.readers.base import Opened


class _Files:
    """Weights alone: what runs models is another package."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_bytes())
        self.config, self.dtype = config["quantization"], getattr(torch, config["dtype"])
        self.tensors: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.tensors |= mx.load(str(file))

    def weight(self, linear: str, inputs: int) -> Tensor | None:
        """See `Opened`."""
        said = self.config.get(linear, self.config)
        parts = [self.tensors[f"{linear}.{part}"] for part in ("weight", "scales", "biases")]
        weight = mx.dequantize(*parts, group_size=said["group_size"], bits=said["bits"])
        return torch.from_numpy(np.array(weight.astype(mx.float32))).to(self.dtype)

    def logits(self, tokens_BT: Tensor) -> Tensor | None:
        """None; see above."""


def opened(folder: Path) -> Opened:
    """An mlx folder."""
    return _Files(folder)
