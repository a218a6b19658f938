"""An ordinary checkpoint of the dequantized weights, for research: any program loads it, and it is as large as the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitlathe.errors import FormatError
from bitlathe.formats.base import QuantLayer
from bitlathe.numerics.project import dequantize
from bitlathe.numerics.scheme import Scheme
from bitlathe.plan import Plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Dense:
    """Dequantized weights; it holds every plan's numbers, and no codes."""

    name = "dense"

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Nothing is refused."""

    def encode(self, layer: QuantLayer, dtype: str) -> dict[str, Tensor]:
        """The weight [outputs, inputs] in the plan's dtype."""
        return {"weight": dequantize(layer.weight, DTYPES[dtype])}

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantLayer:
        """Always raises FormatError: numbers do not say which codes they came from."""
        raise FormatError(
            "the dense format keeps dequantized weights and no codes. Read the weights as those of any model, or quantize "
            "again with --format native, from which every other format can be made"
        )

    def config(self, plan: Plan) -> None:
        """None: to its readers the model is not quantized."""

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """Always raises FormatError: there is no configuration to read."""
        raise FormatError(
            "a dense checkpoint has no quantization_config; the plan it was made by is in its plan.json and report.json"
        )
