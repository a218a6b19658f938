"""What a device computes in."""

from __future__ import annotations

import pytest
import torch

from bitlathe.model.source import computed_in

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_without_products_of_bfloat16_computes_in_float32(*, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: has)
    assert computed_in(torch.bfloat16, CPU) == (torch.bfloat16 if has else torch.float32)
    assert computed_in(torch.bfloat16, GPU) == torch.bfloat16
    assert computed_in(torch.float16, CPU) == torch.float16


def test_nor_does_one_without_the_library_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert computed_in(torch.bfloat16, CPU) == torch.float32
