"""Activations are rounded as compressed-tensors rounds them, bit for bit: its own functions are the reference."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from torch import Tensor, nn

from bitlathe.numerics.activation import StaticScale, fake_quantize_input, static_scale
from bitlathe.numerics.scheme import GRIDS, KV_SCHEMES, PRESETS, Scheme, per_tensor, per_token, static

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCHEMES = {
    **{name: preset.input for name, preset in PRESETS.items() if preset.input is not None},
    **KV_SCHEMES,
    **{f"INT{bits}_TOKEN": per_token(f"INT{bits}") for bits in range(2, 9)},
    **{f"INT{bits}_TOKEN_ASYM": per_token(f"INT{bits}", asymmetric=True) for bits in range(2, 9)},
    "INT8_TENSOR_ASYM": per_tensor("INT8", asymmetric=True),
    "INT4_TENSOR": per_tensor("INT4"),
    "INT4_TENSOR_ASYM": per_tensor("INT4", asymmetric=True),
}
BY_THE_LIBRARY = [name for name in SCHEMES if name != "FP8_BLOCK_DYNAMIC"]
# Each dtype of inputs with the dtype of the plan; the last two are how models are evaluated.
DTYPES = [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "bf16"), (torch.float32, "fp16")]


def library_arguments(scheme: Scheme, dtype: str) -> QuantizationArgs:
    """A scheme in the library's words."""
    grid, scale = GRIDS[scheme.grid], scheme.scale
    assert scale is not None
    common = {"num_bits": grid.bits, "type": "int" if grid.kind == "int" else "float", "symmetric": not scheme.asymmetric}
    if scale.grid == "E8M0":
        held = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
        return QuantizationArgs(strategy="group", group_size=32, dynamic=True, **held, **common)
    if scale.grid == "E4M3":
        held = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
        return QuantizationArgs(strategy="tensor_group", group_size=16, dynamic="local", **held, **common)
    strategy = "tensor" if scheme.block == (0, 0) else "token"
    return QuantizationArgs(strategy=strategy, dynamic=strategy == "token", scale_dtype=PLAN_DTYPES[dtype], **common)


def library(x: Tensor, scheme: Scheme, dtype: str, fixed: StaticScale | None) -> Tensor:
    arguments = library_arguments(scheme, dtype)
    if scheme.block == (0, 0):  # its reader holds these in the model's dtype
        assert fixed is not None
        return fake_quantize(x, fixed.scale.to(x.dtype), fixed.zero, arguments)
    factor = None if fixed is None else fixed.scale
    scale, zero = compute_dynamic_scales_and_zp(x, arguments, nn.Module(), global_scale=factor)
    return fake_quantize(x, scale, zero, arguments, global_scale=factor)


def inputs(dtype: torch.dtype) -> Tensor:
    """[4, 64, 256]: rows of every size the dtype has, with outliers, of zeros, subnormal, and of one sign."""
    generator, facts = torch.Generator().manual_seed(0), torch.finfo(dtype)
    smallest, largest = (-7, 3.5) if dtype == torch.float16 else (-12, 10)
    x = torch.randn(4, 64, 256, generator=generator) * torch.logspace(smallest, largest, 64).unsqueeze(1)
    x[1, :, 3] *= 10
    x[0, 0], x[0, 1], x[0, 2], x[0, 3, 7] = 0, -0.0, 3, -1e-30
    x[2, 0] = torch.randn(256, generator=generator) * facts.tiny
    x[2, 1] = torch.randn(256, generator=generator) * facts.tiny / 16
    x[2, 2] = torch.rand(256, generator=generator) * facts.max
    x[2, 3] = (torch.rand(256, generator=generator) * 2 - 1) * facts.max
    x[2, 4], x[2, 5], x[3, 0, ::2] = x[2, 4].abs(), -x[2, 5].abs(), 0
    return x.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    word = torch.int16 if a.element_size() == 2 else torch.int32
    return a.dtype == b.dtype and bool(((a.view(word) == b.view(word)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize(("x_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize("name", BY_THE_LIBRARY)
def test_the_library_gives_the_same_bits(name: str, x_dtype: torch.dtype, dtype: str) -> None:
    scheme, x = SCHEMES[name].served_in(dtype), inputs(x_dtype)
    for low, high in [(-3.0, 5.0), (-1e4, 0.01), (0.25, 7.0)] if static(scheme) else [(0, 0)]:
        fixed = static_scale(torch.tensor(low), torch.tensor(high), scheme, dtype) if static(scheme) else None
        rounded = fake_quantize_input(x, scheme, fixed=fixed)
        assert same_bits(rounded, library(x, scheme, dtype, fixed))
        assert rounded.isfinite()[:2].all()


@pytest.mark.parametrize(("x_dtype", "dtype"), DTYPES)
def test_groups_with_float32_scales_are_those_of_the_fp8_method(x_dtype: torch.dtype, dtype: str) -> None:
    """As its kernels say it: float32 throughout, and torch's own cast."""
    scheme, x = SCHEMES["FP8_BLOCK_DYNAMIC"].served_in(dtype), inputs(x_dtype)
    groups = x.float().unflatten(-1, (2, 128))
    scale = groups.abs().amax(-1, keepdim=True) / torch.tensor(448.0)
    scale = torch.where(scale == 0, 1.0, scale)
    expected = ((groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x_dtype)
    rounded = fake_quantize_input(x, scheme)
    assert torch.equal(rounded, expected) and not torch.equal(rounded, x)
    assert rounded.isfinite().all()


@pytest.mark.parametrize("element", ["E2M1", "E4M3"])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_exponent_and_where_it_turns(element: str, x_dtype: torch.dtype) -> None:
    scheme = SCHEMES["MXFP4"] if element == "E2M1" else SCHEMES["MXFP8"]
    exponents = torch.arange(-14, 15) if x_dtype == torch.float16 else torch.arange(-126, 127)
    mantissas = torch.tensor([1.0, 1.5, 1.74, 1.75 - 2**-10, 1.75, 1.76, 1.99])
    largest = (2.0 ** exponents.double().unsqueeze(1) * mantissas).float().to(x_dtype)
    x = largest.reshape(-1, 1, 1) * torch.linspace(-1, 1, 32, dtype=x_dtype)
    assert same_bits(fake_quantize_input(x, scheme), library(x, scheme, "bf16", None))


@pytest.mark.parametrize("dtype", PLAN_DTYPES)
@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if static(scheme)])
def test_static_scales_are_the_librarys(name: str, dtype: str) -> None:
    scheme = SCHEMES[name].served_in(dtype)
    for low, high in [(-3.0, 5.0), (-71.3, 0.1), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0), (-1e-42, 1e-41), (-1e30, 3e38)]:
        fixed = static_scale(torch.tensor(low), torch.tensor(high), scheme, dtype)
        if scheme.block == (0, 0):
            scale, zero = calculate_qparams(torch.tensor(low), torch.tensor(high), library_arguments(scheme, dtype))
            assert same_bits(fixed.scale, scale.to(PLAN_DTYPES[dtype]))
            assert fixed.zero is None if not scheme.asymmetric else fixed.zero is not None and torch.equal(fixed.zero, zero)
        else:
            assert same_bits(fixed.scale, generate_gparam(torch.tensor(low), torch.tensor(high)))
        assert fixed.scale.shape == (1,)


def test_known_numbers() -> None:
    x = torch.tensor([[7.5, -7.5, 2.4, -0.4, 0.0]], dtype=torch.bfloat16)
    assert fake_quantize_input(x, per_token("INT4")).tolist() == [[7.0, -8.0, 2.0, 0.0, 0.0]]  # -8 is a code, 8 is none
    asymmetric = torch.tensor([[0.0, 1.0, 7.4, 15.0]], dtype=torch.bfloat16)
    assert fake_quantize_input(asymmetric, per_token("INT4", asymmetric=True)).tolist() == [[0.0, 1.0, 7.0, 15.0]]
    fixed = static_scale(torch.tensor(-127.5), torch.tensor(100.0), per_tensor("INT8"), "bf16")
    assert (fixed.scale.dtype, fixed.scale.tolist(), fixed.zero) == (torch.bfloat16, [1.0], None)
    assert fake_quantize_input(torch.tensor([200.0, 3.2, -200.0]), per_tensor("INT8"), fixed=fixed).tolist() == [127, 3, -128]
    factor = static_scale(torch.tensor(-2.0), torch.tensor(1.0), SCHEMES["NVFP4"], "bf16")
    assert (factor.scale.dtype, factor.scale.tolist()) == (torch.float32, [1344.0])


def test_scales_are_those_that_will_be_served() -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    x[..., 0] = torch.linspace(4, 9, 15).view(3, 5)  # the largest number of a row has the code 7
    for dtype in PLAN_DTYPES:
        steps = fake_quantize_input(x, per_token("INT4").served_in(dtype)).amax(-1) / 7
        assert torch.equal(steps, steps.to(PLAN_DTYPES[dtype]).float())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(256,), (6, 256), (2, 3, 256), (1, 2, 3, 256)])
def test_each_row_is_rounded_by_itself(name: str, shape: tuple[int, ...]) -> None:
    scheme = SCHEMES[name]
    fixed = static_scale(torch.tensor(-3.0), torch.tensor(4.0), scheme, "bf16") if static(scheme) else None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    alone = torch.stack([fake_quantize_input(row, scheme, fixed=fixed) for row in x.view(-1, 256)])
    assert torch.equal(fake_quantize_input(x, scheme, fixed=fixed), alone.view(shape))


@pytest.mark.parametrize("name", SCHEMES)
def test_no_tokens_views_and_nan(name: str) -> None:
    scheme = SCHEMES[name]
    fixed = static_scale(torch.tensor(-3.0), torch.tensor(4.0), scheme, "bf16") if static(scheme) else None
    assert fake_quantize_input(torch.zeros(2, 0, 256), scheme, fixed=fixed).shape == (2, 0, 256)
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(3)).bfloat16()
    kept = x.clone()
    assert torch.equal(
        fake_quantize_input(x.T, scheme, fixed=fixed), fake_quantize_input(x.T.contiguous(), scheme, fixed=fixed)
    )
    assert torch.equal(x, kept)
    x[7, 2] = torch.nan
    rounded = fake_quantize_input(x.T, scheme, fixed=fixed)
    assert rounded[2, 7].isnan()
    assert rounded[3].isfinite().all()
    x[7, 2] = torch.inf
    assert fake_quantize_input(x.T, scheme, fixed=fixed)[3].isfinite().all()


def test_clipping_narrows_the_range() -> None:
    x = torch.tensor([[10.0, -1.0, 0.26, 3.0]])
    whole, clipped = fake_quantize_input(x, per_token("INT4")), fake_quantize_input(x, per_token("INT4"), clip=0.5)
    assert torch.equal(clipped, fake_quantize_input(x.clamp(max=5), per_token("INT4")))
    assert (clipped - x)[0, 1:].abs().sum() < (whole - x)[0, 1:].abs().sum()
    low, high = torch.tensor(-4.0), torch.tensor(8.0)
    for scheme in SCHEMES.values():
        if static(scheme):
            narrow, half = static_scale(low, high, scheme, "bf16", clip=0.5), static_scale(low / 2, high / 2, scheme, "bf16")
            assert torch.equal(narrow.scale, half.scale)
            assert narrow.zero is half.zero or (narrow.zero is not None and narrow.zero.equal(torch.as_tensor(half.zero)))


def gradient(x: Tensor, scheme: Scheme, *, clip: float = 1.0, fixed: StaticScale | None = None) -> Tensor:
    leaf = x.clone().requires_grad_()
    rounded = fake_quantize_input(leaf, scheme, clip=clip, fixed=fixed)
    assert torch.equal(rounded.detach(), fake_quantize_input(x, scheme, clip=clip, fixed=fixed))
    seed = torch.arange(1.0, x.numel() + 1).view(x.shape).to(x.dtype)
    return torch.autograd.grad(rounded, leaf, seed)[0] / seed


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_gradients_pass_but_where_numbers_are_cut_off(x_dtype: torch.dtype) -> None:
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(4)).to(x_dtype)
    for scheme in SCHEMES.values():
        if not static(scheme):
            assert (gradient(x, scheme) == 1).all()
    x[0, 0] = 20
    assert gradient(x, per_token("INT4"), clip=0.5)[0].tolist() == [0.0] + [1.0] * 127
    for scheme in (per_tensor("INT8"), per_tensor("INT8", asymmetric=True), per_tensor("E4M3"), SCHEMES["NVFP4"]):
        fixed = static_scale(torch.tensor(-5.0), torch.tensor(5.0), scheme, "bf16")
        assert gradient(x, scheme, fixed=fixed).flatten().tolist() == [0.0] + [1.0] * 511
    assert (gradient(-x, per_tensor("INT8"), fixed=fixed_of(5.0)) == 0).sum() == 1


def fixed_of(largest: float) -> StaticScale:
    return static_scale(torch.tensor(-largest), torch.tensor(largest), per_tensor("INT8"), "bf16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("x_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_device_gives_the_same_bits(name: str, x_dtype: torch.dtype, dtype: str) -> None:
    scheme, x = SCHEMES[name].served_in(dtype), inputs(x_dtype)
    fixed = static_scale(torch.tensor(-3.0), torch.tensor(5.0), scheme, dtype) if static(scheme) else None
    expected = fake_quantize_input(x, scheme, fixed=fixed)
    on_device = static_scale(torch.tensor(-3.0).cuda(), torch.tensor(5.0).cuda(), scheme, dtype) if fixed is not None else None
    rounded = fake_quantize_input(x.cuda(), scheme, fixed=on_device)
    assert same_bits(rounded.cpu(), expected)
