"""From scores to a plan: solved for the budget, measured, corrected by what was measured, and measured again.

Scores of different linears are added up, which is right only for small errors: a sum of large ones loses more than its parts
say, and how much depends on the option. Every uniform choice is measured anyway, since no mix may be worse; its true divergence
over the sum of its scores is what that option's scores are corrected by. Chosen is what measured best among the solutions with
all, half and none of the correction, their neighbours, and the uniform choices, as far as the budget holds them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from bitlathe.autoscheme.allocate import allocate
from bitlathe.autoscheme.ground import Ground, Listen
from bitlathe.autoscheme.kept import Kept, Measured
from bitlathe.autoscheme.measure import measure
from bitlathe.autoscheme.score import score
from bitlathe.autoscheme.space import Choice, Space
from bitlathe.plan import Plan

# How much of the correction is applied, as a power of it.
_STRENGTHS = (0.0, 0.5, 1.0)
_NEIGHBOURS = 3
# What the plan is kept under in which all that is in play is kept.
_NOTHING = "nothing"
# Plans that are measured in one walk: each has hidden states of its own.
_AT_ONCE = 16


@dataclass(frozen=True)
class Found:
    """What a search chose for a budget. asked: bits a weight; bits: what the choice takes."""

    asked: float
    bits: float
    choice: Choice
    measured: Measured


@dataclass(frozen=True)
class Outcome:
    """founds: one for each budget, in their order. uniform: option -> its bits and what was measured."""

    founds: tuple[Found, ...]
    uniform: Mapping[str, tuple[float, Measured]]


def choose(ground: Ground, kept: Kept, budgets: Sequence[float], listen: Listen) -> Outcome:
    """The best choice for each budget (bits a weight in play, each within the space's range)."""
    score(ground, kept, listen)
    space, losses = ground.space, _losses(ground.space, kept)
    known: dict[str, Choice] = {}

    def look(choices: Iterable[Choice], plans: Mapping[str, Plan] | None = None) -> None:
        new = {space.key(choice): choice for choice in choices}
        known.update(new)
        asked = {key: space.planned(choice) for key, choice in new.items()} | dict(plans or {})
        left = [key for key in asked if key not in kept.measured]
        for first in range(0, len(left), _AT_ONCE):
            keys = left[first : first + _AT_ONCE]
            for key, found in zip(keys, measure(ground, kept, [asked[key] for key in keys], listen), strict=True):
                kept.measure(key, found)

    def best(bits: float) -> Choice:
        fitting = [choice for choice in known.values() if space.size(choice) <= space.budget(bits)]
        return min(fitting, key=lambda choice: (_divergence(kept.measured[space.key(choice)]), space.size(choice)))

    look(space.uniform.values(), {_NOTHING: space.nothing})
    factors = _factors(space, losses, kept)
    solved = {bits: _solutions(space, losses, factors, bits) for bits in budgets}
    look(choice for choices in solved.values() for choice in choices)
    corrected = _corrected(losses, factors, 1.0)
    look(neighbour for bits in budgets for neighbour in _neighbours(space, corrected, best(bits), bits))
    founds = []
    for bits in budgets:
        choice = best(bits)
        founds.append(Found(bits, space.bits(choice), choice, kept.measured[space.key(choice)]))
    uniform = {option: (space.bits(choice), kept.measured[space.key(choice)]) for option, choice in space.uniform.items()}
    return Outcome(tuple(founds), uniform)


def _divergence(found: Measured) -> float:
    """For comparison: what is no number is worse than all that are."""
    return found.kl if isfinite(found.kl) else inf


def _losses(space: Space, kept: Kept) -> dict[str, dict[str, float]]:
    """Group -> option -> the sum of the scores of its linears."""
    return {
        group: {option: sum(kept.scores[name][option].loss for name in names) for option in space.sizes[group]}
        for group, names in space.groups.items()
    }


def _factors(space: Space, losses: Mapping[str, Mapping[str, float]], kept: Kept) -> dict[str, float]:
    """Option -> what the sum of its scores has to be multiplied by to be what was measured; 1 where that is not known."""
    factors = dict.fromkeys(space.options, 1.0)
    for option, choice in space.uniform.items():
        total = sum(losses[group][option] for group in choice)
        # What a cache, overrides, and turned weights in 16 bits lose is lost whatever is chosen.
        true = kept.measured[space.key(choice)].kl - kept.measured[_NOTHING].kl
        if total > 0 and true > 0:
            factors[option] = true / total
    return factors


def _corrected(
    losses: Mapping[str, Mapping[str, float]], factors: Mapping[str, float], strength: float
) -> dict[str, dict[str, float]]:
    return {
        group: {option: loss * factors[option] ** strength for option, loss in options.items()}
        for group, options in losses.items()
    }


def _solutions(
    space: Space, losses: Mapping[str, Mapping[str, float]], factors: Mapping[str, float], bits: float
) -> list[Choice]:
    return [allocate(_corrected(losses, factors, strength), space.sizes, space.budget(bits)) for strength in _STRENGTHS]


def _neighbours(space: Space, losses: Mapping[str, Mapping[str, float]], choice: Choice, bits: float) -> list[Choice]:
    """Choices within the budget that move one group up to a larger option and another one down, or one alone: those that the
    scores like best."""
    room = space.budget(bits) - space.size(choice)
    moves = {group: _moves(space.sizes[group], losses[group], option) for group, option in choice.items()}
    alone = [(loss, ((group, option),)) for group, found in moves.items() for size, loss, option in found if size <= room]
    pairs = [
        (up_loss + down_loss, ((up, up_option), (down, down_option)))
        for up, ups in moves.items()
        for up_size, up_loss, up_option in ups
        if up_size > room
        for down, downs in moves.items()
        for down_size, down_loss, down_option in downs
        if down != up and up_size + down_size <= room
    ]
    best = heapq.nsmallest(_NEIGHBOURS, alone + pairs)
    return [{**choice, **dict(changes)} for _, changes in best]


def _moves(sizes: Mapping[str, int], losses: Mapping[str, float], option: str) -> list[tuple[int, float, str]]:
    """(bits more, loss more, option) of the next larger and the next smaller option."""
    by_size = sorted(sizes, key=lambda name: (sizes[name], name))
    place = by_size.index(option)
    near = [*by_size[max(0, place - 1) : place], *by_size[place + 1 : place + 2]]
    return [(sizes[other] - sizes[option], losses[other] - losses[option], other) for other in near]
