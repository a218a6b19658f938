"""The linears a block runs while it is tuned, and after."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitlathe.numerics.activation import StaticScale, fake_quantize_input
from bitlathe.numerics.hadamard import Turner, turner
from bitlathe.numerics.project import Learned, QuantTensor, dequantize, fake_quantize
from bitlathe.numerics.scheme import Scheme
from bitlathe.plan import LayerPlan


class Stage(nn.Module):
    """What happens to the input [..., inputs] of a linear before its weight: it is turned, then rounded, as its plan says.

    fixed: the static scale, for a scheme that has one. quantized: whether it is rounded; an original is only turned.
    """

    def __init__(self, row: LayerPlan, fixed: StaticScale | None = None, *, quantized: bool = False) -> None:
        super().__init__()
        self.rotation, self.scheme, self.clip = row.online, row.input if quantized else None, row.clip
        self.fixed = fixed
        self._turner: Turner | None = None  # made for the first input, and again where the model moves

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs], in x's dtype."""
        if self.rotation is not None:
            if self._turner is None or not self._turner.serves(x):
                self._turner = turner(self.rotation, x.shape[-1], like=x)
            x = self._turner.turn(x)
        return x if self.scheme is None else fake_quantize_input(x, self.scheme, clip=self.clip, fixed=self.fixed)


class StagedLinear(nn.Linear):
    """A linear behind a stage, with the parameters of another."""

    def __init__(self, linear: nn.Linear, stage: nn.Module) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.stage = linear.weight, linear.bias, stage

    def forward(self, input: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return F.linear(self.stage(input), self.weight, self.bias)


class TunedLinear(StagedLinear):
    """A linear that learns how to be rounded: y = x W'^T + b with W' the projection of W under `learned`.

    weight: [outputs, inputs] float32, fixed. offset [outputs, inputs] in grid steps, low and high [blocks] as multiples of the
    two ends of the range that `start` gives: what is learned, no multiple above `most`. dtype: what W' is rounded to.
    """

    def __init__(
        self,
        linear: StagedLinear,
        scheme: Scheme,
        start: Learned,
        *,
        peak: Tensor | None,
        dtype: torch.dtype,
        most: float = 1.0,
    ) -> None:
        super().__init__(linear, linear.stage)
        self.scheme, self.peak, self.dtype, self.start, self.most = scheme, peak, dtype, start, most
        self.weight = nn.Parameter(linear.weight.detach().float(), requires_grad=False)
        self.offset = nn.Parameter(torch.zeros_like(self.weight) if start.offset is None else start.offset.clone())
        self.low = None if start.low is None else nn.Parameter(torch.ones_like(start.low))
        self.high = None if start.high is None else nn.Parameter(torch.ones_like(start.high))

    @property
    def learned(self) -> Learned:
        """What has been learned so far; `quantize` of the weight with it gives the codes this layer runs."""
        low, high = _times(self.start.low, self.low), _times(self.start.high, self.high)
        return Learned(offset=self.offset, low=low, high=high)

    def bounded(self) -> list[tuple[nn.Parameter, float, float]]:
        """What is learned, each with the bounds it stays in: half a step either way, and a range from nothing to `most`."""
        ranges = [(end, 0.0, self.most) for end in (self.low, self.high) if end is not None]
        return [(self.offset, -0.5, 0.5), *ranges]

    def forward(self, input: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        weight = fake_quantize(self.weight, self.scheme, self.learned, peak=self.peak, dtype=self.dtype)
        return F.linear(self.stage(input), weight.to(input.dtype), self.bias)


def _times(start: Tensor | None, multiple: Tensor | None) -> Tensor | None:
    return None if start is None or multiple is None else start * multiple


class QuantLinear(StagedLinear):
    """A finished linear, in the place of another whose stage and bias it takes over.

    It runs the dequantized codes, and nothing else ever touches its weight.
    """

    def __init__(self, weight: QuantTensor, linear: StagedLinear, dtype: torch.dtype) -> None:
        super().__init__(linear, linear.stage)
        self.scheme = weight.scheme
        self.weight = nn.Parameter(dequantize(weight, dtype), requires_grad=False)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
