"""An ordinary checkpoint of the dequantized weights, for research: any program loads it, and it is as large as the original."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from bitlathe.errors import FormatError
from bitlathe.formats.base import QuantLayer
from bitlathe.formats.stored import some
from bitlathe.numerics.project import dequantize
from bitlathe.numerics.scheme import described
from bitlathe.plan import LayerPlan, Plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Dense:
    """Dequantized weights, folded rotations included; nothing that happens while a model runs."""

    name = "dense"

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError for quantized activations, a quantized cache, and rotations that run online."""
        rounded = [name for name, row in plan.linears.items() if row.input is not None]
        turned = [name for name, row in plan.linears.items() if row.online is not None]
        if rounded:
            raise FormatError(
                f"dense cannot hold the quantized activations of {some(rounded)}: it is an ordinary model, which would run "
                "them in 16 bits. Choose a scheme of weights alone (such as W4A16), or write the native format"
            )
        if turned:
            raise FormatError(
                f"dense cannot hold the rotations that {some(turned)} run online: an ordinary model would leave them out and "
                "be wrong. Leave them out of --rotate (R1 and R2 are folded into most models), or write the native format"
            )
        if plan.kv is not None:
            raise FormatError(
                f"dense cannot hold a cache of keys and values in {described(plan.kv)}: an ordinary model keeps them in 16 "
                "bits. Leave out --kv, or write the native format"
            )

    def bits(self, row: LayerPlan, shape: tuple[int, int]) -> int:
        """16 a weight, whatever its scheme."""
        return 16 * prod(shape)

    def encode(self, layer: QuantLayer, row: LayerPlan, dtype: str) -> dict[str, Tensor]:
        """The weight [outputs, inputs] in the plan's dtype."""
        return {"weight": dequantize(layer.weight, DTYPES[dtype])}

    def decode(self, tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantLayer:
        """Always raises FormatError: numbers do not say which codes they came from."""
        raise FormatError(
            "the dense format keeps dequantized weights and no codes. Read the weights as those of any model, or quantize "
            "again with --format native, from which every other format can be made"
        )

    def decode_input(self, tensors: Mapping[str, Tensor], row: LayerPlan) -> None:
        """None: `check` refuses quantized activations."""

    def config(self, plan: Plan) -> None:
        """None: to its readers the model is not quantized."""

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """Always raises FormatError: there is no configuration to read."""
        raise FormatError(
            "a dense checkpoint has no quantization_config; the plan it was made by is in its plan.json and report.json"
        )
