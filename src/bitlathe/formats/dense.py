"""Dequantized weights in 16 bits, for research: as large as the original.

A linear of which only the weight is quantized is an ordinary one, and where all are, the folder is an ordinary checkpoint that
any program loads. What happens to an input while the model runs (it is turned, or rounded) such a program would leave out and
compute something else without a word. So a linear with that is stored as the native format stores a matrix of plain 16-bit
numbers, a flat stream that no other program takes for a weight, and config.json has the native format's quantization_config,
which keeps all other linears. Readers of the native format read it; the rest stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bitlathe.arch import ARCHS
from bitlathe.errors import FormatError
from bitlathe.formats.base import Container, QuantLayer
from bitlathe.formats.native import Native
from bitlathe.formats.stored import some
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.project import QuantTensor, dequantize
from bitlathe.numerics.scheme import Scheme, described
from bitlathe.plan import LayerPlan, Plan

# The names of embeddings, which nothing happens to but that they are rounded.
_TABLES = frozenset(arch.embed for arch in ARCHS.values())

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Dense:
    """Dequantized weights, folded rotations included, and what happens to their inputs while a model runs."""

    name = "dense"
    dtype: ClassVar[Literal["bf16", "fp16"] | None] = None
    container: Container | None = None

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError for what happens to a cache, or to the input of a kept weight: no stream is there to say it."""
        if plan.kv is not None:
            raise FormatError(
                f"dense cannot hold a cache of keys and values in {described(plan.kv)}: that is no part of a linear, and a "
                "program that does not know of it would keep them in 16 bits. Leave out --kv, or write the native format"
            )
        if any(rotation.space == "qk" for rotation in plan.rotations):
            raise FormatError(
                "dense cannot hold R3, the rotation of queries and keys: that is no part of a linear, and a program that does "
                "not know of it would leave it out. Leave R3 out of --rotate, or write the native format"
            )
        kept = [name for name, row in plan.linears.items() if row.weight is None and _runs(row)]
        if kept:
            raise FormatError(
                f"dense cannot hold what happens to the inputs of {some(kept)}: their weights are kept, as ordinary tensors "
                "that a program would read without it. Keep these inputs too, or quantize the weights"
            )

    def bits(self, row: LayerPlan, shape: tuple[int, int]) -> int:
        """16 a weight, whatever its scheme."""
        return 16 * prod(shape)

    def encode(self, layer: QuantLayer, row: LayerPlan, dtype: str) -> dict[str, Tensor]:
        """The weight in the plan's dtype: [outputs, inputs], or native streams where something happens to its input."""
        weight = dequantize(layer.weight, DTYPES[dtype])
        if not _runs(row):
            return {"weight": weight}
        numbers = QuantTensor(_numbers(dtype), layer.weight.shape, weight)
        return Native().encode(QuantLayer(numbers, layer.input), _stored(row, dtype), dtype)

    def decode(self, tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantLayer:
        """Always raises FormatError: numbers do not say which codes they came from."""
        raise FormatError(
            "the dense format keeps dequantized weights and no codes. Read the weights as those of any model, or quantize "
            "again with --format native, from which every other format can be made"
        )

    def decode_input(self, tensors: Mapping[str, Tensor], row: LayerPlan) -> StaticScale | None:
        """As the native format does."""
        return Native().decode_input(tensors, row)

    def config(self, plan: Plan) -> dict[str, Any] | None:
        """None where weights are all there is; else that of the native format, for the plan of what its streams hold."""
        rows = {name: _stored(row, plan.dtype) if _runs(row) else LayerPlan() for name, row in plan.linears.items()}
        rows = {name: row for name, row in rows.items() if name not in _TABLES}  # those are ordinary tensors
        stored = plan.model_copy(update={"linears": rows})
        return Native().config(stored) if stored.quantized else None

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """Always raises FormatError: the plan cannot be told from what is left of it."""
        raise FormatError(
            "a dense checkpoint does not say which schemes its weights were made by: the plan is in its plan.json and "
            "report.json. What its quantization_config says, if it has one, the native format reads"
        )


def _runs(row: LayerPlan) -> bool:
    """Whether something happens to the input of a linear while the model runs."""
    return row.input is not None or row.online is not None


def _stored(row: LayerPlan, dtype: str) -> LayerPlan:
    """The row of a linear whose weight is held as it is."""
    return row.model_copy(update={"weight": _numbers(dtype)})


def _numbers(dtype: str) -> Scheme:
    return Scheme(grid=dtype.upper())
