"""A search as a picture: bits against KL divergence, and which linear got which scheme at each budget.

matplotlib's objects alone, without its global state; equal data give equal files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, PathPatch, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from bitlathe.grid import allocation, bits_of, labels_of, places_of
from bitlathe.io.files import replace_file

_WIDTH, _CURVE, _ROW, _MARGIN = 9.0, 4.2, 0.15, 0.55  # inches
# Maps of so many blocks fit side by side.
_HALF = 40
# Lines and words; a page gives them the colour of its own words. Mixes stand out on light and on dark.
_INK, _MIXES = "#1b1e23", "#d55e00"
_COLOUR_KEYS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
# The same ids in the same picture, and words that can be searched for.
_SETTINGS: Any = {
    **{"svg.hashsalt": "bitlathe", "svg.fonttype": "none", "font.size": 9, "axes.linewidth": 0.6},
    **dict.fromkeys(_COLOUR_KEYS, _INK),
}
_LEGEND: Any = {"frameon": False, "fontsize": 8, "handlelength": 1.4, "columnspacing": 1.4}
# Where a label may stand beside its point, as (right, up), and how far from it, in points; the first that is free.
_SIDES = ((1, 1), (1, 0), (0, 1), (1, -1), (-1, -1), (-1, 0), (0, -1), (-1, 1))
_FAR = (5, 12, 20, 30, 42)

Rows = Mapping[str, Sequence[str]]
Point = tuple[float, float]
Named = tuple[str, Point]


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write a picture of what a search found to `path`, a .png, .svg or .html file, all of it or nothing.

    found: {"model", "budgets": [{"asked", "bits", "kl", "error", "linears": {linear: scheme or "keep"}}],
    "uniform": [{"scheme", "bits", "kl", "error"}]}, bits a weight, divergences in nats a token.
    """
    kind = path.suffix.lower().removeprefix(".")
    # Whatever the user's own settings are.
    with style.context(_SETTINGS, after_reset=True):
        figure = figure_of(found)
        content = _saved(figure, kind)
    replace_file(path, _page(found, content.decode()) if kind == "html" else content)


def figure_of(found: Mapping[str, Any]) -> Figure:
    """The picture of what `draw` takes, with its names placed."""
    budgets = sorted(found["budgets"], key=lambda row: row["asked"])
    maps = [_rows(row["linears"]) for row in budgets]
    blocks = max((blocks for _, _, blocks in maps), default=0)
    # One map, or one of many blocks, has the whole width.
    beside = 2 if len(maps) > 1 and blocks <= _HALF else 1
    longest = max((len(inner) + len(outside) for inner, outside, _ in maps), default=0)
    height = (_MARGIN + _ROW * longest) * -(-len(maps) // beside) + 0.5 if maps else 0.0
    figure = Figure(figsize=(_WIDTH, _CURVE + height), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    colours = _colours([*(row for inner, outside, _ in maps for row in (*inner.values(), *outside.values()))], found)
    parts: Any = figure.subfigures(2 if maps else 1, 1, squeeze=False, height_ratios=[_CURVE, height] if maps else None)[:, 0]
    axes, names, avoid = _curve(parts[0], found, budgets, colours)
    if maps:
        below = parts[1]
        grid = below.subplots(-(-len(maps) // beside), beside, squeeze=False)
        for ax in grid.flat[len(maps) :]:
            ax.set_axis_off()
        for place, (row, rows) in enumerate(zip(budgets, maps, strict=True)):
            _map(grid.flat[place], _told(row), rows, colours)
            if place % beside and [*rows[0], *rows[1]] == [*maps[place - 1][0], *maps[place - 1][1]]:
                grid.flat[place].tick_params(labelleft=False)
            else:
                # In the line of the blocks' numbers, above the linears.
                at: Any = {"xytext": (-2, 2), "textcoords": "offset points", "ha": "right", "va": "bottom"}
                grid.flat[place].annotate("block", (0, 1), xycoords="axes fraction", fontsize=6.5, **at).set_in_layout(False)
        handles = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
        below.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 8), **_LEGEND)
    figure.draw_without_rendering()
    _label(axes, names, avoid, canvas)
    return figure


def _colours(rows: Sequence[Sequence[str]], found: Mapping[str, Any]) -> dict[str, Any]:
    """Scheme -> its colour, from few bits (light) to many; viridis, which eyes of every kind read."""
    schemes = {scheme for row in rows for scheme in row if scheme} | {row["scheme"] for row in found["uniform"]}
    viridis, steps = matplotlib.colormaps["viridis_r"], max(len(schemes) - 1, 1)
    ordered = sorted(schemes, key=lambda scheme: (bits_of(scheme), scheme))
    return {scheme: viridis(0.02 + 0.93 * rank / steps) for rank, scheme in enumerate(ordered)}


def _told(row: Mapping[str, Any]) -> str:
    error = "" if row["error"] is None else f" ± {row['error']:.1g}"
    return f"{row['asked']:g} bits asked for, {row['bits']:.3f} taken: KL {row['kl']:.3g}{error}"


def _curve(
    within: SubFigure, found: Mapping[str, Any], budgets: Sequence[Mapping[str, Any]], colours: Mapping[str, Any]
) -> tuple[Axes, list[Named], list[Point]]:
    """The axes, the points that want a name, and those that names should not cover: of the line, of error bars, of markers."""
    ax, mixes = within.subplots(), sorted(budgets, key=lambda row: (row["bits"], -row["kl"]))
    rows = [*found["uniform"], *mixes]
    least = min((row["kl"] for row in rows if row["kl"] > 0), default=1.0) / 3  # what zero is drawn as
    points = [(row["bits"], max(row["kl"], least)) for row in mixes]
    bars: Any = {"elinewidth": 0.9, "capsize": 2.5, "markersize": 5}
    for row in found["uniform"]:
        ax.errorbar(
            row["bits"], max(row["kl"], least), row["error"], fmt="s", color=colours[row["scheme"]], ecolor=_INK,
            markeredgecolor=_INK, markeredgewidth=0.5, zorder=2, **bars,
        )  # fmt: skip
    if mixes:
        errors = [float("nan") if row["error"] is None else row["error"] for row in mixes]
        line = "a scheme for each linear, chosen by the search"
        bits, values = zip(*points, strict=True)
        ax.errorbar(bits, values, errors, fmt="o-", color=_MIXES, linewidth=1.3, zorder=3, label=line, **bars)
    if found["uniform"]:
        ax.plot([], [], "s", color="none", markeredgecolor=_INK, label="one scheme for all")
    ax.set_yscale("log", nonpositive="clip")
    values = [value for row in rows for value in (max(row["kl"], least), row["kl"] + (row["error"] or 0.0)) if value > 0]
    lower, upper = min(values, default=1.0), max(values, default=1.0)
    room = max(1.35, 2 / (upper / lower) ** 0.5)  # of less than a factor of four an axis has no ticks
    ax.set_ylim(lower / room, upper * room)
    ax.margins(x=0.09)
    ratio = upper / lower * room**2
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 300 else (1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    ax.set_xlabel("bits a weight, as the file holds them")
    ax.set_ylabel("KL divergence, nats a token")
    ax.set_title(found["model"], parse_math=False, fontweight="bold")
    ax.grid(color="#808080", alpha=0.25, linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    if rows:
        ax.legend(frameon=False, loc="upper right")
    names = [
        (row["scheme"] if row["kl"] > 0 else f"{row['scheme']} (0)", (row["bits"], max(row["kl"], least)))
        for row in sorted(found["uniform"], key=lambda row: (row["bits"], -row["kl"]))
    ]
    return ax, names, _occupied(rows, points, least)


def _occupied(rows: Sequence[Mapping[str, Any]], points: Sequence[Point], least: float) -> list[Point]:
    steps = np.linspace(0, 1, 60)
    found = [
        (row["bits"], max(row["kl"] + part * (row["error"] or 0.0), least)) for row in rows for part in (-1, -0.5, 0, 0.5, 1)
    ]
    for (x, y), (right, up) in pairwise(points):
        found += zip((x + (right - x) * steps).tolist(), (y * (up / y) ** steps).tolist(), strict=True)
    return found


def _label(ax: Axes, names: Sequence[Named], avoid: Sequence[Point], canvas: FigureCanvasAgg) -> None:
    """Names, each at the nearest place where it covers nothing; those that are far have a line to their point."""
    renderer, frame, legend = canvas.get_renderer(), ax.get_window_extent(), ax.get_legend()
    taken = [] if legend is None else [legend.get_window_extent(renderer)]
    covered = ax.transData.transform(np.array(avoid).reshape(-1, 2))
    for name, point in names:
        note = ax.annotate(name, point, xytext=(0, 0), textcoords="offset points", fontsize=7.5, zorder=4)
        note.set_in_layout(False)
        places = [(right * far, up * far) for far in _FAR for right, up in _SIDES]
        boxes = [_placed(note, place).get_window_extent(renderer) for place in places]
        costs = [
            100 * (not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1))
            + 20 * box.count_overlaps(taken)
            + box.padded(2).count_contains(covered)
            for box in boxes
        ]
        best = costs.index(min(costs))
        _placed(note, places[best])
        taken.append(boxes[best])
        if best >= len(_SIDES):
            line: Any = {"arrowstyle": "-", "linewidth": 0.5, "color": _INK, "shrinkA": 0, "shrinkB": 3}
            ax.annotate("", point, places[best], textcoords="offset points", arrowprops=line, zorder=1).set_in_layout(False)


def _placed(note: Annotation, place: Point) -> Annotation:
    """The note, moved by so many points from what it names."""
    x, y = place
    note.set_position(place)
    note.set_horizontalalignment("left" if x > 0 else "right" if x < 0 else "center")
    note.set_verticalalignment("bottom" if y > 0 else "top" if y < 0 else "center")
    return note


def _rows(linears: Mapping[str, str]) -> tuple[dict[str, list[str]], dict[str, list[str]], int]:
    """Linear of a block -> its scheme in each block, "" where it is not; linear outside -> its own; how many blocks."""
    blocks, outside = places_of(linears)
    labels = labels_of(dict.fromkeys(name for row in blocks.values() for name in row))
    inner = {label: [row.get(name, "") for row in blocks.values()] for name, label in labels.items()}
    return inner, {name: [scheme] for name, scheme in outside.items()}, len(blocks)


def _map(ax: Axes, title: str, rows: tuple[Rows, Rows, int], colours: Mapping[str, Any]) -> None:
    inner, outside, blocks = rows
    wide = max(blocks, 1)
    between, apart = wide / 1000, 0.4  # of cells, as seen equally narrow at any depth, and of what is outside of the blocks
    tops = {name: float(place) for place, name in enumerate(inner)}
    tops |= {name: len(inner) + apart + place for place, name in enumerate(outside)}
    cells: dict[str, list[Outline]] = {}
    for name, row in {**inner, **outside}.items():
        width = wide / len(row)
        for place, scheme in enumerate(row):
            if scheme:
                rectangle = Rectangle((place * width + between, tops[name] + 0.04), width - 2 * between, 0.92)
                cells.setdefault(scheme, []).append(rectangle.get_transform().transform_path(rectangle.get_path()))
    for scheme, outlines in cells.items():
        # One shape for all cells of a scheme, or files of deep models are large.
        ax.add_patch(PathPatch(Outline.make_compound_path(*outlines), facecolor=colours[scheme], linewidth=0))
    ax.set_xlim(0, wide)
    ax.set_ylim(max(tops.values(), default=0.0) + 1, 0)
    ax.set_yticks([top + 0.5 for top in tops.values()], list(tops), fontsize=7)
    numbers = [
        int(tick)
        for tick in MaxNLocator(nbins=18, steps=[1, 2, 5, 10], integer=True).tick_values(0, wide - 1)
        if 0 <= tick < blocks
    ]
    ax.set_xticks([number + 0.5 for number in numbers], [str(number) for number in numbers], fontsize=6.5)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, pad=2)
    ax.set_title(title, fontsize=8.5, loc="left", pad=5)
    ax.spines[:].set_visible(False)


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = BytesIO()
    # Without a date, or the same data would give other files.
    unsaid = ("Software",) if kind == "png" else ("Date", "Creator", "Format", "Type")
    figure.savefig(
        buffer, format="png" if kind == "png" else "svg", dpi=150, transparent=kind == "html", metadata=dict.fromkeys(unsaid)
    )
    return buffer.getvalue()


def _page(found: Mapping[str, Any], svg: str) -> bytes:
    """One page: the picture, and its numbers as tables."""
    loader = Environment(loader=PackageLoader("bitlathe", "data"), undefined=StrictUndefined, trim_blocks=True, autoescape=True)
    picture = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    maps = [allocation(row["linears"]) for row in found["budgets"]]
    return loader.get_template("search.html.jinja").render(found=found, picture=picture, maps=maps).encode()
