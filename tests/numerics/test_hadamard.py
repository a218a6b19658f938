"""Hadamard matrices are orthogonal, the ones readers know, and turning by them is what it says."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from math import prod

import pytest
import torch
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitlathe.errors import PlanError
from bitlathe.numerics.hadamard import hadamard, signs, turn, turn_back, turner
from bitlathe.numerics.rotation import (
    STORED_CORES,
    Rotation,
    cost,
    factors,
    fits,
    largest_block,
    largest_fit,
    paley,
    prime_power,
    steps,
)

# Orders a multiple of 4 and at most 512 that no construction here reaches.
MISSING = {188, 236, 260, 268, 292, 324, 356, 372, 376, 404, 412, 428, 436, 452, 472, 476, 508}
COVERED = [1, 2, *(order for order in range(4, 513, 4) if order not in MISSING)]
# What models' down_proj reads, and how it splits: a fact of every checkpoint turned online.
SPLITS = {
    768: (24, 32), 1408: (44, 32), 4864: (76, 64), 5632: (44, 128), 6912: (24, 12, 12, 2), 8192: (8192,), 8960: (28, 20, 16),
    9728: (76, 128), 10944: (76, 12, 12), 11008: (172, 64), 12288: (24, 512), 13824: (24, 24, 12, 2), 14336: (28, 512),
    17408: (68, 256), 18944: (148, 128), 25600: (20, 20, 64), 28672: (28, 1024), 29568: (44, 28, 12, 2), 53248: (52, 1024),
}  # fmt: skip
# The first bytes of SHA-256 of the entries as int8, row by row: a matrix must never change.
GOLDEN = {
    12: "db7478025ce74776", 20: "d04b560308676ee7", 24: "0baa93c442566df5", 28: "75a65a7aa5dd6380", 36: "1a7aed2f42a8c71d",
    52: "7aad05503190a3c5", 92: "c9163d2a8cc8195c", 100: "6d450d2e5355cc4a", 116: "4b19adebc690924f", 156: "17e2a611312a4324",
    172: "17eeafc10d0de597", 244: "1c9ba4362f19a6ce", 344: "3610e5a16ae6fdd9", 768: "69a37957546738ea",
}  # fmt: skip
# (width, block): powers of two in one to three steps, cores alone, with small and large powers of two, several cores.
SHAPES = [(64, 64), (768, 256), (256, 32), (4096, 4096), (20, 20), (96, 48), (768, 768), (688, 172), (2880, 2880), (6912, 6912)]


def rotation(block: int, kind: str = "random", seed: int = 0) -> Rotation:
    return Rotation.model_validate({"space": "mid", "block": block, "kind": kind, "seed": seed})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(turned: Rotation, width: int) -> Tensor:
    """R of the whole width, from its definition."""
    block = turned.block_of(width)
    return torch.diag(signs(turned, width)) @ torch.block_diag(*[hadamard(block)] * (width // block)) / block**0.5


def test_the_orders_covered() -> None:
    assert [order for order in range(1, 513) if fits(order)] == COVERED


@pytest.mark.parametrize("order", COVERED)
def test_rows_are_orthogonal(order: int) -> None:
    matrix = hadamard(order)
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_every_construction_is_among_them() -> None:
    assert {paley(20), paley(28), paley(36), paley(100)} == {(1, 19, 1), (1, 3, 3), (2, 17, 1), (2, 7, 2)}
    assert [paley(order) for order in STORED_CORES] == [None] * len(STORED_CORES)
    assert [factors(order) for order in STORED_CORES] == [(order,) for order in STORED_CORES]
    assert [prime_power(q) for q in (0, 1, 2, 12, 49, 243)] == [None, None, (2, 1), None, (7, 2), (3, 5)]


@pytest.mark.parametrize("order", [2**log for log in range(11)])
def test_a_power_of_two_is_the_readers(order: int) -> None:
    assert torch.equal(hadamard(order), deterministic_hadamard_matrix(order, dtype=torch.float64))


def test_a_reader_s_transform_is_ours() -> None:
    x = noise(5, 768)
    theirs = x.unflatten(-1, (3, 256)) @ (deterministic_hadamard_matrix(256, dtype=torch.float64) / 16)
    assert torch.equal(turn(x, rotation(256, "hadamard")).to(torch.bfloat16), theirs.flatten(-2).to(torch.bfloat16))


@pytest.mark.parametrize("order", GOLDEN)
def test_a_matrix_never_changes(order: int) -> None:
    assert hashlib.sha256(hadamard(order).to(torch.int8).numpy().tobytes()).hexdigest()[:16] == GOLDEN[order]


def test_random_signs_never_change() -> None:
    def drawn(space: str, seed: int) -> str:
        values = signs(Rotation.model_validate({"space": space, "seed": seed}), 24)
        return "".join("+" if value > 0 else "-" for value in values)

    assert drawn("residual", 0) == "++--++++-+++-+--+-+++---"
    assert drawn("residual", 1) == "++---++++--+-----+--+-+-"
    assert drawn("mid", 0) == "-+----+-+-++-+---+----+-"


@pytest.mark.parametrize("width", SPLITS)
def test_widths_in_use_split(width: int) -> None:
    assert factors(width) == SPLITS[width]
    assert prod(SPLITS[width]) == prod(map(prod, steps(width))) == width
    *cores, last = SPLITS[width]
    run = [base for step in steps(width) for base in step]
    assert run[: len(cores)] == cores
    assert prod(run[len(cores) :]) == last


@pytest.mark.parametrize("base", sorted({base for split in SPLITS.values() for base in split if base <= 1024}))
def test_their_factors_are_orthogonal(base: int) -> None:
    matrix = hadamard(base)
    assert torch.equal(matrix @ matrix.T, base * torch.eye(base, dtype=torch.float64))


def test_largest_blocks() -> None:
    assert [largest_block(width) for width in (768, 11008, 4096, 63)] == [256, 256, 4096, 1]
    assert [largest_fit(width) for width in (768, 376, 1504, 91, 260)] == [768, 8, 32, 1, 52]


@pytest.mark.parametrize(
    ("width", "block", "words"),
    [
        (376, 0, ["order 376", "376 wide", "mid", "--rotation-block 8"]),
        (376, 188, ["order 188", "376 wide", "--rotation-block 8"]),
        (768, 512, ["blocks of 512", "768", "--rotation-block 768"]),
        (91, 0, ["order 91", "--rotate"]),
    ],
)
def test_what_does_not_fit_is_refused(width: int, block: int, words: list[str]) -> None:
    for refuse in (lambda: turn(noise(2, width), rotation(block)), lambda: cost(width, rotation(block))):
        with pytest.raises(PlanError) as refused:
            refuse()
        assert all(word in str(refused.value) for word in words), refused.value
    with pytest.raises(PlanError, match="--rotation-block 52"):
        hadamard(260)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize(("width", "block"), [shape for shape in SHAPES if shape[0] < 1000])
def test_turning_is_the_product_with_its_matrix(width: int, block: int, kind: str) -> None:
    x, turned = noise(3, width), rotation(block, kind)
    matrix = dense(turned, width)
    torch.testing.assert_close(turn(x, turned), x @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(turn_back(x, turned), x @ matrix.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize(("width", "block"), SHAPES)
def test_turning_back_undoes_it(width: int, block: int, kind: str) -> None:
    x, turned = noise(2, 3, width), rotation(block, kind)
    there = turn(x, turned)
    assert (there - x).abs().max() > 0.1
    torch.testing.assert_close(turn_back(there, turned), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(turn(turn_back(x, turned), turned), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([order for order in COVERED if order <= 180]),
    st.integers(1, 4),
    st.integers(0, 70),
    st.sampled_from(["hadamard", "random"]),
    st.integers(0, 2**32),
)
def test_any_shape(block: int, blocks: int, rows: int, kind: str, seed: int) -> None:
    x, turned = noise(rows, block * blocks, seed=seed), rotation(block, kind, seed)
    there = turn(x, turned)
    torch.testing.assert_close(turn_back(there, turned), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(there.square().sum(-1), x.square().sum(-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(turn(x.float(), turned).double(), there, rtol=0, atol=2e-5)


def test_many_rows_and_one_are_turned_alike() -> None:
    x, turned = noise(1300, 768), rotation(256)  # several chunks, the last of them short
    whole = turn(x, turned)
    torch.testing.assert_close(torch.cat([turn(row, turned) for row in x.split(1)]), whole, rtol=0, atol=1e-13)
    assert torch.equal(turn(x, turned), whole)


def test_blocks_do_not_mix_and_have_signs_of_their_own() -> None:
    x, turned = noise(4, 768), rotation(256)
    zeroed = x.clone()
    zeroed[:, 256:512] = 0
    there, without = turn(x, turned), turn(zeroed, turned)
    assert torch.equal(there[:, :256], without[:, :256])
    assert torch.equal(there[:, 512:], without[:, 512:])
    assert not without[:, 256:512].any()
    first, second, third = signs(turned, 768).split(256)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_signs_follow_space_and_seed() -> None:
    drawn = [
        signs(Rotation.model_validate({"space": space, "seed": seed}), 4096) for space in ("residual", "mid") for seed in (0, 1)
    ]
    for index, one in enumerate(drawn):
        assert one.abs().eq(1).all()
        assert abs(float(one.mean())) < 0.06  # four standard deviations
        for other in drawn[:index]:
            assert abs(float((one * other).mean())) < 0.06
    x = noise(2, 4096)
    assert not torch.equal(turn(x, rotation(64, seed=0)), turn(x, rotation(64, seed=1)))
    assert torch.equal(signs(rotation(64, "hadamard"), 128), torch.ones(128, dtype=torch.float64))


PROGRAM = """
import hashlib
import torch
from bitlathe.numerics.hadamard import turn
from bitlathe.numerics.rotation import Rotation
torch.set_num_threads(1)
x = torch.arange(5 * 768, dtype=torch.float64).view(5, 768).sin()
for dtype in (torch.float64, torch.bfloat16):
    there = turn(x.to(dtype), Rotation(space="mid", block=768, seed=7))
    print(hashlib.sha256(there.view(torch.uint8).numpy().tobytes()).hexdigest())
"""


@pytest.mark.usefixtures("one_thread")
def test_another_process_gives_the_same_bits() -> None:
    x = torch.arange(5 * 768, dtype=torch.float64).view(5, 768).sin()
    here = [turn(x.to(dtype), rotation(768, seed=7)) for dtype in (torch.float64, torch.bfloat16)]
    there = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout.split()
    assert there == [hashlib.sha256(one.view(torch.uint8).numpy().tobytes()).hexdigest() for one in here]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "block"), SHAPES)
def test_a_short_dtype_is_rounded_once(width: int, block: int, dtype: torch.dtype) -> None:
    x = noise(40, width).to(dtype)
    there, exact = turn(x, rotation(block)), turn(x.double(), rotation(block))
    assert there.dtype == dtype
    half = torch.finfo(dtype).eps / 2 * exact.abs()  # a bound of half the distance to the next number
    assert ((there.double() - exact).abs() <= half + 2e-5).all()
    back = turn_back(there, rotation(block))
    assert back.dtype == dtype


def test_what_comes_in_is_left_as_it_is() -> None:
    x = noise(2, 3, 128).float()
    kept = x.clone()
    turned = rotation(32)
    every = turn(x, turned)
    assert torch.equal(x, kept)
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(turn(strided, turned), every)
    assert torch.equal(turn(x.transpose(0, 1), turned), every.transpose(0, 1))
    assert turn(x[:0], turned).shape == (0, 3, 128)
    assert turn(x[0, 0], turned).shape == (128,)
    assert turn(x.transpose(0, 1), turned).is_contiguous()


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize(("width", "block"), [(768, 256), (96, 48)])
def test_gradients_are_turned_back(width: int, block: int, kind: str) -> None:
    x, gradient, turned = noise(4, width).requires_grad_(), noise(4, width, seed=1), rotation(block, kind)
    for forward, backward in ((turn, turn_back), (turn_back, turn)):
        (got,) = torch.autograd.grad(forward(x, turned), x, gradient)
        assert torch.equal(got, backward(gradient, turned))
    half = x.detach().bfloat16().requires_grad_()
    (got,) = torch.autograd.grad(turn(half, turned), half, gradient.bfloat16())
    assert torch.equal(got, turn_back(gradient.bfloat16(), turned))


def test_autograd_agrees_with_differences() -> None:
    made = turner(rotation(12), 24, like=noise(1))
    x = noise(2, 24).requires_grad_()
    assert torch.autograd.gradcheck(made.turn, (x,))
    assert torch.autograd.gradgradcheck(made.turn_back, (x,))


def test_a_turner_is_the_functions_made_once() -> None:
    x, turned = noise(7, 768).bfloat16(), rotation(256)
    made = turner(turned, 768, like=x)
    assert torch.equal(made.turn(x), turn(x, turned))
    assert torch.equal(made.turn_back(x), turn_back(x, turned))
    assert torch.equal(made.inverse().inverse().turn(x), turn(x, turned))
    with pytest.raises(ValueError, match="768, not 256"):
        made.turn(x[:, :256])


def test_heads_share_a_turn() -> None:
    heads = noise(5, 3, 64)
    turned = Rotation(space="value", block=64)
    assert torch.equal(turn(heads, turned)[:, 1], turn(heads[:, 1].contiguous(), turned))
    assert torch.equal(turn(heads, Rotation(space="value")), turn(heads, turned))


@pytest.mark.parametrize(("width", "block"), [*SHAPES, (11008, 11008)])
def test_the_cost_is_that_of_what_is_held(width: int, block: int) -> None:
    made = turner(rotation(block), width, like=torch.zeros(1))
    assert made.before is not None
    held = sum(matrix.nbytes for matrix in made.matrices) + made.before.nbytes
    operations = width * (1 + sum(len(matrix) for matrix in made.matrices))
    assert cost(width, rotation(block)) == (operations, held)
    assert cost(width, rotation(block, "hadamard")) == (operations - width, held - made.before.nbytes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "block"), SHAPES)
def test_a_gpu_turns_alike(width: int, block: int, dtype: torch.dtype) -> None:
    x, turned = noise(300, width).to(dtype), rotation(block)
    there = x.cuda().requires_grad_()
    after = turn(there, turned)
    error = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(after.cpu(), turn(x, turned), rtol=0, atol=error)
    (gradient,) = torch.autograd.grad(after, there, there.detach())
    torch.testing.assert_close(gradient.cpu(), turn_back(x, turned), rtol=0, atol=error)
