"""Factors of smoothing: powers of two between what is read and what reads it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlathe.numerics.smoothing import factors


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e12]))
def test_factors_are_powers_of_two_about_one(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.rand(64, generator=generator) ** 4 * size for _ in range(2))
    found = factors(x, w)
    assert len(found) == 4
    for each in found:
        mantissa, _ = torch.frexp(each)
        assert torch.equal(mantissa, torch.full((64,), 0.5))
        assert each.log2().abs().max() <= 8
        assert each.log2().mean().abs() < 0.5


def test_large_channels_are_divided_by_more_the_stronger_it_is() -> None:
    x, w = torch.ones(16), torch.ones(16)
    x[3] = 2.0**12
    ratios = [(each[3] / each[0]).log2().item() for each in factors(x, w)]
    assert ratios[0] == 0.0
    assert ratios == sorted(ratios)
    assert ratios[-1] >= 4


def test_columns_alone_are_made_alike_at_strength_zero() -> None:
    w = torch.tensor([1.0, 4.0, 16.0, 64.0]) ** 2
    equal, *_ = factors(torch.rand(4) + 1, w)
    assert torch.equal((w.sqrt() * equal), torch.full((4,), 8.0))


def test_what_says_nothing_asks_for_nothing() -> None:
    ones = torch.ones(4)
    assert factors(torch.zeros(4), ones) == []
    assert factors(ones, torch.zeros(4)) == []
    assert factors(torch.tensor([1.0, torch.nan, 1, 1]), ones) == []
    assert factors(torch.tensor([1.0, torch.inf, 1, 1]), ones) == []
    # One channel that is not there is left as the smallest that counts.
    assert all(torch.isfinite(each).all() and (each > 0).all() for each in factors(torch.tensor([0.0, 1, 1, 1]), ones))
