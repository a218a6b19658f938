"""What can be set about a search, and what it chooses from unless told otherwise. No torch here: recipes read it."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, PositiveInt

# Beside the bits asked for: what is worth a choice below and above four of them.
_FEW = ("W2A16G64", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16")
_MANY = ("W3A16", "W4A16", "W5A16", "W6A16", "W8A16")
_LEAST = ("W2A16_CHANNEL", "W2A16")
# What serving engines load from compressed-tensors: four bits in large and in small groups, and eight.
_SERVED = ("W4A16", "W4A16G32", "W8A16")
# llama.cpp's blocks of 256, and of 32 for eight bits.
_LLAMA_CPP = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
# Beside them, where rows are no whole blocks of 256.
_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
_SUPER = 256
_ENOUGH, _FEWEST = 4.125, 2.25  # bits of W4A16 and of W2A16G64


class SearchOptions(BaseModel):
    """Options of a search.

    tokens: of the calibration text, as whole windows, that scores are made from. held_out: further ones on which choices are
    measured. Both are reached in windows of the recipe's seqlen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: PositiveInt = 32768
    held_out: PositiveInt = 8192


def default_schemes(bits: Iterable[float], formats: Iterable[str], rows: Iterable[int]) -> tuple[str, ...]:
    """Names of schemes to choose from for the smallest of these budgets, bits a weight, in these formats. rows: lengths."""
    formats, least = tuple(formats), min(bits)
    if "gguf" in formats:
        return _LLAMA_CPP if all(row % _SUPER == 0 for row in rows) else (*_LLAMA_CPP, *_OF_32)
    if "compressed-tensors" in formats and least >= _ENOUGH:
        return _SERVED
    few = _FEW if least < _ENOUGH else _MANY
    return (*_LEAST, *few) if least < _FEWEST else few
