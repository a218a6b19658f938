"""transformers' loader of GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bitlathe.io.gguf import FILE
from bitlathe.readers.base import Opened, OpenedModel


def opened(folder: Path) -> Opened:
    """A GGUF folder, in the dtype of its model."""
    dtype = getattr(torch, json.loads((folder / "config.json").read_bytes())["dtype"])
    return OpenedModel(AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=dtype))
