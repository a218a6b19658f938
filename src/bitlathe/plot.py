"""A search as a picture: bits against KL divergence, and which linear got which scheme at each budget.

matplotlib's objects alone, without its global state; equal data give equal files.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bitlathe.grid import bits_of, places_of
from bitlathe.io.files import replace_file

_WIDTH, _CURVE, _ROW, _MARGIN = 9.0, 4.0, 0.17, 0.9  # inches
# The same ids in the same picture.
_SETTINGS: Any = {"svg.hashsalt": "bitlathe", "svg.fonttype": "none", "font.size": 9}


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write a picture of what a search found to `path`, a .png, .svg or .html file, all of it or nothing.

    found: {"model", "budgets": [{"asked", "bits", "kl", "error", "linears": {linear: scheme or "keep"}}],
    "uniform": [{"scheme", "bits", "kl", "error"}]}, bits a weight, divergences in nats a token.
    """
    kind = path.suffix.lower().removeprefix(".")
    with matplotlib.rc_context(_SETTINGS):
        figure = _figure(found)
        content = _saved(figure, "svg" if kind == "html" else kind)
    replace_file(path, _page(found, content.decode()) if kind == "html" else content)


def _figure(found: Mapping[str, Any]) -> Figure:
    budgets = sorted(found["budgets"], key=lambda row: row["asked"])
    maps = [_rows(row["linears"]) for row in budgets]
    heights = [_CURVE, *(_MARGIN + _ROW * len(rows) for rows in maps)]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _curve(axes[0], found, budgets)
    schemes = sorted(
        {scheme for rows in maps for row in rows.values() for scheme in row if scheme}, key=lambda s: (bits_of(s), s)
    )
    count = max(len(schemes), 2)
    viridis = matplotlib.colormaps["viridis_r"]
    colours = ListedColormap([viridis(index / (count - 1)) for index in range(count)])
    for ax, row, rows in zip(axes[1:], budgets, maps, strict=True):
        _map(ax, f"{row['asked']:g} bits asked for, {row['bits']:.3f} taken", rows, schemes, colours)
    handles = [Patch(color=colours(index), label=scheme) for index, scheme in enumerate(schemes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    return figure


def _curve(ax: Axes, found: Mapping[str, Any], budgets: list[Mapping[str, Any]]) -> None:
    least = min((row["kl"] for row in (*budgets, *found["uniform"]) if row["kl"] > 0), default=1.0) / 3  # zero is drawn as
    mixes, uniform = sorted(budgets, key=lambda row: row["bits"]), sorted(found["uniform"], key=lambda row: row["bits"])
    for rows, style, label in ((uniform, "s--", "one scheme for all"), (mixes, "o-", "mixes")):
        if rows:
            ax.errorbar(
                [row["bits"] for row in rows],
                [max(row["kl"], least) for row in rows],
                yerr=[row["error"] or 0.0 for row in rows],
                fmt=style,
                label=label,
                markersize=4,
                capsize=2,
                linewidth=1,
                color="C7" if rows is uniform else "C0",
            )
    for row in uniform:
        at = row["bits"], max(row["kl"], least)
        ax.annotate(row["scheme"], at, xytext=(6, 6), textcoords="offset points", fontsize=7)
    ax.margins(x=0.08, y=0.12)
    ax.set_yscale("log")
    ax.set_xlabel("bits a weight, as the file holds them")
    ax.set_ylabel("KL divergence, nats a token")
    ax.set_title(f"{found['model']}: schemes for each linear against one for all", parse_math=False)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)


def _rows(linears: Mapping[str, str]) -> dict[str, list[str]]:
    """Linear of a block, or one outside -> its scheme in each block, "" where it is not."""
    blocks, outside = places_of(linears)
    inner = dict.fromkeys(name for row in blocks.values() for name in row)
    rows = {name: [row.get(name, "") for row in blocks.values()] for name in inner}
    return rows | {name: [scheme] * max(len(blocks), 1) for name, scheme in outside.items()}


def _map(ax: Axes, title: str, rows: Mapping[str, list[str]], schemes: list[str], colours: ListedColormap) -> None:
    numbers = [[schemes.index(scheme) if scheme else float("nan") for scheme in row] for row in rows.values()]
    norm = BoundaryNorm([index - 0.5 for index in range(len(schemes) + 1)], colours.N) if len(schemes) > 1 else None
    ax.pcolormesh(numbers, cmap=colours, norm=norm, edgecolors="white", linewidth=0.5)
    ax.invert_yaxis()
    ax.set_yticks([index + 0.5 for index in range(len(rows))], list(rows), fontsize=7)
    blocks = len(numbers[0]) if numbers else 0
    ax.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    ticks = [int(tick) for tick in ax.get_xticks() if 0 <= tick < blocks]
    ax.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks], fontsize=7)
    ax.set_title(title, fontsize=9, loc="left")
    ax.tick_params(length=0)


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = BytesIO()
    # Without a date, or the same data would give other files.
    unsaid = ("Date", "Creator", "Format", "Type") if kind == "svg" else ("Software",)
    figure.savefig(buffer, format=kind, dpi=150, metadata=dict.fromkeys(unsaid))
    return buffer.getvalue()


def _page(found: Mapping[str, Any], svg: str) -> bytes:
    """One page: the picture, and its numbers as tables."""
    loader = Environment(loader=PackageLoader("bitlathe", "data"), undefined=StrictUndefined, trim_blocks=True, autoescape=True)
    picture = svg[svg.index("<svg") :]
    return loader.get_template("search.html.jinja").render(found=found, picture=picture).encode()
