"""What a device computes in."""

from __future__ import annotations

import pytest
import torch

from bitlathe.model.source import computed_in

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_without_products_of_16_bits_computes_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert computed_in(dtype, CPU) in (dtype, torch.float32)
    assert computed_in(dtype, torch.device("cuda")) == dtype
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert computed_in(dtype, CPU) == torch.float32
    assert computed_in(dtype, torch.device("cuda")) == dtype
