"""Searches on small models, for several tests."""

from __future__ import annotations

from typing import Any

from bitlathe.prepare import Prepared, prepare_search
from bitlathe.recipe import merge

SMALL: dict[str, Any] = {
    "model": "builtin",
    "out": ".",
    "calib": "builtin",
    "seqlen": 64,
    "batch_size": 4,
    "search": {"tokens": 1024, "held_out": 512},
}


def ready_for(bits: float = 4.5, **fields: Any) -> Prepared:
    """A search that is about to begin."""
    return prepare_search(merge({**SMALL, "bits": bits, **fields}), [bits])


def quiet(what: str, done: int, of: int) -> None:
    """A listener of a search."""
