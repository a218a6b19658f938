"""bitlathe itself."""

from __future__ import annotations

from pathlib import Path

from bitlathe.model.load import load
from bitlathe.readers.base import Opened, OpenedModel


def opened(folder: Path) -> Opened:
    """A folder of any of our formats."""
    return OpenedModel(load(folder, device="cpu"))
