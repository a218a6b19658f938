"""The linears a block runs while it is tuned, and after."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitlathe.numerics.project import Learned, QuantTensor, dequantize, fake_quantize
from bitlathe.numerics.scheme import Scheme


class TunedLinear(nn.Linear):
    """A linear that learns how to be rounded: y = x W'^T + b with W' the projection of W under `learned`.

    weight: [outputs, inputs] float32, fixed. offset [outputs, inputs] in grid steps, low and high [blocks] as multiples of
    the range's two ends: what is learned. It computes in the dtype of its input's block, `dtype`.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme, start: Learned, *, peak: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.scheme, self.peak, self.dtype = scheme, peak, dtype
        self.weight = nn.Parameter(linear.weight.detach().float(), requires_grad=False)
        self.bias = linear.bias
        self.offset = nn.Parameter(torch.zeros_like(self.weight) if start.offset is None else start.offset.clone())
        self.low = None if start.low is None else nn.Parameter(start.low.clone())
        self.high = None if start.high is None else nn.Parameter(start.high.clone())

    @property
    def learned(self) -> Learned:
        """What has been learned so far; `quantize` of the weight with it gives the codes this layer runs."""
        return Learned(offset=self.offset, low=self.low, high=self.high)

    def bounded(self) -> list[tuple[nn.Parameter, float, float]]:
        """What is learned, each with the bounds it stays in: half a step either way, and never more than the whole range."""
        ranges = [(end, 0.0, 1.0) for end in (self.low, self.high) if end is not None]
        return [(self.offset, -0.5, 0.5), *ranges]

    def forward(self, input: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        weight = fake_quantize(self.weight, self.scheme, self.learned, peak=self.peak, dtype=self.dtype)
        return F.linear(input, weight, self.bias)


class QuantLinear(nn.Linear):
    """A finished linear: it runs the dequantized codes, and nothing else ever touches its weight."""

    def __init__(self, weight: QuantTensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=dtype)
        self.scheme = weight.scheme
        self.weight = nn.Parameter(dequantize(weight, dtype), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
