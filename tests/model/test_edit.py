"""What is edited in parts is what the whole matrices would give, rounded once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from bitlathe.model.edit import Edit
from bitlathe.numerics.hadamard import turn
from bitlathe.numerics.rotation import Rotation

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUTS, INPUTS, START = 1536, 1280, 512  # more than one part either way, the last one short


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Watched:
    """A turn that keeps the size of what it was given."""

    def __init__(self, block: int) -> None:
        self.rotation, self.sizes = Rotation(space="residual", block=block, seed=block), list[int]()

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float64
        self.sizes.append(x.numel())
        return turn(x, self.rotation)

    def matrix(self, width: int) -> Tensor:
        return turn(torch.eye(width, dtype=torch.float64), self.rotation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gained", ["", "gain"])
@pytest.mark.parametrize("turned", ["", "columns", "rows", "both", "both from a row on"])
def test_parts_are_the_whole(dtype: torch.dtype, gained: str, turned: str) -> None:
    weight, gain = noise(OUTPUTS, INPUTS).to(dtype), noise(INPUTS, seed=1).to(dtype)
    columns, rows = Watched(INPUTS), Watched(512)
    start = START if "from" in turned else 0
    edit = Edit(
        gain="norm.weight" if gained else None,
        columns=columns if turned.startswith(("columns", "both")) else None,
        rows=rows if turned.startswith(("rows", "both")) else None,
        start=start,
    )
    kept = weight.clone()
    edited = edit(weight, gain if gained else None, dtype=dtype)
    assert torch.equal(weight, kept)
    expected = weight.double() * (gain.double() if gained else 1)
    if edit.columns is not None:
        expected = expected @ columns.matrix(INPUTS)
    if edit.rows is not None:
        expected[start:] = rows.matrix(OUTPUTS - start).T @ expected[start:]
    assert edited.dtype == dtype and edited.is_contiguous()
    off = edited.double() != expected.to(dtype).double()
    # One rounding: another order of summation moves the last bit of a float64, and hardly one in a million of the rest.
    assert off.double().mean() < 1e-4 or dtype == torch.float64
    torch.testing.assert_close(edited.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-11)
    assert torch.equal(edit(weight, gain if gained else None, dtype=dtype), edited)
    called = columns.sizes + rows.sizes
    assert not called or len(called) >= 4
    assert all(size <= 2**20 for size in called)


def test_a_bias_and_a_gain() -> None:
    rows = Watched(64)
    bias = noise(192).bfloat16()
    edited = Edit(rows=rows, start=64)(bias, None, dtype=torch.bfloat16)
    assert torch.equal(edited[:64], bias[:64])
    assert torch.equal(edited[64:], turn(bias[64:].double(), rows.rotation).bfloat16())
    ones = Edit(ones=True)(bias, None, dtype=torch.float32)
    assert ones.dtype == torch.float32 and torch.equal(ones, torch.ones(192))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_holds_little_beside_source_and_result() -> None:
    turned = partial(turn, rotation=Rotation(space="residual", block=4096))
    weight = noise(32000, 4096).bfloat16()
    edit, there = Edit(columns=turned), weight.cuda()
    edit(there[:8], None, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    edited = edit(there, None, dtype=torch.bfloat16)
    assert torch.cuda.max_memory_allocated() - before < edited.nbytes + 2**27
    torch.testing.assert_close(edited.cpu(), edit(weight, None, dtype=torch.bfloat16), rtol=2**-7, atol=1e-9)
