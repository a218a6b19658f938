"""bitlathe itself; and as others compute with the same weights, so that what else they do otherwise can be told."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.layers import Stage
from bitlathe.model.load import load
from bitlathe.model.source import open_model
from bitlathe.model.weights import DTYPES
from bitlathe.numerics.llama_cpp import product
from bitlathe.numerics.project import QuantTensor
from bitlathe.readers.base import Opened, OpenedModel


def opened(folder: Path) -> Opened:
    """A folder of any of our formats."""
    return OpenedModel(load(folder, device="cpu"))


def opened_weights(folder: Path) -> Opened:
    """The same with activations that stay in 16 bits."""
    model = load(folder, device="cpu")
    for module in model.modules():
        if isinstance(module, Stage):
            module.scheme = None
    return OpenedModel(model)


def opened_as_llama_cpp(folder: Path) -> Opened:
    """The same in float32 with llama.cpp's products: activations in 8 bits before quantized matrices, and before others in the
    dtype that these are in."""
    _, weights = open_model(Checkpoint(folder), device=torch.device("cpu"))
    assert weights.plan is not None
    model = load(folder, device="cpu", dtype="fp32")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            quantized = weights.layer(name).weight if name in weights.plan.quantized else None
            parent, _, child = name.rpartition(".")
            dtype = DTYPES[weights.plan.dtype]
            model.get_submodule(parent).register_module(child, _Product(module, quantized, dtype))
    return OpenedModel(model)


class _Product(nn.Module):
    def __init__(self, linear: nn.Linear, quantized: QuantTensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias, self.quantized, self.dtype = linear.weight, linear.bias, quantized, dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs], float32."""
        if self.quantized is None:
            return F.linear(x.to(self.dtype).float(), self.weight, self.bias)
        y = product(x, self.quantized)
        return y if self.bias is None else y + self.bias
