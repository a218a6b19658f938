"""Law 1 over every scheme, gradients straight through the rounding, and the search for ranges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitlathe.errors import CheckpointError
from bitlathe.numerics.grids import decode, limits
from bitlathe.numerics.project import Learned, QuantTensor, dequantize, fake_quantize, quantize, search
from bitlathe.numerics.scheme import GRIDS, LLAMA_CPP, SCHEMES, Scheme, scheme_named

COLUMNS = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rows_for(scheme: Scheme) -> int:
    """Few rows; for square blocks, a last block that is ragged."""
    return 131 if scheme.block[0] > 1 else 3


def gaussian(scheme: Scheme, seed: int = 0) -> Tensor:
    return torch.randn(rows_for(scheme), COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02


WEIGHTS = {
    "ordinary": lambda w: w,
    "zero": lambda w: w * 0,
    "minus zero": lambda w: w * -0.0,
    "constant": lambda w: w * 0 - 0.37,
    "positive": lambda w: w.abs(),
    "negative": lambda w: -w.abs(),
    "denormal": lambda w: w * 1e-39,
    "least": lambda w: torch.where(w > 0, 1e-45, 0.0),
    "huge": lambda w: w.sign() * 3.4e38,
    "mixed": lambda w: w * 10.0 ** torch.linspace(-38, 38, COLUMNS),
    "a large one": lambda w: torch.where(w == w.max(), 3e38, w),
    "beyond fp16": lambda w: w * 1e7,
    "some zero groups": lambda w: torch.where(torch.arange(COLUMNS) < COLUMNS // 2, 0.0, w),
    "symmetric extremes": lambda w: w.sign(),
}


def learned_at_random(w: Tensor, scheme: Scheme, seed: int) -> Learned:
    """Everything a tuner may move, and ranges it would hardly choose: none, negative, twice what is there."""
    generator = torch.Generator().manual_seed(seed)
    blocks = scheme.blocks((w.shape[0], w.shape[1]))
    high = torch.randn(blocks, generator=generator) * 2
    high[torch.rand(blocks, generator=generator) < 0.2] = 0.0
    return Learned(
        offset=torch.rand(w.shape, generator=generator) - 0.5,
        low=torch.rand(blocks, generator=generator) * 2 if scheme.two_ended else None,
        high=high,
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    word = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(word), b.view(word))


def codes_on_grid(q: QuantTensor) -> bool:
    grid = GRIDS[q.scheme.grid]
    low, high = limits(grid, unsigned=q.scheme.asymmetric)
    numbers = decode(q.codes, grid)
    inside = bool(numbers.isfinite().all()) and bool((numbers >= low).all()) and bool((numbers <= high).all())
    return inside and all(part is None or codes_on_grid(part) for part in (q.scale, q.minimum))


@pytest.mark.parametrize("name", SCHEMES)
@settings(deadline=None, max_examples=12)
@given(
    kind=st.sampled_from(sorted(WEIGHTS)),
    scales=st.sampled_from(["bf16", "fp16"]),
    dtype=st.sampled_from(sorted(DTYPES)),
    tuned=st.sampled_from([None, 1, 2]),
)
def test_law_1_the_three_readings_agree(name: str, kind: str, scales: str, dtype: str, tuned: int | None) -> None:
    scheme = SCHEMES[name].served_in(scales)
    w = WEIGHTS[kind](gaussian(scheme))
    learned = None if tuned is None else learned_at_random(w, scheme, tuned)
    q = quantize(w, scheme, learned)
    weight = dequantize(q, DTYPES[dtype])
    assert same_bits(weight, fake_quantize(w, scheme, learned, dtype=DTYPES[dtype]))
    assert weight.shape == w.shape
    assert weight.isfinite().all()
    assert codes_on_grid(q)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["W2A16G32", "W4A16G32_ASYM", "W8A16_CHANNEL_ASYM", "MXFP4A16", "MXFP8A16", "NVFP4A16", "FP8_TENSOR"]),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32),
)
def test_law_1_for_any_numbers_at_all(name: str, values: list[float]) -> None:
    w, scheme = torch.tensor([values]), SCHEMES[name]
    weight = dequantize(quantize(w, scheme), torch.bfloat16)
    assert same_bits(weight, fake_quantize(w, scheme, dtype=torch.bfloat16))
    assert weight.isfinite().all()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_group_of_zeros_stays_zero(name: str) -> None:
    scheme = SCHEMES[name]
    w = WEIGHTS["zero"](gaussian(scheme))
    offset = torch.rand(w.shape) - 0.5
    assert (dequantize(quantize(w, scheme), torch.float32) == 0).all()
    assert (dequantize(quantize(w, scheme, Learned(offset=offset)), torch.float32) == 0).all()


# The largest error a value can have, as a part of its block's largest magnitude: half a step, and what a scale rounded to 8
# bits adds; a whole step at the short end of a signed grid; a quarter of 4..6 and of 6..8 in E2M1.
@pytest.mark.parametrize("name", SCHEMES)
def test_errors_are_within_a_step(name: str) -> None:
    scheme = SCHEMES[name]
    w = gaussian(scheme)
    bits = GRIDS[scheme.grid].bits
    # A minimum rounds as well, and a scale of few bits more than half a step at the far end.
    if scheme.minimum is not None:
        bits -= 1 + (scheme.minimum.grid == "UINT4")
    of_range = {"E2M1": 0.2, "E4M3": 0.07}.get(scheme.grid, (2.0 if scheme.asymmetric else 1.0) * 2.0 ** (1 - bits) + 0.01)
    assert ((fake_quantize(w, scheme, dtype=torch.float32) - w).abs() <= of_range * w.abs().max()).all()


def test_symmetric_integers_use_the_full_signed_range() -> None:
    scheme = Scheme(grid="INT2", block=(1, 4), scale=Scheme(grid="BF16"))
    q = quantize(torch.tensor([[4.0, -2.0, 2.0, 0.0], [-4.0, -2.0, 2.0, 4.0]]), scheme)
    assert q.scale is not None
    assert q.scale.codes.tolist() == [[-2.0], [2.0]]
    assert q.codes.tolist() == [[-2, 1, -1, 0], [-2, -1, 1, 1]]


def test_asymmetric_integers_literally() -> None:
    scheme = Scheme(grid="INT2", block=(1, 4), scale=Scheme(grid="BF16"), asymmetric=True)
    q = quantize(torch.tensor([[-1.0, 0.0, 1.0, 2.0], [3.0, 3.0, 1.0, 2.0]]), scheme)
    assert q.scale is not None
    assert q.zero is not None
    assert q.scale.codes.tolist() == [[1.0], [1.0]]
    assert q.zero.tolist() == [[1], [0]]
    assert q.codes.tolist() == [[0, 1, 2, 3], [3, 3, 1, 2]]
    assert (q.codes.dtype, q.zero.dtype) == (torch.uint8, torch.uint8)


@pytest.mark.parametrize(("largest", "exponent"), [(7.25, 0), (7.26, 1), (6.0, 0), (3.625, -1), (14.5, 1)])
def test_mxfp4_exponent_rounds_up_from_seven_and_a_quarter(largest: float, exponent: int) -> None:
    w = torch.zeros(1, 32)
    w[0, 5] = -largest
    q = quantize(w, SCHEMES["MXFP4A16"])
    assert q.scale is not None
    assert q.scale.codes.tolist() == [[127 + exponent]]


def test_nvfp4_tensor_scale_is_a_power_of_two_with_room_above() -> None:
    for seed, size in ((0, 1.0), (1, 3e-6), (2, 77.0)):
        w = gaussian(SCHEMES["NVFP4A16"], seed) * size
        q = quantize(w, SCHEMES["NVFP4A16"])
        assert q.scale is not None
        assert q.scale.scale is not None
        outer = q.scale.scale.codes.item()
        assert torch.frexp(torch.tensor(outer)).mantissa == 0.5
        assert 128 < w.abs().max().item() / 6 / outer <= 256
        assert (q.scale.codes.float() > 0).all()


def test_a_peak_sets_what_a_group_shares() -> None:
    w, peak = gaussian(SCHEMES["NVFP4A16"]), torch.tensor(5.0)
    nvfp4, fp8 = (quantize(w, SCHEMES[name], peak=peak) for name in ("NVFP4A16", "FP8_TENSOR"))
    assert nvfp4.scale is not None
    assert nvfp4.scale.scale is not None
    assert nvfp4.scale.scale.codes.item() == 2.0**-8  # 5 / 6 / 2^-8 = 213
    assert fp8.scale is not None
    assert fp8.scale.codes.item() == torch.tensor(5.0 / 448).bfloat16().item()
    for name, q in (("NVFP4A16", nvfp4), ("FP8_TENSOR", fp8)):
        weight = fake_quantize(w, SCHEMES[name], peak=peak, dtype=torch.bfloat16)
        assert same_bits(dequantize(q, torch.bfloat16), weight)
    assert search(w, SCHEMES["FP8_TENSOR"], peak=peak) == Learned()


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "FP8_BLOCK", "MXFP4A16", "NVFP4A16"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    w = gaussian(SCHEMES[name])
    w[1, 7] = value
    with pytest.raises(CheckpointError, match=rf"1 of {w.numel()} values of the weight are infinite or NaN"):
        quantize(w, SCHEMES[name])


def test_a_plain_dtype_is_a_scheme_too() -> None:
    w = gaussian(SCHEMES["W4A16"])
    q = quantize(w, Scheme(grid="BF16"))
    assert same_bits(dequantize(q, torch.bfloat16), w.bfloat16())
    assert same_bits(fake_quantize(w, Scheme(grid="BF16"), dtype=torch.float32), w.bfloat16().float())


def by_hand(w: Tensor, learned: Learned, bits: int) -> Tensor:
    """Asymmetric or symmetric integers in groups of 32 out of torch's own pieces, rounding straight through."""
    groups = w.view(w.shape[0], -1, 32)
    offset, high = learned.offset, learned.high
    assert offset is not None
    assert high is not None

    def through(x: Tensor, rounded: Tensor) -> Tensor:
        return x + (rounded - x).detach()

    if learned.low is None:
        low, top, zero = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1, torch.zeros(())
        extreme = torch.where(groups.amax(-1) > -groups.amin(-1), groups.amax(-1), groups.amin(-1))
        scale = extreme * high / low
    else:
        low, top = 0.0, 2.0**bits - 1
        scale = (groups.amax(-1) * high - groups.amin(-1) * learned.low) / top
    scale = through(scale, scale.bfloat16().float())[..., None]
    if learned.low is not None:
        zero = -groups.amin(-1, keepdim=True) * learned.low[..., None] / scale
        zero = through(zero, zero.round()).clamp(0, top)
    moved = groups / scale + offset.view_as(groups)
    return ((through(moved, moved.round()) + zero).clamp(low, top).sub(zero) * scale).view_as(w)


@pytest.mark.parametrize("name", ["W2A16G32", "W4A16G32", "W2A16G32_ASYM", "W4A16G32_ASYM"])
def test_gradients_of_integers_are_those_of_autograd(name: str) -> None:
    scheme, generator = SCHEMES[name], torch.Generator().manual_seed(3)
    w = torch.randn(6, 96, generator=generator)
    ranges = [(torch.rand(6, 3, generator=generator) * 0.4 + 0.6).requires_grad_() for _ in range(2)]
    offset = (torch.rand(6, 96, generator=generator) - 0.5).requires_grad_()
    learned = Learned(offset, ranges[0] if scheme.asymmetric else None, ranges[1])
    moved = [offset, ranges[1], *([ranges[0]] if scheme.asymmetric else [])]
    upstream = torch.randn(6, 96, generator=generator)
    ours = fake_quantize(w, scheme, learned, dtype=torch.float32)
    theirs = by_hand(w, learned, GRIDS[scheme.grid].bits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(theirs, moved, upstream)
    for got, expected in zip(torch.autograd.grad(ours, moved, upstream), wanted, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_gradients_of_llama_cpp_types_are_those_of_autograd(name: str) -> None:
    """Scales and minima that are integers are rounded straight through as well; the scales of scales have no gradient."""
    scheme, generator = LLAMA_CPP[name], torch.Generator().manual_seed(3)
    w = torch.randn(4, 512, generator=generator)
    blocks = scheme.blocks((4, 512))
    offset = (torch.rand(4, 512, generator=generator) - 0.5).requires_grad_()
    low, high = (torch.rand(blocks, generator=generator).mul(0.4).add(0.6).requires_grad_() for _ in range(2))
    learned = Learned(offset, low if scheme.two_ended else None, high)
    q = quantize(w, scheme, learned)
    assert q.scale is not None

    def through(wanted: Tensor, stored: QuantTensor) -> Tensor:
        return wanted + (dequantize(stored, torch.float32) - wanted).detach()

    groups = w.view(4, blocks[1], -1)
    bits, least, most = GRIDS[scheme.grid].bits, groups.amin(-1), groups.amax(-1)
    if q.minimum is None:
        scale, off = (
            through(torch.where(most > -least, most, least) * high / -(2.0 ** (bits - 1)), q.scale),
            torch.zeros(blocks),
        )
    else:
        scale, off = through((most - least) / (2**bits - 1) * high, q.scale), through(-least * low, q.minimum)
    exact = (groups + off[..., None]) / scale[..., None] + offset.view_as(groups)
    landed = (exact + (exact.round() - exact).detach()).clamp(*limits(GRIDS[scheme.grid]))
    theirs = (landed * scale[..., None] - off[..., None]).view_as(w)
    ours = fake_quantize(w, scheme, learned, dtype=torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream, moved = torch.randn(4, 512, generator=generator), [offset, high, *([low] if scheme.two_ended else [])]
    wanted = torch.autograd.grad(theirs, moved, upstream)
    for got, expected in zip(torch.autograd.grad(ours, moved, upstream), wanted, strict=True):
        assert expected.abs().max() > 0.003
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["FP8_CHANNEL", "FP8_BLOCK", "MXFP4A16", "NVFP4A16"])
def test_gradients_of_floats(name: str) -> None:
    scheme = SCHEMES[name]
    w = gaussian(scheme)
    blocks = scheme.blocks((w.shape[0], w.shape[1]))
    high = torch.full(blocks, 0.4, requires_grad=True)
    offset = (torch.rand(w.shape) - 0.5).requires_grad_()
    out = fake_quantize(w, scheme, Learned(offset=offset, high=high), dtype=torch.float32)
    of_offset, of_high = torch.autograd.grad(out, [offset, high], torch.ones_like(w))
    # A step of the grid is worth a step of the weight, and nothing where the weight saturates.
    assert of_offset.min() >= 0
    assert of_offset.max() > 0
    assert (of_offset[w.abs() == w.abs().max()] == 0).all()
    assert of_high.isfinite().all()
    # Widening the range moves only what saturates, outwards, besides the error of rounding: the sum of signs shows it.
    saturating = torch.autograd.grad(fake_quantize(w, scheme, Learned(high=high), dtype=torch.float32), high, w.sign())[0]
    assert saturating.mean() > 0


def test_gradients_reach_a_16_bit_weight_and_not_the_original() -> None:
    scheme = SCHEMES["W4A16"]
    w = gaussian(scheme).requires_grad_()
    offset = torch.zeros(w.shape, requires_grad=True)
    out = fake_quantize(w, scheme, Learned(offset=offset), dtype=torch.bfloat16)
    out.backward(torch.ones_like(out))
    assert w.grad is None
    assert offset.grad is not None
    assert offset.grad.dtype == torch.float32
    assert offset.grad.abs().max() > 0


def test_following_the_gradient_lessens_the_error() -> None:
    scheme = SCHEMES["W2A16G32"]
    w = gaussian(scheme)
    high = torch.ones(scheme.blocks((w.shape[0], w.shape[1])), requires_grad=True)

    def error() -> Tensor:
        return (fake_quantize(w, scheme, Learned(high=high), dtype=torch.float32) - w).square().sum()

    first = error()
    for _ in range(40):
        (grad,) = torch.autograd.grad(error(), high)
        with torch.no_grad():
            high -= 0.005 * grad.sign()
    assert error() < 0.97 * first


# How much of the error round to nearest makes the search leaves on Gaussians, at most; measured, with a little room.
@pytest.mark.parametrize(
    ("name", "left"),
    [
        *(("W2A16", 0.76), ("W2A16G32_ASYM", 0.72), ("W3A16", 0.82), ("W4A16", 0.90), ("W4A16_ASYM", 0.94)),
        *(("W4A16_CHANNEL", 0.85), ("NVFP4A16", 0.75), ("FP8_CHANNEL", 0.97), ("MXFP4A16", 1.0)),
        *(("Q2_K", 0.64), ("Q3_K", 0.87), ("Q4_K", 0.83), ("Q5_K", 0.85), ("Q6_K", 0.8), ("Q4_0", 0.91), ("Q4_1", 0.83)),
    ],
)
def test_search_lessens_the_error(name: str, left: float) -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(5))
    scheme = scheme_named(name)

    def error(learned: Learned | None) -> Tensor:
        return (fake_quantize(w, scheme, learned, dtype=torch.float32) - w).square().sum()

    assert error(search(w, scheme)) <= left * error(None)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("kind", ["ordinary", "zero", "some zero groups", "huge", "denormal"])
def test_search_is_never_worse_in_any_block(name: str, kind: str) -> None:
    scheme = SCHEMES[name]
    w = WEIGHTS[kind](gaussian(scheme))
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) ** 3
    found = search(w, scheme, importance)
    assert found.high is not None
    assert found.high.shape == scheme.blocks((w.shape[0], w.shape[1]))
    assert (found.low is not None) == scheme.two_ended
    before, after = (
        ((fake_quantize(w, scheme, learned, dtype=torch.float32) - w).double().square() * importance).sum()
        for learned in (None, found)
    )
    assert after <= before * (1 + 1e-6)


def test_search_obeys_the_importance() -> None:
    """What counts is kept: with one column that matters, its error nearly vanishes."""
    scheme = SCHEMES["W3A16_CHANNEL"]
    w = gaussian(scheme)
    importance = torch.full((COLUMNS,), 1e-6)
    importance[17] = 1.0
    found = fake_quantize(w, scheme, search(w, scheme, importance), dtype=torch.float32)
    plain = fake_quantize(w, scheme, dtype=torch.float32)
    assert (found - w)[:, 17].abs().max() < 0.2 * (plain - w)[:, 17].abs().max()


def test_search_does_not_depend_on_how_rows_are_cut() -> None:
    w = torch.randn(640, 1024, generator=torch.Generator().manual_seed(6))
    for name in ("W4A16", "FP8_BLOCK", "NVFP4A16"):
        whole = search(w, SCHEMES[name]).high
        part = search(w[:128], SCHEMES[name], peak=w.abs().amax()).high
        assert whole is not None
        assert part is not None
        assert torch.equal(whole[: part.shape[0]], part)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SCHEMES)
def test_a_gpu_gives_the_same_codes(name: str) -> None:
    scheme = SCHEMES[name]
    w = gaussian(scheme)
    learned = learned_at_random(w, scheme, 1)
    moved = Learned(*(None if x is None else x.cuda() for x in (learned.offset, learned.low, learned.high)))
    here, there = quantize(w, scheme, learned), quantize(w.cuda(), scheme, moved)
    assert same_bits(dequantize(here, torch.bfloat16), dequantize(there, torch.bfloat16).cpu())
