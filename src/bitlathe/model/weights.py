"""Weights as the model's forward pass sees them, read a few at a time: of an original, or of a checkpoint of codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from bitlathe.errors import BitlatheError, CheckpointError
from bitlathe.formats.base import Format, QuantLayer
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.edit import Edit
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.project import dequantize
from bitlathe.numerics.scheme import static
from bitlathe.plan import Plan

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Weights:
    """Parameters by name, dense, in `dtype`, on `device`.

    With a `format` the checkpoint is one of codes: a linear of `plan` is decoded and dequantized in the plan's dtype first,
    because that is the model that was made. Without one it is an original: `edits` says what becomes of its parameters on the
    way, and `plan` what is going to be made of them. through: a dtype that they are rounded to on the way to `dtype`: that of a
    result which will hold them. shapes: linear -> (outputs, inputs). tied: parameter -> the parameter
    whose tensor it shares in the checkpoint.
    """

    checkpoint: Checkpoint
    shapes: dict[str, tuple[int, int]]
    tied: dict[str, str]
    dtype: torch.dtype
    device: torch.device
    plan: Plan | None = None
    format: Format | None = None
    edits: Mapping[str, Edit] = field(default_factory=dict, repr=False)
    through: torch.dtype | None = None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parameters `names`, as the file has them today: a second read gives the same tensors."""
        names = list(names)
        coded = {name: linear for name in names if (linear := self._coded(name)) is not None}
        plain = {name: self.tied.get(name, name) for name in names if name not in coded}
        gains = {edit.gain for name in plain if (edit := self.edits.get(name)) is not None and edit.gain is not None}
        found = self.checkpoint.read(sorted({*plain.values(), *gains}))
        read = {}
        for name, stored in plain.items():
            # A head that shares the weight of the embeddings shares what becomes of it.
            tensor, edit = found[stored].to(self.device), self.edits.get(name, self.edits.get(stored))
            if edit is None:
                made = tensor.to(self.held)
            else:
                gain = None if edit.gain is None else found[edit.gain].to(self.device)
                made = edit(tensor, gain, dtype=self.held)
            read[name] = made.to(self.dtype)
        for name, linear in coded.items():
            layer = self.layer(linear)
            read[name] = dequantize(layer.weight, DTYPES[self._plan.dtype]).to(self.device, self.dtype)
        return {name: read[name] for name in names}

    @property
    def unrounded(self) -> Weights:
        """The same without anything rounded to codes: what is to be approximated."""
        return replace(self, edits={name: replace(edit, scheme=None) for name, edit in self.edits.items()})

    @property
    def held(self) -> torch.dtype:
        """What they are rounded to."""
        return self.through or self.dtype

    @property
    def as_held(self) -> Weights:
        """The same in the dtype that they are rounded to."""
        return replace(self, dtype=self.held)

    def layer(self, linear: str) -> QuantLayer:
        """The codes of one quantized linear, decoded on `device`. Raises CheckpointError, with its name and the folder."""
        assert self.format is not None
        tensors = self._tensors(linear, "")
        with self._blamed(linear):
            return self.format.decode(tensors, self._plan.linears[linear], self.shapes[linear])

    def static_scale(self, linear: str) -> StaticScale | None:
        """The static scale of a quantized linear's input, None where there is none. No weight is read. Raises as `layer`."""
        assert self.format is not None
        row = self._plan.linears[linear]
        if not static(row.input):
            return None
        tensors = self._tensors(linear, "input_")
        with self._blamed(linear):
            return self.format.decode_input(tensors, row)

    def _tensors(self, linear: str, start: str) -> dict[str, Tensor]:
        """What the file holds of a linear but its bias, by names that begin with `start`."""
        prefix = f"{linear}."
        there = self._stored.get(linear, [])
        read = self.checkpoint.read(name for name in there if name.startswith(prefix + start) and name != f"{linear}.bias")
        return {name.removeprefix(prefix): tensor.to(self.device) for name, tensor in read.items()}

    @contextmanager
    def _blamed(self, linear: str) -> Iterator[None]:
        try:
            yield
        except BitlatheError as error:
            raise CheckpointError(f"{self.checkpoint.path}, {linear}: {error}") from error

    @cached_property
    def _stored(self) -> dict[str, list[str]]:
        """Module -> its tensors in the checkpoint. With experts there are many of both."""
        stored: dict[str, list[str]] = {}
        for name in self.checkpoint.header:
            stored.setdefault(name.rpartition(".")[0], []).append(name)
        return stored

    @property
    def _plan(self) -> Plan:
        assert self.plan is not None
        return self.plan

    def _coded(self, name: str) -> str | None:
        linear = self.tied.get(name, name).removesuffix(".weight")
        # Without a format weights are stored as in any checkpoint, whatever the plan says.
        return linear if self.format is not None and self.plan is not None and linear in self.plan.quantized else None
