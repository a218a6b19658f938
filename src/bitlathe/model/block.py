"""One block of the model, alive: its module, the call it would have received, and its linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitlathe.errors import CheckpointError
from bitlathe.formats.base import QuantLayer
from bitlathe.model.layers import QuantLinear


@dataclass(frozen=True)
class Block:
    """A block whose weights are in memory.

    index: its place, 0-based. name: its path in the model ("model.layers.0"); every other name here is full as well.
    linears: the names that a plan may quantize. fused: linear -> label of the group that is served as one matrix.
    call: the keyword arguments the model would have called it with, beside the hidden states.
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[str, ...]
    fused: Mapping[str, str]
    call: Mapping[str, Any]
    dtype: torch.dtype

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """The block's output [batch, tokens, width] for hidden states of the same shape."""
        return self.module(x_BTD, **self.call)

    def parts(self, x_BTD: Tensor) -> Sequence[Tensor]:
        """The hidden states in parts of the same layout, each to be run on its own where no more of the output may be held."""
        return (x_BTD,)

    def linear(self, name: str) -> nn.Linear:
        """The linear `name`, or the one that was put in its place."""
        linear = self.module.get_submodule(self._inner(name))
        assert isinstance(linear, nn.Linear)
        return linear

    def weight(self, name: str) -> Tensor:
        """The weight [outputs, inputs] of a linear that has not been swapped. Raises CheckpointError if it is not finite."""
        weight = self.module.get_parameter(f"{self._inner(name)}.weight").detach()
        if not torch.isfinite(weight).all():
            raise CheckpointError(
                f"{name}.weight has infinite or NaN values, which no scheme can hold. The checkpoint is damaged, or was saved "
                "in a dtype that its weights overflow: download it again, or mend it"
            )
        return weight

    def peaks(self, names: Mapping[str, Any]) -> dict[str, Tensor]:
        """For each of `names`, the largest magnitude [] in the weights of its fused group: what a tensor-wide scale covers."""
        own = {name: self.weight(name).abs().max().float() for name in names}
        groups: dict[str, Tensor] = {}
        for name, peak in own.items():
            group = self.fused.get(name, name)
            groups[group] = torch.maximum(groups.get(group, peak), peak)
        return {name: groups[self.fused.get(name, name)] for name in own}

    def swap(self, modules: Mapping[str, nn.Module]) -> None:
        """Put modules where linears are."""
        for name, module in modules.items():
            parent, _, child = self._inner(name).rpartition(".")
            self.module.get_submodule(parent).register_module(child, module)

    def freeze(self, layers: Mapping[str, QuantLayer]) -> None:
        """From here on the block runs the codes of `layers`."""
        biases = {name: self.linear(name).bias for name in layers}
        self.swap({name: QuantLinear(layer.weight, biases[name], self.dtype) for name, layer in layers.items()})

    @contextmanager
    def watch(self, names: Mapping[str, Any], see: Any) -> Iterator[None]:
        """While open, `see(name, x)` is called with every input [..., inputs] of the linears `names`."""
        handles = [
            self.module.get_submodule(self._inner(name)).register_forward_pre_hook(
                lambda _module, inputs, name=name: see(name, inputs[0])
            )
            for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _inner(self, name: str) -> str:
        return name.removeprefix(f"{self.name}.") if self.name else name
