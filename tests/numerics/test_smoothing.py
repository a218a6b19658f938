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
    found = factors(x, w, x.sqrt(), dtype="bf16")
    assert len(found) == 4
    for each in found:
        mantissa, _ = torch.frexp(each)
        assert torch.equal(mantissa, torch.full((64,), 0.5))
        assert each.log2().abs().max() <= 8
        assert each.log2().mean().abs() < 0.5


def test_large_channels_are_divided_by_more_the_stronger_it_is() -> None:
    x, w = torch.ones(16), torch.ones(16)
    x[3] = 2.0**12
    ratios = [(each[3] / each[0]).log2().item() for each in factors(x, w, x.sqrt(), dtype="bf16")]
    assert ratios[0] == 0.0
    assert ratios == sorted(ratios)
    assert ratios[-1] >= 4


def test_columns_alone_are_made_alike_at_strength_zero() -> None:
    w = torch.tensor([1.0, 4.0, 16.0, 64.0]) ** 2
    equal, *_ = factors(torch.rand(4) + 1, w, torch.ones(4), dtype="bf16")
    assert torch.equal((w.sqrt() * equal), torch.full((4,), 8.0))


def tried(x: torch.Tensor, w: torch.Tensor, largest: float = 1.0, dtype: str = "bf16") -> list[torch.Tensor]:
    return factors(x, w, torch.full_like(x, largest), dtype=dtype)


def test_what_says_nothing_asks_for_nothing() -> None:
    ones = torch.ones(4)
    assert tried(torch.zeros(4), ones) == []
    assert tried(ones, torch.zeros(4)) == []
    assert tried(torch.tensor([1.0, torch.nan, 1, 1]), ones) == []
    assert tried(torch.tensor([1.0, torch.inf, 1, 1]), ones) == []
    # One channel that is not there is left as the smallest that counts.
    assert all(torch.isfinite(each).all() and (each > 0).all() for each in tried(torch.tensor([0.0, 1, 1, 1]), ones))


def test_what_fp16_could_not_hold_is_not_tried() -> None:
    x, w = torch.tensor([1.0, 1.0, 1.0, 2.0**16]), torch.ones(4)
    assert len(tried(x, w, 1000.0, "fp16")) == 4
    assert len(tried(x, w, 2.0**13.5, "fp16")) < 4
    assert len(tried(x, w, 2.0**13.5, "bf16")) == 4
