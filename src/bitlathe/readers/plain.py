"""transformers alone, with the compressed-tensors library where the format is that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from bitlathe.readers.base import Opened, OpenedModel


def opened(folder: Path) -> Opened:
    """A folder whose weights are read. compressed-tensors decompresses at the first forward pass, so there is one."""
    method = json.loads((folder / "config.json").read_bytes()).get("quantization_config", {}).get("quant_method")
    # Its own products of fp8 need a GPU.
    more: dict[str, Any] = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if method == "fp8" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **more)
    with torch.no_grad():
        model(torch.tensor([[0, 1]]), use_cache=False)
    return OpenedModel(model)
