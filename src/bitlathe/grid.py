"""Which linear got which scheme, as a grid of blocks and linears."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from bitlathe.errors import RecipeError
from bitlathe.numerics.scheme import scheme_named
from bitlathe.plan import KEEP

_BLOCK = re.compile(r"(?P<before>.*?\.)(?P<block>\d+)\.(?P<inner>.+)")
_EXPERT = re.compile(r"\.experts\.\d+\.")
# A matrix large enough that what is per tensor does not show in its average.
_TYPICAL = (4096, 4096)
# From few bits to many.
_COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")


def places_of(linears: Mapping[str, str | None]) -> tuple[dict[int, dict[str, str]], dict[str, str]]:
    """Block -> linear of it -> scheme, and the same of linears outside of the blocks; "keep" for None.

    The experts of a block are one linear for each projection, "mlp.experts.*.down_proj"; where they differ, each of their
    schemes once, with slashes.
    """
    blocks: dict[int, dict[str, list[str]]] = {}
    outside: dict[str, str] = {}
    for name, scheme in linears.items():
        place = _BLOCK.fullmatch(name)
        if place is None:
            outside[name] = scheme or KEEP
            continue
        inner = _EXPERT.sub(".experts.*.", place["inner"])
        schemes = blocks.setdefault(int(place["block"]), {}).setdefault(inner, [])
        if (scheme or KEEP) not in schemes:
            schemes.append(scheme or KEEP)
    return {block: {inner: "/".join(found) for inner, found in row.items()} for block, row in blocks.items()}, outside


def bits_of(scheme: str) -> float:
    """About how many bits a weight of a scheme takes; of what is no name in the table, 16."""
    try:
        return scheme_named(scheme).bits(_TYPICAL) / (_TYPICAL[0] * _TYPICAL[1])
    except RecipeError:
        return 16.0


def mixed(linears: Mapping[str, str | None]) -> bool:
    """Whether linears of the blocks have more than one scheme. What every block keeps, such as routers, does not count."""
    blocks, _ = places_of(linears)
    columns = _columns(blocks)
    return len({scheme for row in blocks.values() for inner, scheme in row.items() if inner in columns}) > 1


def _columns(blocks: Mapping[int, Mapping[str, str]]) -> list[str]:
    """The linears of blocks that some block does not keep."""
    return list(dict.fromkeys(inner for row in blocks.values() for inner, scheme in row.items() if scheme != KEEP))


def allocation_grid(linears: Mapping[str, str | None]) -> Table:
    """A row for each block, or for neighbours that are the same, and a column for each linear; None is what is kept.

    A linear that every block keeps has no column; those outside of the blocks are told below. A suffix that all schemes share
    is told in the title and left out.
    """
    blocks, outside = places_of(linears)
    names = dict.fromkeys(scheme for row in blocks.values() for scheme in row.values())
    suffix = _shared([name for name in names if name != KEEP])
    ranks = {name: rank for rank, name in enumerate(sorted(names, key=bits_of))}
    columns = _columns(blocks)
    below = ", ".join(f"{name} {scheme}" for name, scheme in outside.items())
    table = Table(
        "block",
        *(
            inner.rpartition(".")[2].removesuffix("_proj") if "*" not in inner else inner.removesuffix("_proj")
            for inner in columns
        ),
        title=f"Schemes, each ending in {suffix}" if suffix else "Schemes",
        caption=below or None,
        caption_justify="left",
    )
    for first, last in _runs(blocks):
        cells = [blocks[first].get(inner, "") for inner in columns]
        shown = [
            Text(_short(cell, suffix), style=_COLOURS[ranks[cell] * len(_COLOURS) // len(ranks)] if cell else "")
            for cell in cells
        ]
        table.add_row(str(first) if first == last else f"{first}-{last}", *shown)
    return table


def _runs(blocks: Mapping[int, Mapping[str, str]]) -> list[tuple[int, int]]:
    """First and last of neighbouring blocks that are the same."""
    runs: list[tuple[int, int]] = []
    for block, row in blocks.items():
        if runs and blocks[runs[-1][1]] == row:
            runs[-1] = runs[-1][0], block
        else:
            runs.append((block, block))
    return runs


def _shared(names: list[str]) -> str:
    """ "A16" where all names end in it, or another such part that begins with a letter."""
    for suffix in ("A16_ASYM", "A16_CHANNEL", "A16"):
        if len(names) > 1 and all(name.endswith(suffix) for name in names):
            return suffix
    return ""


def _short(scheme: str, suffix: str) -> str:
    return scheme if scheme == KEEP else scheme.removesuffix(suffix)
