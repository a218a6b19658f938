"""Names that users type, and the functions and classes they stand for.

A registry is a literal dict of name -> "module:attribute". Reading one imports nothing, so recipes and `--help` may; what it
names is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from bitlathe.errors import RecipeError


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence to append: " Did you mean ...?" where something in `known` is close to `name`, else nothing."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def canonical(name: str, table: Mapping[str, str], kind: str, aliases: Mapping[str, str] | None = None) -> str:
    """The table's spelling of a name; case, "-" and "_" do not matter. kind: what the table holds, for the message.

    Raises RecipeError for a name that is neither in `table` nor in `aliases`, listing the known ones.
    """
    spellings = {_key(known): known for known in table} | {_key(alias): known for alias, known in (aliases or {}).items()}
    if _key(name) not in spellings:
        raise RecipeError(f"unknown {kind} {name!r}. Known: {', '.join(table)}.{did_you_mean(name, table)}")
    return spellings[_key(name)]


def resolve(name: str, table: Mapping[str, str], kind: str) -> Any:
    """What a name stands for, imported. Raises RecipeError for an unknown one."""
    return load(table[canonical(name, table, kind)])


def load(target: str) -> Any:
    """The attribute that "module:attribute" names."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
