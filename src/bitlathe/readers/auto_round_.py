"""auto-round, through transformers, on the CPU."""

from __future__ import annotations

from pathlib import Path

import auto_round  # noqa: F401  # pyright: ignore[reportMissingImports] registers its quantizer with transformers
from transformers import AutoModelForCausalLM

from bitlathe.readers.base import Opened, OpenedModel


def opened(folder: Path) -> Opened:
    """An auto-round folder."""
    return OpenedModel(AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu"))
