"""Model families: a new one is a row of ARCHS, and a table where its shape is new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitlathe.arch.base import Arch, Linear
from bitlathe.arch.gemma import GEMMA
from bitlathe.arch.llama import LLAMA
from bitlathe.arch.moe import MOE
from bitlathe.arch.olmo import OLMO2
from bitlathe.arch.phi import PHI3
from bitlathe.errors import UnsupportedModel

__all__ = ["ARCHS", "Arch", "Linear", "arch_for"]

# model_type of config.json -> table
ARCHS: dict[str, Arch] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": OLMO2,
    "phi3": PHI3,
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
    "olmoe": MOE,
}


def arch_for(config: Mapping[str, Any]) -> Arch:
    """The table for a model's config.json. Raises UnsupportedModel, listing the known families, or naming a key that changes
    what a family's table says."""
    family = config.get("model_type")
    if family not in ARCHS:
        raise UnsupportedModel(
            f"the model family {family!r} (model_type in config.json) is not known. Known: {', '.join(ARCHS)}"
        )
    if config.get("clip_qkv") is not None:
        raise UnsupportedModel(
            f"clip_qkv in config.json clips queries, keys and values, which the table of the family {family!r} does not know. "
            "Models of the family without it (null) are known"
        )
    return ARCHS[family]
