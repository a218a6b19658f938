"""Every grid rounds as its format and its readers do."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, round_to_quantized_type_args
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitlathe.numerics.grids import decode, encode, limits, snap
from bitlathe.numerics.scheme import GRIDS

INTEGERS = [(f"INT{bits}", unsigned) for bits in range(2, 9) for unsigned in (False, True)]
ALL = [*INTEGERS, *((name, False) for name in ("E2M1", "E4M3", "E8M0", "BF16", "FP16", "FP32"))]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def many(seed: int, count: int = 20_000) -> Tensor:
    """Finite floats of every exponent and sign, and plenty of ordinary ones."""
    generator = torch.Generator().manual_seed(seed)
    every = torch.randint(-(2**31), 2**31 - 1, (count,), generator=generator).to(torch.int32).view(torch.float32)
    usual = torch.randn(count, generator=generator) * 10 ** (torch.rand(count, generator=generator) * 9 - 5)
    ties = torch.arange(-2000, 2000) / 32
    return torch.cat([every[every.isfinite()], usual, ties, torch.tensor([0.0, -0.0, 1e-45, 3.4e38, -3.4e38])])


def test_e2m1_literally() -> None:
    table = {
        0.0: 0.0, 0.25: 0.0, 0.2500001: 0.5, 0.5: 0.5, 0.7499999: 0.5, 0.75: 1.0, 1.25: 1.0, 1.2500001: 1.5, 1.7499999: 1.5,
        1.75: 2.0, 2.5: 2.0, 2.5000002: 3.0, 3.4999998: 3.0, 3.5: 4.0, 5.0: 4.0, 5.0000005: 6.0, 6.0: 6.0, 7.25: 6.0, 1e30: 6.0,
    }  # fmt: skip
    x, expected = torch.tensor(list(table)), torch.tensor(list(table.values()))
    assert same_bits(snap(x, GRIDS["E2M1"]), expected)
    assert same_bits(snap(-x, GRIDS["E2M1"]), -expected)


def test_e2m1_codes_literally() -> None:
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert encode(torch.cat([values, -values]), GRIDS["E2M1"]).tolist() == list(range(16))
    assert same_bits(decode(torch.arange(16, dtype=torch.uint8), GRIDS["E2M1"]), torch.cat([values, -values]))


def test_e8m0_codes_literally() -> None:
    grid = GRIDS["E8M0"]
    x = torch.tensor([0.0, 1e-45, 2.0**-126, 0.5, 0.5000001, 1.0, 1.5, 3.0, 2.0**127, 3.4e38])
    assert encode(snap(x, grid), grid).tolist() == [1, 1, 1, 126, 127, 127, 128, 129, 254, 254]
    every = torch.arange(255, dtype=torch.uint8)
    assert decode(every, grid).tolist() == [2.0 ** (code - 127) for code in range(255)]


def test_integers_literally() -> None:
    x = torch.tensor([-9.0, -8.0, -1.5, -0.5, -0.4, 0.5, 1.5, 2.5, 7.0, 7.6, 1e30])
    assert encode(snap(x, GRIDS["INT4"]), GRIDS["INT4"]).tolist() == [-8, -8, -2, 0, 0, 0, 2, 2, 7, 7, 7]
    codes = encode(snap(x, GRIDS["INT4"], unsigned=True), GRIDS["INT4"], unsigned=True)
    assert codes.tolist() == [0, 0, 0, 0, 0, 0, 2, 2, 7, 8, 15]


@pytest.mark.parametrize(("name", "unsigned"), ALL)
def test_snap_is_finite_stays_and_survives_its_codes(name: str, *, unsigned: bool) -> None:
    grid = GRIDS[name]
    snapped = snap(many(1), grid, unsigned=unsigned)
    low, high = limits(grid, unsigned=unsigned)
    assert snapped.isfinite().all()
    assert snapped.min() >= low
    assert snapped.max() <= high
    assert same_bits(snap(snapped, grid, unsigned=unsigned), snapped)
    back = decode(encode(snapped, grid, unsigned=unsigned), grid)
    # Integer codes have one zero; everywhere else the sign of a zero survives.
    assert same_bits(back, snapped + 0.0 if grid.kind == "int" else snapped)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_small_floats_are_the_nearest(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    for name in ("E2M1", "E4M3"):
        grid = GRIDS[name]
        codes = torch.arange(16 if name == "E2M1" else 127, dtype=torch.uint8)
        numbers = decode(codes.view(torch.float8_e4m3fn) if name == "E4M3" else codes, grid).double()
        numbers = torch.cat([numbers, -numbers])
        distance = (x.double()[:, None] - numbers[None]).abs().amin(dim=1)
        assert torch.equal((x.double() - snap(x, grid).double()).abs(), distance)


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("FP16", torch.float16), ("E4M3", torch.float8_e4m3fn)])
def test_rounding_to_a_dtype_is_a_saturating_cast(name: str, dtype: torch.dtype) -> None:
    x = many(2)
    largest = torch.finfo(dtype).max
    assert same_bits(snap(x, GRIDS[name]), x.clamp(-largest, largest).to(dtype).float())


@pytest.mark.parametrize(("name", "bits"), [("E2M1", 4), ("E4M3", 8)])
def test_small_floats_round_as_compressed_tensors_does(name: str, bits: int) -> None:
    x = many(3)
    low, high = (torch.tensor(limit) for limit in limits(GRIDS[name]))
    args = QuantizationArgs(num_bits=bits, type="float", symmetric=True)
    theirs = round_to_quantized_type_args(x.clone(), args, low, high)
    assert torch.equal(snap(x, GRIDS[name]), theirs)
    if name == "E2M1":
        assert torch.equal(snap(x, GRIDS[name]), FP4_E2M1_DATA.cast_to_fp4(x.clone()))
