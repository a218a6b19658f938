"""Names and sizes of schemes."""

from __future__ import annotations

import pytest
import torch

from bitlathe.errors import RecipeError
from bitlathe.numerics.project import QuantTensor, quantize
from bitlathe.numerics.scheme import GRIDS, LLAMA_CPP, PRESETS, SCHEMES, Scheme, canonical_name, name_of, scheme_named


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("W4A16", "W4A16"),
        ("w4a16", "W4A16"),
        ("W4A16_G128", "W4A16"),
        ("w4a16-g32", "W4A16G32"),
        ("w2a16g64-asym", "W2A16G64_ASYM"),
        ("W4A16CHANNEL", "W4A16_CHANNEL"),
        ("w4_a16_channel_asym", "W4A16_CHANNEL_ASYM"),
        ("fp8-block", "FP8_BLOCK"),
        ("mxfp4a16", "MXFP4A16"),
        ("NVFP4-A16", "NVFP4A16"),
    ],
)
def test_names_ignore_case_dashes_and_underscores(typed: str, name: str) -> None:
    assert canonical_name(typed) == name
    assert scheme_named(typed) == SCHEMES[name]


def test_names_and_schemes_are_one_to_one() -> None:
    assert [name_of(SCHEMES[name].served_in("fp16")) for name in SCHEMES] == list(SCHEMES)


def test_what_has_no_name_is_described() -> None:
    static = PRESETS["W8A8_STATIC"].input
    assert name_of(Scheme(grid="FP16")) == "FP16"
    assert name_of(Scheme(grid="BF16"), static) == "BF16 with INT8 per tensor, static"
    assert name_of(Scheme(grid="INT4", block=(1, 16), scale=Scheme(grid="BF16"))) == "INT4[1x16]"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"unknown scheme 'W9A16'.*W4A16G32.*NVFP4A16"):
        canonical_name("W9A16")


def test_what_names_mean() -> None:
    scale = Scheme(grid="BF16")
    assert scheme_named("W4A16") == Scheme(grid="INT4", block=(1, 128), scale=scale)
    assert scheme_named("W3A16_CHANNEL_ASYM") == Scheme(grid="INT3", block=(1, 0), scale=scale, asymmetric=True)
    assert scheme_named("FP8_BLOCK", "fp16") == Scheme(grid="E4M3", block=(128, 128), scale=Scheme(grid="FP16"))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("W4A16", 4 + 16 / 128),
        ("W2A16G32", 2 + 16 / 32),
        ("W2A16G64_ASYM", 2 + (16 + 2) / 64),
        ("W8A16_CHANNEL", 8 + 16 / 256),
        ("FP8_TENSOR", 8 + 16 / (130 * 256)),
        ("FP8_BLOCK", 8 + 16 * 4 / (130 * 256)),
        ("FP8_BLOCK_DYNAMIC", 8 + 32 * 4 / (130 * 256)),
        ("MXFP4A16", 4 + 8 / 32),
        ("NVFP4A16", 4 + 8 / 16 + 32 / (130 * 256)),
        *(("Q4_0", 4.5), ("Q4_1", 5.0), ("Q5_0", 5.5), ("Q5_1", 6.0), ("Q8_0", 8.5)),
        *(("Q2_K", 2.625), ("Q3_K", 3.4375), ("Q4_K", 4.5), ("Q5_K", 5.5), ("Q6_K", 6.5625)),
    ],
)
def test_bits_of_a_weight(name: str, bits: float) -> None:
    assert scheme_named(name).bits((130, 256)) / (130 * 256) == pytest.approx(bits, rel=1e-12)


def _bits_held(q: QuantTensor) -> int:
    own = q.codes.numel() + (0 if q.zero is None else q.zero.numel())
    return own * GRIDS[q.scheme.grid].bits + sum(_bits_held(part) for part in (q.scale, q.minimum) if part is not None)


@pytest.mark.parametrize("name", SCHEMES)
def test_bits_counts_what_quantize_returns(name: str) -> None:
    q = quantize(torch.randn(130, 256), SCHEMES[name])
    assert q.codes.shape == q.shape == (130, 256)
    assert SCHEMES[name].bits((130, 256)) == _bits_held(q)


def test_fits() -> None:
    assert SCHEMES["W4A16"].fits((3, 256))
    assert not SCHEMES["W4A16"].fits((128, 192))
    assert SCHEMES["FP8_BLOCK"].fits((130, 256))
    assert SCHEMES["W4A16_CHANNEL"].fits((3, 7))
    assert SCHEMES["Q4_0"].fits((3, 96))
    assert not SCHEMES["Q4_K"].fits((3, 96))
    assert not SCHEMES["Q6_K"].fits((3, 128))


def test_scales_that_llama_cpp_holds_keep_their_dtype() -> None:
    assert all(scheme.served_in("bf16") == scheme for scheme in LLAMA_CPP.values())
    assert SCHEMES["Q8_0"] != SCHEMES["W8A16G32"].served_in("fp16")


@pytest.mark.parametrize(
    "fields",
    [
        {"grid": "INT9"},
        {"grid": "INT4"},
        {"grid": "E4M3", "scale": Scheme(grid="BF16"), "asymmetric": True},
        {"grid": "BF16", "group": 128},
        {"grid": "UINT4", "scale": Scheme(grid="BF16"), "asymmetric": True},
        {"grid": "INT4", "scale": Scheme(grid="BF16"), "minimum": Scheme(grid="BF16")},
    ],
)
def test_unsound_schemes_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"INT9|needs a scale|asymmetric|group|minimum|minima"):
        Scheme.model_validate(fields)
