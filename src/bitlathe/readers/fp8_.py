"""transformers' loader of the fp8 method, which on a CPU dequantizes."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from bitlathe.readers.base import Opened, OpenedModel


def opened(folder: Path) -> Opened:
    """An fp8 folder, its weights dequantized."""
    dequantized = FineGrainedFP8Config(dequantize=True)
    return OpenedModel(AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=dequantized))
