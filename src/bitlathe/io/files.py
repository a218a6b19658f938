"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in the place of a file, all of it or nothing."""
    with write_aside(path) as aside:
        aside.write_bytes(content)


def places_of(out: Path, names: Sequence[str]) -> dict[str, Path]:
    """Name -> the folder of its result: `out` itself for one alone, otherwise one in it for each."""
    return {name: out if len(names) == 1 else out / name for name in names}


@contextmanager
def write_aside(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """A temporary path that becomes `path` when what was written there is safe on disk, and vanishes when writing fails."""
    aside = (folder or path.parent) / f"{path.name}.tmp"
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
