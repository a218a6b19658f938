"""Two-sided rounding: it loses less where rows can make up for each other, and never more than what it is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitlathe.numerics.lattice import Lattice, lattice_of, side_by_side
from bitlathe.numerics.project import dequantize, quantize
from bitlathe.numerics.scheme import SCHEMES
from bitlathe.numerics.solve import Hessian, descend, feed_back, prepared
from bitlathe.numerics.two_sided import Outputs, Side, refitted, settled, two_sided

COLUMNS = 128


def correlated(size: int, seed: int, samples: int = 4000) -> Tensor:
    """Second moments [size, size] of numbers of different size that go together."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, generator=generator) / size**0.5 + 0.5 * torch.eye(size)
    x = torch.randn(samples, size, generator=generator) @ mixed * torch.logspace(-0.5, 0.5, size)
    return x.T @ x / samples


def solvable(size: int, seed: int) -> Hessian:
    found = prepared(correlated(size, seed), 0.01)
    assert found is not None
    return found


def lost(error: Tensor, moments: Hessian, g: Tensor) -> float:
    """error: [columns in order, rows as they come]."""
    return (moments.h.double() @ error.double() @ g.double() * error.double()).sum().item()


def one_sided(rows: int, scheme: str, seed: int, moments: Hessian) -> tuple[Tensor, Tensor, Lattice, Tensor]:
    w = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05
    lattice = lattice_of(w, SCHEMES[scheme]).ordered(moments.order)
    aim = w.T[moments.order].contiguous()
    found = descend(aim, feed_back(aim, lattice, moments), lattice, moments)
    return aim, found, lattice, w


@pytest.mark.parametrize("scheme", ["W4A16G32", "W3A16G32_ASYM", "MXFP4A16"])
def test_rows_make_up_for_each_other(scheme: str) -> None:
    moments, outputs = solvable(COLUMNS, 0), solvable(48, 1)
    aim, found, lattice, w = one_sided(48, scheme, 2, moments)
    g = outputs.h[outputs.order.argsort()][:, outputs.order.argsort()]
    ((_, side),) = two_sided([Side.of(aim, found, lattice, Outputs(outputs, 8))], moments, passes=2)
    better = side.result
    assert lost(aim - better, moments, g) < 0.85 * lost(aim - found, moments, g)
    # What comes out are numbers that codes stand for.
    at = better[moments.order.argsort()].T
    shipped = dequantize(quantize(w, SCHEMES[scheme], at=at), torch.float32)
    torch.testing.assert_close(shipped, at, rtol=2**-20, atol=1e-6)


def test_scales_are_refitted_to_what_other_rows_lack() -> None:
    """The same codes lose less on the scales that it gives, and what is moved on them after that less again."""
    moments, outputs = solvable(COLUMNS, 0), solvable(48, 1)
    aim, near, lattice, _ = one_sided(48, "W2A16G32", 2, moments)
    ((_, found),) = two_sided([Side.of(aim, near, lattice, Outputs(outputs, 8))], moments, passes=2)
    multiples = refitted(found, moments, width=32, ridge=0.01)
    assert multiples.shape == (COLUMNS // 32, 48)
    scale = lattice.scale * multiples.repeat_interleave(32, 0)[moments.order]
    stretched = found.moved(Lattice(lattice.grid, lattice.unsigned, scale, None))
    torch.testing.assert_close(stretched.result, found.result * multiples.repeat_interleave(32, 0)[moments.order])
    ((_, moved),) = settled([stretched], moments, passes=1)
    costs = [side.cost(moments) for side in (found, stretched, moved)]
    assert costs[1] < 0.99 * costs[0] and costs[2] < costs[1]
    g = outputs.h[outputs.order.argsort()][:, outputs.order.argsort()]
    for side in (found, stretched, moved):
        assert side.cost(moments) == pytest.approx(lost(aim - side.result, moments, g), rel=1e-4)


def test_never_worse_than_what_it_is_given() -> None:
    """Outputs that do not go together: there is nothing to win, and nothing is lost."""
    moments, outputs = solvable(COLUMNS, 0), prepared(torch.eye(40), 0.0)
    assert outputs is not None
    aim, found, lattice, _ = one_sided(40, "W4A16G32", 3, moments)
    ((_, same),) = two_sided([Side.of(aim, found, lattice, Outputs(outputs, 8))], moments, passes=0)
    g = torch.eye(40)
    assert lost(aim - same.result, moments, g) <= lost(aim - found, moments, g)


@pytest.mark.parametrize("rows", [(24, 5, 33), (3, 1)])
def test_linears_side_by_side_are_those_alone(rows: tuple[int, ...]) -> None:
    """Also those of fewer rows than there are slices."""
    moments = solvable(COLUMNS, 0)
    outputs = [solvable(count, 10 + index) for index, count in enumerate(rows)]
    cases = [one_sided(count, "W3A16G32", 20 + index, moments) for index, count in enumerate(rows)]
    sides = [Side.of(*case[:3], Outputs(own, 8)) for case, own in zip(cases, outputs, strict=True)]
    together = two_sided(sides, moments, passes=1)
    for index, (_, both) in enumerate(together):
        ((_, alone),) = two_sided([sides[index]], moments, passes=1)
        g = outputs[index].h[outputs[index].order.argsort()][:, outputs[index].order.argsort()]
        # Sums of other lengths may round otherwise, and a tie fall the other way.
        aim = cases[index][0]
        assert lost(aim - both.result, moments, g) == pytest.approx(lost(aim - alone.result, moments, g), rel=0.02)


def test_a_part_of_a_lattice_is_that_of_its_rows() -> None:
    w = torch.randn(10, COLUMNS, generator=torch.Generator().manual_seed(0))
    whole, rows = lattice_of(w, SCHEMES["W4A16G32_ASYM"]), torch.tensor([7, 2, 3])
    part = whole.part(rows)
    x = torch.randn(COLUMNS, 10, generator=torch.Generator().manual_seed(1))
    assert torch.equal(part.nearest(x[:, rows]), whole.nearest(x)[:, rows])
    assert torch.equal(side_by_side([whole.part(slice(0, 4)), whole.part(slice(4, 10))]).scale, whole.scale)
