"""Records as lines of JSON, appended one by one: what was written before a kill is there after it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def line(record: Mapping[str, Any]) -> bytes:
    """A record as a line."""
    return json.dumps(record).encode() + b"\n"


def whole_lines(content: bytes) -> Iterator[bytes]:
    """The lines up to the first that a kill or a power cut left torn."""
    for text in content.splitlines(keepends=True):
        try:
            record = json.loads(text)
        except ValueError:
            return
        if not text.endswith(b"\n") or not isinstance(record, dict):
            return
        yield text


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole records of a file, which need not exist. What is torn is cut off, so that the next one begins a line."""
    if not path.exists():
        return []
    content = path.read_bytes()
    good = b"".join(whole_lines(content))
    if len(good) < len(content):
        os.truncate(path, len(good))
    return [json.loads(text) for text in good.splitlines()]


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record and wait until it is on disk."""
    with path.open("ab") as file:
        file.write(line(record))
        file.flush()
        os.fsync(file.fileno())
