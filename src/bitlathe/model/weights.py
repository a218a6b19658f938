"""Weights as the model's forward pass sees them, read a few at a time: of an original, or of a checkpoint of codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitlathe.errors import BitlatheError, CheckpointError
from bitlathe.formats.base import Format, QuantLayer
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.numerics.project import dequantize
from bitlathe.plan import Plan

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Weights:
    """Parameters by name, dense, in `dtype`, on `device`.

    A linear of `plan` is decoded by `format` and dequantized in the plan's dtype first, because that is the model that was
    made; without a plan every tensor is read as it is. shapes: linear -> (outputs, inputs). tied: parameter -> the parameter
    whose tensor it shares.
    """

    checkpoint: Checkpoint
    shapes: dict[str, tuple[int, int]]
    tied: dict[str, str]
    dtype: torch.dtype
    device: torch.device
    plan: Plan | None = None
    format: Format | None = None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parameters `names`, as the file has them today: a second read gives the same tensors."""
        names = list(names)
        coded = {name: linear for name in names if (linear := self._coded(name)) is not None}
        plain = {name: self.tied.get(name, name) for name in names if name not in coded}
        found = self.checkpoint.read(sorted(set(plain.values())))
        read = {name: found[stored].to(self.device, self.dtype) for name, stored in plain.items()}
        for name, linear in coded.items():
            layer = self.layer(linear)
            read[name] = dequantize(layer.weight, DTYPES[self._plan.dtype]).to(self.device, self.dtype)
        return {name: read[name] for name in names}

    def layer(self, linear: str) -> QuantLayer:
        """The codes of one quantized linear, decoded on `device`. Raises CheckpointError, with its name and the folder."""
        assert self.format is not None
        prefix = f"{linear}."
        names = [name for name in self.checkpoint.header if name.startswith(prefix) and name != f"{linear}.bias"]
        read = self.checkpoint.read(names)
        tensors = {name.removeprefix(prefix): tensor.to(self.device) for name, tensor in read.items()}
        try:
            return self.format.decode(tensors, self._plan.quantized[linear], self.shapes[linear])
        except BitlatheError as error:
            raise CheckpointError(f"{self.checkpoint.path}, {linear}: {error}") from error

    @property
    def _plan(self) -> Plan:
        assert self.plan is not None
        return self.plan

    def _coded(self, name: str) -> str | None:
        linear = name.removesuffix(".weight")
        # A format without a config of its own (dense) stores weights as any checkpoint does, whatever its plan says.
        return linear if self.format is not None and self.plan is not None and linear in self.plan.quantized else None
