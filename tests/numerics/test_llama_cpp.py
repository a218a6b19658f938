"""Products with activations in 8 bits: close to exact ones, and exact for what 8 bits hold."""

from __future__ import annotations

import pytest
import torch

from bitlathe.numerics.llama_cpp import product
from bitlathe.numerics.project import dequantize, quantize
from bitlathe.numerics.scheme import LLAMA_CPP


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_a_product_is_that_of_rounded_activations(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(8, 512, generator=generator), LLAMA_CPP[name])
    x = torch.randn(2, 3, 512, generator=generator)
    exact = x @ dequantize(weight, torch.float32).T
    apart = (product(x, weight) - exact).abs().max() / exact.abs().max()
    assert 1e-5 < apart < 1e-2
    # Whole numbers of up to 7 bits, each block's largest one the end of the grid, are what 8 bits hold.
    whole = torch.randint(-126, 127, x.shape, generator=generator).float()
    whole.unflatten(-1, (-1, 32))[..., 0] = 127.0
    torch.testing.assert_close(product(whole, weight), whole @ dequantize(weight, torch.float32).T, rtol=1e-3, atol=1e-2)
    assert (product(torch.zeros(1, 512), weight) == 0).all()
