"""The best option for every group within a budget: the multiple-choice knapsack, solved exactly.

Groups are taken one after the other. A state is what the groups so far may cost: a size and the least loss for that size. Of
two states the one that is neither smaller nor better is dropped, and so is every state that cannot end below the best solution
that is known: what the other groups lose at the least is bounded by letting them mix two options each (the linear relaxation,
whose optimum walks down the lower convex hulls of their options, steepest step first). The bound is so close that few states
are left, and nothing is rounded: sizes are integers. (Kellerer, Pferschy, Pisinger, "Knapsack Problems", chapter 11.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# States are dropped when they cannot come within this part of the largest loss of the best known one: sums in another order
# give other last digits.
_SLACK = 1e-12


def allocate(losses: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]], budget: int) -> dict[str, str]:
    """Group -> option, with the least sum of losses among all choices whose sizes sum to at most `budget`.

    losses, sizes: group -> option -> what it loses (any unit, not negative) and takes (bits). Of choices with the same loss the
    smaller one. Raises ValueError when even the smallest options take more than the budget.
    """
    tables = {group: _undominated(options, sizes[group]) for group, options in losses.items()}
    least = sum(table[0].size for table in tables.values())
    if least > budget:
        raise ValueError(f"the smallest options take {least}, and the budget is {budget}")
    order = sorted(tables, key=lambda group: tables[group][-1].size - tables[group][0].size)
    bounds = _bounds([tables[group] for group in order])
    slack = _SLACK * sum(table[0].loss for table in tables.values())
    best = _greedy(bounds[0], list(tables.values()), budget) + slack
    sizes_so_far, losses_so_far = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # state -> the state it came from, and the option it took
    for group, bound in zip(order, bounds[1:], strict=True):
        table = tables[group]
        tried_sizes = sizes_so_far[:, None] + np.array([item.size for item in table])
        tried_losses = losses_so_far[:, None] + np.array([item.loss for item in table])
        flat, loss = tried_sizes.ravel(), tried_losses.ravel()
        hopeful = np.flatnonzero(bound.of(budget - flat) + loss <= best)
        kept = hopeful[_pareto(flat[hopeful], loss[hopeful])]
        steps.append((kept // len(table), kept % len(table)))
        sizes_so_far, losses_so_far = flat[kept], loss[kept]
    state, choice = len(losses_so_far) - 1, {}
    for group, (came_from, took) in zip(reversed(order), reversed(steps), strict=True):
        choice[group] = tables[group][took[state]].option
        state = came_from[state]
    return {group: choice[group] for group in losses}


@dataclass(frozen=True)
class _Item:
    option: str
    size: int
    loss: float


def _undominated(losses: Mapping[str, float], sizes: Mapping[str, int]) -> list[_Item]:
    """Options by size, each with less loss than all smaller ones."""
    found: list[_Item] = []
    for item in sorted((_Item(option, sizes[option], loss) for option, loss in losses.items()), key=lambda i: (i.size, i.loss)):
        if not found or item.loss < found[-1].loss:
            found.append(item)
    return found


def _hull(table: Sequence[_Item]) -> list[_Item]:
    """The options on the lower convex hull of loss by size."""
    hull: list[_Item] = []
    for item in table:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], item):
            hull.pop()
        hull.append(item)
    return hull


def _slope(a: _Item, b: _Item) -> float:
    return (b.loss - a.loss) / (b.size - a.size)


@dataclass(frozen=True)
class _Bound:
    """The least loss of some groups by the room they have, relaxed: a convex, piecewise linear function."""

    rooms: np.ndarray
    losses: np.ndarray

    def of(self, rooms: np.ndarray) -> np.ndarray:
        """Infinite where the smallest options do not fit."""
        return np.where(rooms < self.rooms[0], np.inf, np.interp(rooms, self.rooms, self.losses))


def _bounds(tables: Sequence[Sequence[_Item]]) -> list[_Bound]:
    """For every k the bound of the groups from the k-th on."""
    hulls = [_hull(table) for table in tables]
    bounds = []
    for first in range(len(tables) + 1):
        steps = [(_slope(a, b), b.size - a.size, b.loss - a.loss) for hull in hulls[first:] for a, b in pairwise(hull)]
        steps.sort()
        start = sum(hull[0].size for hull in hulls[first:]), sum(hull[0].loss for hull in hulls[first:])
        rooms = start[0] + np.concatenate([[0], np.cumsum([step[1] for step in steps])])
        bounds.append(_Bound(rooms, start[1] + np.concatenate([[0.0], np.cumsum([step[2] for step in steps])])))
    return bounds


def _greedy(bound: _Bound, tables: Sequence[Sequence[_Item]], budget: int) -> float:
    """The loss of a good solution: steps down the hulls, steepest first, those left out that do not fit."""
    steps = []
    for group, table in enumerate(tables):
        hull = _hull(table)
        steps += [(_slope(a, b), group, place, b.size - a.size, b.loss - a.loss) for place, (a, b) in enumerate(pairwise(hull))]
    at = [0] * len(tables)
    room, loss = budget - int(bound.rooms[0]), float(bound.losses[0])
    for _, group, place, more, change in sorted(steps):
        if at[group] == place and more <= room:
            at[group], room, loss = place + 1, room - more, loss + change
    return loss


def _pareto(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices, by size, of the states with less loss than every smaller one."""
    order = np.lexsort((losses, sizes))
    ordered = losses[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(ordered)[:-1]])
    return order[ordered < before]
