"""GPTQModel, on the CPU with its kernel in torch."""

from __future__ import annotations

from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel  # pyright: ignore[reportMissingImports]

from bitlathe.readers.base import Opened, OpenedModel


def opened(folder: Path) -> Opened:
    """A GPTQ or an AWQ folder."""
    return OpenedModel(GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model)
