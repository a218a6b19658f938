"""The loops over columns as they run here against torch alone, in one run."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor

from benchmarks.clock import now
from bitlathe.model.source import device_named
from bitlathe.numerics import columns
from bitlathe.numerics.lattice import lattice_of
from bitlathe.numerics.scheme import SCHEMES

# Rows that are solved together: a slice of a small linear, and a large one.
_ROWS, _SCHEMES, _TURNS = (32, 256, 4096), ("W4A16", "W2A16G32_ASYM", "NVFP4A16"), 9


def table(*, device: str) -> Iterator[str]:
    """Milliseconds a block of columns, each way, and the ratio turn by turn."""
    place = device_named(device)
    loop = columns.loop_for(torch.zeros(1, device=place))
    yield f"A block of {columns.BLOCK} columns; {_TURNS} turns. Here loops run by `{loop.__module__}.{loop.__name__}`.\n"
    yield "| scheme | rows | solver | torch alone, ms | here, ms | ratio, median (min to max) |"
    yield "|---|---|---|---|---|---|"
    for name in _SCHEMES:
        for rows in _ROWS:
            for solver in ("errors fed back", "descent"):
                alone, here, ratios = _turns(loop, name, rows, solver, place)
                told = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
                yield f"| {name} | {rows} | {solver} | {alone:.2f} | {here:.2f} | {told} |"


def _turns(loop: columns.Loop, name: str, rows: int, solver: str, place: torch.device) -> tuple[float, float, list[float]]:
    width, feeds = columns.BLOCK, solver != "descent"
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(size, width, generator=generator) for size in (rows, 8 * width))
    h = (x.T @ x / len(x)).to(place)
    reach = torch.linalg.cholesky(h.inverse(), upper=True).contiguous() if feeds else h
    lattice, wanted = lattice_of(w.to(place), SCHEMES[name]), w.T.contiguous().to(place)

    def milliseconds(run: columns.Loop) -> float:
        left, found = wanted.clone(), lattice.nearest(wanted)
        errors: Tensor | None = torch.empty_like(left) if feeds else None
        began = now()
        run(left, found, errors, reach, lattice)
        return 1000 * (now() - began)

    found = [(milliseconds(columns.plain), milliseconds(loop)) for _ in range(_TURNS + 1)][1:]  # the first turn warms up
    alone, here = zip(*found, strict=True)
    return median(alone), median(here), [b / a for a, b in found]
