"""Products as llama.cpp computes them on a CPU: of activations in 8 bits and a quantized matrix (ggml-quants.c).

It is its engine's doing and no part of a checkpoint; we compute it only to tell what else the engine does otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bitlathe.numerics.project import QuantTensor, dequantize

_SUPER = 256
_TOP = 127


def product(x: Tensor, weight: QuantTensor) -> Tensor:
    """x [..., inputs] times a matrix [outputs, inputs] in one of llama.cpp's types, float32.

    Types of 256 ("K") take x in blocks of 256 with a scale in float32, whose sign is the other one of the largest value; types
    of 32 take it in blocks of 32 with a scale in fp16, and where they have minima, these times the sum of the block's codes
    times its scale, the product rounded to fp16.
    """
    whole = dequantize(weight, torch.float32)
    if weight.scheme.run == _SUPER:
        return F.linear(_of_256(x.float()), whole)
    rounded, sums = _of_32(x.float())
    if weight.minimum is None:
        return F.linear(rounded, whole)
    minimum = dequantize(weight.minimum, torch.float32)
    return F.linear(rounded, whole + minimum.repeat_interleave(32, 1)) - F.linear(sums, minimum)


def _of_256(x: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, _SUPER))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest == 0, 0.0, -_TOP / largest)
    codes = (blocks * inverse).round_().clamp_(max=_TOP)
    return torch.where(inverse == 0, 0.0, codes / inverse).flatten(-2)


def _of_32(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded [..., inputs]; and for every block the sum that minima are multiplied by."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / _TOP
    codes = torch.where(scale == 0, 0.0, blocks / scale).round_()
    sums = (codes.sum(-1) * scale.squeeze(-1)).half().float()
    return (codes * scale.half().float()).flatten(-2), sums
