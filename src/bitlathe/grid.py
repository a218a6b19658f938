"""Which linear got which scheme, as a grid of blocks and linears."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table
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
# What all schemes may share, in the order in which names have it.
_PARTS = ("A16", "G32", "G64", "_CHANNEL", "_ASYM")
# Seven names of this width fit in a line of 120 characters; longer ones are abbreviated.
_NARROW = 12
_BRIEF: dict[str, str] = {"_CHANNEL": "_CH", "_ASYM": "_AS"}


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
    """About how many bits a weight of a scheme takes, of several with slashes their mean; 16 of a name that no table has."""
    if "/" in scheme:
        return fmean(bits_of(part) for part in scheme.split("/"))
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


def labels_of(columns: Iterable[str]) -> dict[str, str]:
    """Linear of a block -> what it is called in little room: its last name, experts named as such; what two linears would
    share is told apart by what they are in, "shared_expert.up_proj"."""
    parts = {column: [part for part in column.split(".") if part != "*"] for column in columns}
    labels = {column: ".".join(names[-2:] if "experts" in names else names[-1:]) for column, names in parts.items()}
    counts = Counter(labels.values())
    return {column: label if counts[label] == 1 else ".".join(parts[column][-2:]) for column, label in labels.items()}


def allocation(linears: Mapping[str, str | None]) -> tuple[list[str], list[tuple[str, list[str]]], dict[str, str]]:
    """The names of the linears that some block does not keep; (block, or "3-7" for neighbours that are the same, the scheme of
    each, "" where there is none); linear outside of the blocks -> scheme."""
    blocks, outside = places_of(linears)
    columns = labels_of(_columns(blocks))
    rows = [
        (str(first) if first == last else f"{first}-{last}", [blocks[first].get(inner, "") for inner in columns])
        for first, last in _runs(blocks)
    ]
    return list(columns.values()), rows, outside


def allocation_grid(linears: Mapping[str, str | None]) -> Table:
    """A row for each block, or for neighbours that are the same, and a column for each linear; None is what is kept.

    A linear that every block keeps has no column; those outside of the blocks are told below. What all schemes share, such as
    A16, is told in the title and left out.
    """
    columns, rows, outside = allocation(linears)
    names = {scheme for _, cells in rows for scheme in cells if scheme}
    ranks = {name: rank for rank, name in enumerate(sorted(names, key=lambda name: (bits_of(name), name)))}
    short, told = _short(names)
    table = Table(
        Column("block", no_wrap=True),
        *(Column(_headed(label), overflow="fold", vertical="bottom") for label in columns),
        title="; ".join(["Schemes", *told]),
        title_justify="left",
        caption=escape(", ".join(f"{name} {scheme}" for name, scheme in outside.items())) or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for block, cells in rows:
        shown = [Text(short[cell], _COLOURS[ranks[cell] * len(_COLOURS) // len(ranks)]) if cell else Text() for cell in cells]
        table.add_row(block, *shown)
    return table


def _headed(label: str) -> str:
    """A label in several lines, since schemes are narrow."""
    *within, own = label.split(".")
    return "\n".join([*(part.replace("_", "\n") for part in within), own.removesuffix("_proj")])


def _runs(blocks: Mapping[int, Mapping[str, str]]) -> list[tuple[int, int]]:
    """First and last of neighbouring blocks that are the same."""
    runs: list[tuple[int, int]] = []
    for block, row in blocks.items():
        if runs and runs[-1][1] == block - 1 and blocks[block - 1] == row:
            runs[-1] = runs[-1][0], block
        else:
            runs.append((block, block))
    return runs


def _short(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Name -> what is shown of it, and what the reader has to be told about that."""
    short, told = {name: name for name in names}, []
    single = {part for name in short for part in name.split("/")} - {KEEP}
    shared = [part for part in _PARTS if len(single) > 1 and all(part in name for name in single)]
    for part in shared:
        short = {name: shown.replace(part, "") for name, shown in short.items()}
    if shared:
        told.append(f"{''.join(shared)} is left out of every name")
    for part, brief in _BRIEF.items():
        if any(part in shown and len(shown) > _NARROW for shown in short.values()):
            short = {name: shown.replace(part, brief) for name, shown in short.items()}
            told.append(f"{brief} is {part}")
    return short, told
