"""Searches on small models, for several tests."""

from __future__ import annotations

from typing import Any

import torch

from bitlathe.autoscheme.ground import Ground
from bitlathe.model.source import open_model
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


def ground_of(ready: Prepared) -> Ground:
    """What it stands on."""
    assert ready.space is not None and ready.text.scored is not None and ready.text.held_out is not None
    return Ground(
        skeleton=ready.skeleton,
        weights=ready.weights,
        plain=open_model(ready.weights.checkpoint, device=torch.device("cpu"), dtype=torch.float32),
        space=ready.space,
        tokens=ready.text.scored,
        held_out=ready.text.held_out,
        batch_size=4,
        memory=2**30,
        seed=0,
    )


def quiet(what: str, done: int, of: int) -> None:
    """A listener of a search."""
