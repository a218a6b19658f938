"""What tasks say of two models: every metric with its standard error, and the difference of the two, document by document.

Both models answer the same documents, so that the difference is known better than either figure: its standard error is that of
the paired differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np

# Resamplings of the documents behind the standard error of what is no mean (bootstrap; Efron, 1979).
_RESAMPLES = 200

Figure = dict[str, float | None]


@dataclass(frozen=True)
class Score:
    """One metric of one task. values: document -> what the metric has for it; aggregate: such values to one number.

    mean: the aggregate is their mean. better: more of it is better; None where the task does not say.
    """

    metric: str
    filter: str
    better: bool | None
    values: Mapping[int, Any]
    aggregate: Callable[[list[Any]], Any]
    mean: bool


def compared(ours: Score, theirs: Score | None) -> dict[str, Figure]:
    """{"model"} and, with an original, {"original", "difference": model - original}, each {"value", "error": standard error}.

    A value that is not finite is None, as is the error of what has fewer than two documents.
    """
    documents = [document for document in ours.values if theirs is None or document in theirs.values]
    sides = {"model": ours} if theirs is None else {"model": ours, "original": theirs}
    columns = {name: [score.values[document] for document in documents] for name, score in sides.items()}
    found = {name: _figure(ours, [column]) for name, column in columns.items()}
    return found if theirs is None else found | {"difference": _figure(ours, list(columns.values()))}


def pooled(members: Sequence[Mapping[str, Figure]], weights: Sequence[int]) -> dict[str, Figure]:
    """The weighted mean of the figures of several tasks, whose errors have nothing to do with each other."""
    shares = np.asarray(weights) / sum(weights)
    found: dict[str, Figure] = {}
    for name in members[0]:
        # What is unknown of one is unknown of all: None becomes NaN.
        values, errors = (np.asarray([member[name][part] for member in members], np.float64) for part in ("value", "error"))
        found[name] = {"value": _finite((shares * values).sum()), "error": _finite(sqrt(((shares * errors) ** 2).sum()))}
    return found


def is_number(value: Any) -> bool:
    """Whether a metric's aggregate can be shown: some tasks give a text or a table."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _figure(score: Score, columns: Sequence[list[Any]]) -> Figure:
    return {"value": _finite(_value(score, columns)), "error": _error(score, columns)}


def _value(score: Score, columns: Sequence[list[Any]]) -> float:
    """The aggregate of one column, or of the first less that of the second."""
    first, *others = (float(score.aggregate(column)) for column in columns)
    return first - sum(others)


def _error(score: Score, columns: Sequence[list[Any]]) -> float | None:
    count = len(columns[0])
    if count < 2:
        return None
    if score.mean:
        first, *others = (np.asarray(column, dtype=np.float64) for column in columns)
        return _finite(_spread(first - sum(others)) / sqrt(count))
    draws = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    return _finite(_spread([_value(score, [[column[at] for at in draw] for column in columns]) for draw in draws]))


def _spread(values: Any) -> float:
    """The standard deviation of a sample; NaN where a value is not finite."""
    with np.errstate(invalid="ignore"):
        return float(np.std(values, ddof=1))


def _finite(value: Any) -> float | None:
    # JSON has neither infinity nor NaN.
    return float(value) if isfinite(value) else None
