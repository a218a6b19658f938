"""Whether a search can be drawn, asked before it begins. What draws is `plot.py`, which needs the extra `plot`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from bitlathe.errors import OutputError, RecipeError

KINDS = (".png", ".svg", ".html")


def refuse_plot(path: Path) -> None:
    """Raise RecipeError for a file that is of no known kind, or where matplotlib is not installed, and OutputError for a folder
    that is not there."""
    if path.suffix.lower() not in KINDS:
        raise RecipeError(f"--plot {path} has the ending {path.suffix!r}: a plot is one of {', '.join(KINDS)}")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} of --plot is not there: make it, or choose another one")
    if find_spec("matplotlib") is None:
        raise RecipeError("--plot needs matplotlib, which is not installed: pip install 'bitlathe[plot]', or leave --plot out")
