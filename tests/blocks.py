"""Blocks of the bundled model at their turn of a walk over the bundled text, for tests of tuners."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bitlathe.formats.base import QuantLayer
from bitlathe.formats.native import Native
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.calib import text_of, tokenizer_of, windows_of
from bitlathe.model.hidden import Budget
from bitlathe.model.source import open_model
from bitlathe.model.walk import Step, begin, walk
from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.scheme import SCHEMES, Scheme
from bitlathe.plan import LayerPlan

SEQUENCES, TOKENS = 12, 32

# One of every kind of grid, of block and of scale.
KINDS = (
    "W2A16G32",
    "W3A16_CHANNEL",
    "W4A16",
    "W8A16G64_ASYM",
    "FP8_TENSOR",
    "FP8_CHANNEL",
    "FP8_BLOCK",
    "MXFP4A16",
    "MXFP8A16",
    "NVFP4A16",
)


def turn(
    *, streams: int, beside: bool = False, index: int = 0, sequences: int = SEQUENCES, dtype: torch.dtype = torch.bfloat16
) -> Step:
    """The turn of block `index`, the blocks before it as they are in the original; equal for equal arguments."""
    checkpoint = Checkpoint("builtin")
    skeleton, weights = open_model(checkpoint, device=torch.device("cpu"), dtype=dtype)
    start = begin(skeleton, weights, _windows()[:sequences], Budget(2**30, Path("nowhere")), streams=streams, beside=beside)
    return next(step for step in walk(skeleton, weights, start, batch_size=sequences) if step.block.index == index)


@cache
def _windows() -> Tensor:
    (text,) = text_of("builtin", "calibration", characters=0)
    return windows_of(tokenizer_of(Checkpoint("builtin").path), [text[:5000]], seqlen=TOKENS, count=SEQUENCES)


def schemes_of(step: Step, name: str) -> dict[str, Scheme]:
    """One scheme for all linears of the block, with scales of its dtype."""
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[step.block.dtype]
    return {linear: SCHEMES[name].served_in(dtype) for linear in step.block.linears}


def as_written(layers: dict[str, QuantLayer]) -> dict[str, QuantLayer]:
    """The layers as the native format gives them back."""
    native, rows = Native(), {name: LayerPlan(weight=layer.weight.scheme) for name, layer in layers.items()}
    return {
        name: native.decode(native.encode(layer, rows[name], "bf16"), rows[name], layer.weight.shape)
        for name, layer in layers.items()
    }


def same_codes(a: dict[str, QuantLayer], b: dict[str, QuantLayer]) -> bool:
    """Whether two results of a tuner are equal, bit for bit."""
    return a.keys() == b.keys() and all(
        torch.equal(x, y) for name in a for x, y in zip(_streams(a[name]), _streams(b[name]), strict=True)
    )


def outer_scale(q: QuantTensor) -> Tensor:
    """The one scale of a tensor: its own for FP8_TENSOR, its scales' for NVFP4."""
    assert q.scale is not None
    return (q.scale if q.scale.scale is None else q.scale.scale).codes


def _streams(layer: QuantLayer) -> list[Tensor]:
    return list(Native().encode(layer, LayerPlan(weight=layer.weight.scheme), "bf16").values())
