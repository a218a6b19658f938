"""The time when all that was asked of a device is done."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Seconds, of which differences count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
