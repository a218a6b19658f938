"""The rotations that users can name, and what is typed for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Turn:
    """A rotation that users can name.

    space, kind: of its Rotation, the kind unless another is asked for. turns: what is turned. applied: folded into weights, or
    online. reader: what it spreads the outliers for.
    """

    space: Literal["residual", "value", "qk", "mid"]
    kind: Literal["hadamard", "random"]
    turns: str
    applied: str
    reader: str


ROTATIONS: dict[str, Turn] = {
    "R1": Turn(
        "residual", "random", "the residual stream", "folded; online where blocks end in a norm", "what q, k, v, gate, up read"
    ),
    "R2": Turn("value", "random", "the values of each head", "folded", "what o_proj reads; cached values"),
    "R3": Turn("qk", "hadamard", "keys after RoPE, and back again", "online", "cached keys"),
    "R4": Turn("mid", "hadamard", "the space behind the gate", "online", "what down_proj reads"),
}
# Everything that folds into weights, so that any reader can load the result.
_TOGETHER: dict[str, tuple[str, ...]] = {"HADAMARD": ("R1", "R2")}


def rotations_named(names: Iterable[str]) -> tuple[str, ...]:
    """Rotations as they are typed, in the order of the table, a kind only where it is not the usual one."""
    chosen: dict[str, str] = {}
    for typed in names:
        for part in _TOGETHER.get(typed.upper(), (typed,)):
            name, kind = turn_named(part)
            if name in chosen:
                raise ValueError(f"{name} is named twice")
            chosen[name] = name if kind == ROTATIONS[name].kind else f"{name}:{kind}"
    return tuple(chosen[name] for name in ROTATIONS if name in chosen)


def turn_named(typed: str) -> tuple[str, Literal["hadamard", "random"]]:
    """A name and a kind from "r4:Random"; the usual kind where none is typed. Raises ValueError for an unknown name or kind."""
    name, colon, kind = (part.strip() for part in typed.partition(":"))
    if name.upper() not in ROTATIONS:
        known = "; ".join(f"{known} turns {turn.turns}" for known, turn in ROTATIONS.items())
        raise ValueError(f"unknown rotation {typed!r}. Known: {known}. hadamard is R1 and R2, none is nothing")
    turn = ROTATIONS[name.upper()]
    match kind.lower():
        case "hadamard" | "random" as known:
            return name.upper(), known
        case "" if not colon:
            return name.upper(), turn.kind
    raise ValueError(f"unknown kind of rotation {typed!r}. Known: {name.upper()}:hadamard, {name.upper()}:random (its signs)")
