"""transformers after `import bitlathe.hf`."""

from __future__ import annotations

from pathlib import Path

import bitlathe.hf  # noqa: F401 what transformers is taught by
from bitlathe.readers.base import Opened
from bitlathe.readers.plain import opened as plain


def opened(folder: Path) -> Opened:
    """A folder that transformers alone does not read as it is."""
    return plain(folder)
