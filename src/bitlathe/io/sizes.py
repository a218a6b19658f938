"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from bitlathe.errors import RecipeError

BINARY = ("KiB", "MiB", "GiB", "TiB")
UNITS = {
    "": 1,
    "b": 1,
    **{unit.lower(): 1024 ** (i + 1) for i, unit in enumerate(BINARY)},
    **{unit: 1000 ** (i + 1) for i, unit in enumerate(("kb", "mb", "gb", "tb"))},
    # a bare letter is binary, as for Slurm, Docker and systemd
    **{unit: 1024 ** (i + 1) for i, unit in enumerate("kmgt")},
}


def human(nbytes: int) -> str:
    """A size for people, in binary units: 1.2 GiB."""
    if abs(nbytes) < 1024:
        return f"{nbytes} bytes"
    size = float(nbytes)
    for unit in BINARY:
        size /= 1024
        # what would print as 1024.0 is one of the next unit
        if abs(size) < 1023.95:
            return f"{size:.1f} {unit}"
    return f"{size:.1f} {BINARY[-1]}"


def parse_size(text: str | int) -> int:
    """A size in bytes from "4GiB", "500MB", "1.5 GiB", "4G" (binary) or a plain number of bytes. Raises RecipeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    if match is None or match[2].lower() not in UNITS:
        raise RecipeError(f"{text} is not a size; write a number and a unit, such as 4GiB, 500MB or 1073741824 (bytes)")
    whole, _, fraction = match[1].partition(".")
    return int(whole + fraction) * UNITS[match[2].lower()] // 10 ** len(fraction)
