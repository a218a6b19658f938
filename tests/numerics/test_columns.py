"""Loops over columns: each way of running them finds the same numbers."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from bitlathe.numerics import columns
from bitlathe.numerics.lattice import Lattice, lattice_of
from bitlathe.numerics.project import search
from bitlathe.numerics.scheme import SCHEMES

# Codes with and without a sign, with zero points and minima, on an integer grid and on float grids.
NAMES = ["W2A16G64", "W4A16G32_ASYM", "Q4_K", "MXFP4A16", "NVFP4A16", "FP8_CHANNEL"]
COUNT = 96


def problem(name: str, rows: int) -> tuple[Tensor, Tensor, Tensor, Lattice]:
    """Weights [columns, rows], the second moments of COUNT of 256 inputs, their upper factor, and where the weights may lie."""
    generator = torch.Generator().manual_seed(rows)
    w = torch.randn(rows, 256, generator=generator) * 0.05
    x = torch.randn(4 * COUNT, COUNT, generator=generator) @ torch.randn(COUNT, COUNT, generator=generator) / COUNT**0.5
    h = x.T @ x / len(x) + 0.01 * torch.eye(COUNT)
    lattice = lattice_of(w, SCHEMES[name], search(w, SCHEMES[name])).between(0, COUNT)
    factor = torch.linalg.cholesky(h.inverse(), upper=True)
    return w.T[:COUNT].contiguous(), _within(h), _within(factor), lattice


def _within(x: Tensor) -> Tensor:
    """The same as a part of a larger matrix, which is how solvers give it."""
    return torch.nn.functional.pad(x, (3, 40, 5, 7), value=float("nan"))[5:-7, 3:-40]


def check(loop: columns.Loop, name: str, rows: int, device: str) -> None:
    """What `loop` finds is what torch alone finds, but for what is as near to two numbers."""
    aim, h, factor, lattice = problem(name, rows)
    own = Lattice(
        lattice.grid, lattice.unsigned, *(None if x is None else x.to(device) for x in (lattice.scale, lattice.taken))
    )
    results = []
    for run, where, place in ((columns.plain, lattice, "cpu"), (loop, own, device)):
        left, found, errors = aim.to(device=place, copy=True), torch.full_like(aim, 9.0, device=place), aim.to(place) * 0
        run(left, found, errors, factor.to(place), where)
        before = found.clone()
        pull = h.to(place) @ (aim.to(place) - found)
        run(pull, found, None, h.to(place), where)
        assert not torch.equal(before, found)
        results.append([x.cpu() for x in (before, errors, found)])
    size, span = aim.abs().max(), (aim.amax(0) - aim.amin(0)).max()
    for expected, made in zip(*results, strict=True):
        apart = (expected - made).abs()
        # What is as near to two numbers may go either way, and some columns after it; no row is left out.
        assert made.isfinite().all() and (apart > 1e-5 * size).float().mean() < 0.01
        assert apart.max() < 5 * span
    for expected, made in ((results[0][0], results[1][0]), (results[0][2], results[1][2])):
        same = expected == made
        assert torch.equal(torch.signbit(expected[same]), torch.signbit(made[same]))


@pytest.mark.skipif(not columns._BUILDS, reason="there is no compiler")
@pytest.mark.parametrize("rows", [1, 40, 600])
@pytest.mark.parametrize("name", NAMES)
def test_c_finds_the_same(name: str, rows: int) -> None:
    assert columns.loop_for(torch.zeros(1)) is columns.compiled
    check(columns.compiled, name, rows, "cpu")


@pytest.mark.skipif(not columns._BUILDS, reason="there is no compiler")
def test_rows_go_to_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    check(columns.loop_for(torch.zeros(1)), "W4A16G32_ASYM", 1000, "cpu")


def test_c_takes_no_more_columns_than_it_holds() -> None:
    solve = pytest.importorskip("bitlathe.numerics._columns").solve
    with pytest.raises(ValueError, match="129 columns; at most 128"):
        solve((129, 1, 129), (0, 1), (0, 0, 0, 0, 0, 0), (0.0, 1.0, 0.0, 0.0))


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_columns", None)
    assert columns.loop_for(torch.zeros(1)) is columns.plain


@pytest.mark.parametrize("spoil", ["dtype", "columns", "layout"])
def test_what_a_loop_cannot_take_is_refused(spoil: str) -> None:
    aim, h, _, lattice = problem("W4A16G32_ASYM", 40)
    pull, found = aim.clone(), aim.clone()
    if spoil == "dtype":
        found = found.half()
    elif spoil == "columns":
        lattice = lattice.between(0, COUNT - 1)
    else:
        found = found.T.contiguous().T
    with pytest.raises(ValueError, match="float32 matrices of one shape on one device"):
        columns.descend(pull, found, h, lattice)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("triton") is None, reason="needs CUDA and Triton")
@pytest.mark.parametrize("rows", [1, 40, 600])
@pytest.mark.parametrize("name", NAMES)
def test_triton_finds_the_same_on_a_gpu(name: str, rows: int) -> None:
    loop = columns.loop_for(torch.zeros(1, device="cuda"))
    assert loop.__module__ == "bitlathe.numerics.columns_triton"
    check(loop, name, rows, "cuda")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_triton_finds_the_same_interpreted() -> None:
    """On a CPU, by Triton's interpreter, which has to be asked for before Triton is imported."""
    told = (
        f"import os, sys; sys.path[:0] = {sys.path!r}; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from bitlathe.numerics.columns_triton import loop\n"
        "from numerics.test_columns import NAMES, check\n"
        "[check(loop, name, 20, 'cpu') for name in NAMES]\n"
    )
    subprocess.run([sys.executable, "-c", told], check=True)
