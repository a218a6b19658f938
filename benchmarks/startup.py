"""How soon the package imports and the command line answers, as whole processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

_RUNS = 9
_COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import bitlathe'": [sys.executable, "-c", "import bitlathe"],
    "bitlathe --help": [sys.executable, "-m", "bitlathe", "--help"],
    "bitlathe quantize --help": [sys.executable, "-m", "bitlathe", "quantize", "--help"],
}


def table() -> Iterator[str]:
    """One row for every command; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    for _ in range(_RUNS):
        for name, command in _COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - started)
    yield "| command | seconds, median (min to max) |"
    yield "|---|---|"
    for name, seconds in times.items():
        yield f"| `{name}` | {median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) |"
