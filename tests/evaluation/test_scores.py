"""Standard errors of figures and of differences, of means and of what is none, and what a group of tasks comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from bitlathe.evaluation.scores import Score, compared, pooled


def score(values: Sequence[Any], *, mean: bool = True, aggregate: Any = np.mean) -> Score:
    return Score(metric="m", filter="none", better=True, values=dict(enumerate(values)), aggregate=aggregate, mean=mean)


def test_a_difference_has_the_error_of_paired_documents() -> None:
    ours, theirs = [1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 1]
    found = compared(score(ours), score(theirs))
    for name, values in {"model": ours, "original": theirs, "difference": np.subtract(ours, theirs)}.items():
        expected = {"value": np.mean(values), "error": np.std(values, ddof=1) / math.sqrt(6)}
        assert found[name] == pytest.approx(expected)
    assert compared(score(ours), score(ours))["difference"] == {"value": 0.0, "error": 0.0}
    assert compared(score(ours), None).keys() == {"model"}


def test_what_is_no_mean_has_the_error_of_its_resamplings() -> None:
    values = np.random.default_rng(1).normal(size=(2, 400)) * [[1.0], [0.1]]
    ours, theirs = values[0], values[0] + values[1]
    exact, drawn = (compared(score(ours, mean=mean), score(theirs, mean=mean)) for mean in (True, False))
    for name in exact:
        assert drawn[name]["value"] == pytest.approx(exact[name]["value"])
        assert drawn[name]["error"] == pytest.approx(exact[name]["error"], rel=0.2)
    assert drawn["difference"]["error"] < drawn["model"]["error"] / 5


def test_what_is_unknown_is_none() -> None:
    assert compared(score([0.5]), None)["model"] == {"value": 0.5, "error": None}
    infinite = score([1.0, 2.0], mean=False, aggregate=lambda values: math.inf)
    assert compared(infinite, None)["model"] == {"value": None, "error": None}


def test_a_group_is_the_weighted_mean_of_its_tasks() -> None:
    members = [{"model": {"value": 0.5, "error": 0.3}}, {"model": {"value": 1.0, "error": 0.1}}]
    found = pooled(members, [10, 30])["model"]
    assert found == pytest.approx({"value": 0.875, "error": math.hypot(0.25 * 0.3, 0.75 * 0.1)})
    members[0]["model"]["error"] = None
    assert pooled(members, [1, 1])["model"] == {"value": 0.75, "error": None}
