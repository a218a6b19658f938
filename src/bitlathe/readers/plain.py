"""transformers alone, with the compressed-tensors library where the format is that."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bitlathe.readers.base import Opened, OpenedModel


def opened(folder: Path) -> Opened:
    """A folder whose weights are read. compressed-tensors decompresses at the first forward pass, so there is one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        model(torch.tensor([[0, 1]]), use_cache=False)
    return OpenedModel(model)
