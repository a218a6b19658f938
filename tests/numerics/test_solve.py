"""Closed-form rounding: it lies where codes can, it costs less at each step, and it agrees with the textbook."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitlathe.numerics.lattice import Column, Lattice, lattice_of, side_by_side
from bitlathe.numerics.project import Learned, dequantize, quantize, search
from bitlathe.numerics.scheme import SCHEMES
from bitlathe.numerics.solve import Hessian, descend, feed_back, prepared, refit, towards

ROWS, COLUMNS, TOKENS = 24, 256, 2000
SCALED = [name for name, scheme in SCHEMES.items() if scheme.scale is not None]


def weights(seed: int = 0, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(seed: int = 1) -> Tensor:
    """[TOKENS, COLUMNS], channels of different size that go together."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5 + torch.eye(COLUMNS)
    size = torch.logspace(-1, 0.5, COLUMNS)[torch.randperm(COLUMNS, generator=generator)]
    return torch.randn(TOKENS, COLUMNS, generator=generator) @ mixed * size


def moments(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def solvable(damping: float = 0.01) -> Hessian:
    found = prepared(moments(inputs()), damping)
    assert found is not None
    return found


def cost(w: Tensor, found: Tensor) -> float:
    return ((w - found) @ inputs().T).square().mean().item()


def column_of(lattice: Lattice, column: int) -> Column:
    (found,) = lattice.between(column, column + 1).columns()
    return found


@pytest.mark.parametrize("name", SCALED)
def test_a_lattice_is_where_codes_lie(name: str) -> None:
    scheme, w = SCHEMES[name], weights(rows=131)
    learned = search(w, scheme)
    lattice = lattice_of(w, scheme, learned)
    nearest = lattice.nearest(w.T).T
    codes = quantize(w, scheme, learned, at=nearest)
    assert torch.equal(codes.codes.view(torch.uint8), quantize(w, scheme, learned).codes.view(torch.uint8))
    # A zero point's product with the scale is rounded here, where it is not in a weight.
    torch.testing.assert_close(dequantize(codes, torch.float32), nearest, rtol=2**-20, atol=1e-6)
    for column in (0, 100, COLUMNS - 1):
        assert torch.equal(column_of(lattice, column).nearest(w[:, column]), nearest[:, column])


@pytest.mark.parametrize("name", ["W3A16", "W4A16G32_ASYM", "MXFP4A16", "NVFP4A16", "Q4_K"])
def test_each_step_costs_less(name: str) -> None:
    scheme, w, hessian = SCHEMES[name], weights(), solvable()
    learned = search(w, scheme, moments(inputs()).diagonal())
    lattice = lattice_of(w, scheme, learned).ordered(hessian.order)
    aim = w.T[hessian.order]
    nearest = lattice.nearest(aim)
    fed_back = feed_back(aim, lattice, hessian)
    once = descend(aim, fed_back, lattice, hessian)
    costs = [hessian.loss(aim - found) for found in (nearest, fed_back, once)]
    assert costs[1].sum() < 0.8 * costs[0].sum()
    assert (costs[2] <= costs[1] * (1 + 1e-4)).all() and costs[2].sum() < 0.995 * costs[1].sum()
    # That is what it costs on the inputs themselves, and the numbers are those of codes.
    shipped = dequantize(quantize(w, scheme, learned, at=once[hessian.order.argsort()].T), torch.float32)
    assert cost(w, shipped) < 0.85 * cost(w, nearest[hessian.order.argsort()].T)


def test_feedback_is_the_textbooks() -> None:
    """Column by column with the inverse of what is left, in float64, without blocks and without factors."""
    scheme, w, hessian = SCHEMES["W4A16"], weights(), solvable()
    lattice = lattice_of(w, scheme).ordered(hessian.order)
    left, inverse = w.T[hessian.order].double(), hessian.h.double().inverse()
    expected = torch.empty_like(left)
    for column in range(COLUMNS):
        expected[column] = column_of(lattice, column).nearest(left[column].float())
        error = (left[column] - expected[column]) / inverse[column, column]
        left -= inverse[:, column, None] * error
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
    found = feed_back(w.T[hessian.order].contiguous(), lattice, hessian)
    apart = (found.double() - expected).abs() > 1e-6
    assert apart.float().mean() < 0.02  # ties of float32, and what follows from them


def test_descent_ends_where_no_column_gains_alone() -> None:
    w, hessian = weights(), solvable()
    lattice = lattice_of(w, SCHEMES["W2A16G64"]).ordered(hessian.order)
    aim = w.T[hessian.order].contiguous()
    found = feed_back(aim, lattice, hessian)
    for _ in range(60):
        found = descend(aim, found, lattice, hessian)
    again = descend(aim, found, lattice, hessian)
    assert (again != found).float().mean() < 1e-3
    least = hessian.loss(aim - found)
    for column in (3, 77, 200):
        for by in (-1, 1):
            moved = found.clone()
            moved[column] = column_of(lattice, column).nearest(found[column] + by * lattice.scale[column])
            assert (hessian.loss(aim - moved) >= least * (1 - 1e-4)).all()


@pytest.mark.parametrize("name", ["W3A16", "W2A16G32_ASYM", "NVFP4A16"])
def test_refitted_scales_cost_less(name: str) -> None:
    scheme, w, h = SCHEMES[name], weights(), moments(inputs())
    learned = search(w, scheme)
    lattice = lattice_of(w, scheme, learned)
    found = lattice.nearest(w.T)
    multiples = refit(w.T, found, h, width=scheme.block[1], ridge=0.0)
    wide = multiples.repeat_interleave(scheme.block[1], 0)
    before, after = ((h @ (w.T - x)).mul(w.T - x).sum(0) for x in (found, found * wide))
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.99 * before.sum()
    # The codes are the same on the other lattice.
    low, high = (multiples.T if end is None else end * multiples.T for end in (learned.low, learned.high))
    other = lattice_of(w, scheme, Learned(low=low if scheme.two_ended else None, high=high))
    moved = lattice.moved(found, other)
    near = torch.isclose(moved, found * wide, rtol=0.1, atol=1e-3)
    assert near.float().mean() > 0.99  # but for a zero point that moved with its scale


def test_what_an_input_lost_is_made_up_for() -> None:
    w, original = weights(), inputs()
    x = original * 0.9 + 0.1 * torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(5))
    h, missing = moments(x), w @ (original - x).T @ x / TOKENS

    def off(weight: Tensor) -> float:
        return (original @ w.T - x @ weight.T).square().mean().item()

    made_up = towards(w, h, missing, part=1.0, ridge=1e-4)
    # Least squares knows no better.
    best = torch.linalg.lstsq(x.double(), (original @ w.T).double()).solution.T
    assert off(made_up) < 0.5 * off(w)
    assert off(made_up) == pytest.approx(off(best.float()), rel=1e-2)
    assert off(w) > off(towards(w, h, missing, part=0.5, ridge=1e-4)) > off(made_up)


def test_moments_without_an_inverse_are_damped_or_refused() -> None:
    x = inputs()[:16]  # 16 tokens know nothing of 240 directions
    hessian = prepared(moments(x), 1e-4)
    assert hessian is not None and torch.isfinite(hessian.factor).all()
    identity = hessian.factor.T @ hessian.factor @ hessian.h
    torch.testing.assert_close(identity, torch.eye(COLUMNS), atol=5e-2, rtol=0)
    assert prepared(torch.zeros(4, 4), 0.01) is None
    assert prepared(torch.full((4, 4), torch.nan), 0.01) is None


def test_rows_of_several_matrices_are_solved_as_one() -> None:
    scheme, hessian = SCHEMES["W4A16G32"], solvable()
    pair = [weights(seed, rows) for seed, rows in ((0, 8), (1, 16))]
    lattices = [lattice_of(w, scheme) for w in pair]
    together = feed_back(torch.cat(pair).T[hessian.order].contiguous(), side_by_side(lattices).ordered(hessian.order), hessian)
    alone = [
        feed_back(w.T[hessian.order].contiguous(), lattice.ordered(hessian.order), hessian)
        for w, lattice in zip(pair, lattices, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-6, rtol=1e-5)
