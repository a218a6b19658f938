"""The knapsack: exact against every choice, within the budget, and fast enough for hundreds of groups."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlathe.autoscheme.allocate import allocate

OPTIONS = st.dictionaries(
    st.sampled_from("abcd"), st.tuples(st.integers(1, 12), st.floats(0, 4) | st.integers(0, 3).map(float)), min_size=1
)


def split(groups: dict[str, dict[str, tuple[int, float]]]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    losses = {group: {option: loss for option, (_, loss) in options.items()} for group, options in groups.items()}
    sizes = {group: {option: size for option, (size, _) in options.items()} for group, options in groups.items()}
    return losses, sizes


def total(groups: dict[str, dict[str, tuple[int, float]]], choice: dict[str, str]) -> tuple[float, int]:
    picked = [groups[group][option] for group, option in choice.items()]
    return sum(loss for _, loss in picked), sum(size for size, _ in picked)


@settings(max_examples=300, deadline=None)
@given(groups=st.dictionaries(st.sampled_from("vwxyz"), OPTIONS, min_size=1), part=st.floats(0, 1))
def test_nothing_within_the_budget_loses_less(groups: dict[str, dict[str, tuple[int, float]]], part: float) -> None:
    least, most = (sum(end(size for size, _ in options.values()) for options in groups.values()) for end in (min, max))
    budget = least + round(part * (most - least))
    every = [dict(zip(groups, picks, strict=True)) for picks in itertools.product(*groups.values())]
    best = min(total(groups, choice) for choice in every if total(groups, choice)[1] <= budget)
    loss, size = total(groups, allocate(*split(groups), budget))
    assert size <= budget
    assert loss == pytest.approx(best[0], rel=1e-9, abs=1e-12)


def test_of_equal_losses_the_smaller_is_taken() -> None:
    groups = {"x": {"a": (4, 1.0), "b": (8, 1.0)}, "y": {"a": (4, 2.0), "b": (5, 1.0)}}
    assert allocate(*split(groups), 100) == {"x": "a", "y": "b"}


def test_a_budget_below_the_smallest_options_is_no_budget() -> None:
    with pytest.raises(ValueError, match="the smallest options take 4, and the budget is 3"):
        allocate({"x": {"a": 1.0}}, {"x": {"a": 4}}, 3)


def test_hundreds_of_groups_of_odd_sizes_are_solved_to_the_last_bit_that_helps() -> None:
    # A greedy solution is off by up to one step; sizes that share no factor leave the exact one next to nothing unused.
    numbers = [100_003 + 7919 * (index % 37) for index in range(300)]
    losses = {f"g{i}": {str(b): (1 + i * i % 91) * n * 4.0**-b for b in (2, 3, 4, 6, 8)} for i, n in enumerate(numbers)}
    sizes = {f"g{i}": {str(b): n * b + n // 64 for b in (2, 3, 4, 6, 8)} for i, n in enumerate(numbers)}
    budget = int(3.7 * sum(numbers))
    choice = allocate(losses, sizes, budget)
    used = sum(sizes[group][option] for group, option in choice.items())
    assert 0 <= budget - used < 1e-4 * budget
    # No exchange of one group up and another down within the budget is better.
    loss = sum(losses[group][option] for group, option in choice.items())
    for up, down in itertools.pairwise(choice):
        for a, b in itertools.product(losses[up], losses[down]):
            if used - sizes[up][choice[up]] - sizes[down][choice[down]] + sizes[up][a] + sizes[down][b] <= budget:
                other = loss - losses[up][choice[up]] - losses[down][choice[down]] + losses[up][a] + losses[down][b]
                assert other >= loss * (1 - 1e-12)
