"""One block of the model, alive: its module, the call it would have received, and its linears."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitlathe.errors import CheckpointError
from bitlathe.formats.base import QuantLayer
from bitlathe.model.cache import attach
from bitlathe.model.layers import QuantLinear, Stage, StagedLinear
from bitlathe.model.weights import Weights
from bitlathe.numerics.activation import StaticScale
from bitlathe.plan import LayerPlan, Plan

B = TypeVar("B", bound="Block")


@dataclass(frozen=True)
class Block:
    """A block whose weights are in memory.

    index: its place, 0-based. name: its path in the model ("model.layers.0"); every other name here is full as well.
    linears: the names that a plan may quantize. fused: linear -> label of the group that is served as one matrix. stages: the
    linears in the order in which they run, in groups that read the same; experts side by side.
    onto: linear -> the norm that reads what its output is added to, for those whose output is added as it is.
    call: the keyword arguments the model would have called it with, beside the hidden states. dtype: what it computes in; held:
    what its weights are rounded to on the way there. attention: the name of its attention module, None where it has none.
    """

    index: int
    name: str
    module: nn.Module
    linears: tuple[str, ...]
    fused: Mapping[str, str]
    call: Mapping[str, Any]
    dtype: torch.dtype
    held: torch.dtype
    attention: str | None = None
    stages: tuple[tuple[tuple[str, ...], ...], ...] = ()
    onto: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """The block's output [batch, tokens, width] for hidden states of the same shape."""
        return self.module(x_BTD, **self.call)

    def parts(self, x_BTD: Tensor) -> Sequence[Tensor]:
        """The hidden states in parts of the same layout, each to be run on its own where no more of the output may be held."""
        return (x_BTD,)

    @property
    def attending(self) -> list[str]:
        """The linears of its attention, in the order in which they run."""
        within = f"{self.attention}."
        return [name for stage in self.stages for group in stage for name in group if name.startswith(within)]

    def linear(self, name: str) -> StagedLinear:
        """The linear `name`, or the one that was put in its place."""
        linear = self.module.get_submodule(self.inner(name))
        assert isinstance(linear, StagedLinear)
        return linear

    def weight(self, name: str) -> Tensor:
        """The weight [outputs, inputs] of a linear that has not been swapped. Raises CheckpointError if it is not finite."""
        weight = self.module.get_parameter(f"{self.inner(name)}.weight").detach()
        if not torch.isfinite(weight).all():
            raise CheckpointError(
                f"{name}.weight has infinite or NaN values, which no scheme can hold. The checkpoint is damaged, or was saved "
                "in a dtype that its weights overflow: download it again, or mend it"
            )
        return weight

    def peaks(self, names: Iterable[str]) -> dict[str, Tensor]:
        """For each of `names`, the largest magnitude [] in the weights of its fused group: what a tensor-wide scale covers."""
        own = {name: self.weight(name).abs().max().float() for name in names}
        groups: dict[str, Tensor] = {}
        for name, peak in own.items():
            group = self.fused.get(name, name)
            groups[group] = torch.maximum(groups.get(group, peak), peak)
        return {name: groups[self.fused.get(name, name)] for name in own}

    def twin(self) -> Block:
        """A block of the same parameters, which stays as this one is now, whatever is swapped in here."""
        shared = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        return replace(self, module=copy.deepcopy(self.module, shared))

    def swap(self, modules: Mapping[str, nn.Module]) -> None:
        """Put modules where linears are."""
        for name, module in modules.items():
            parent, _, child = self.inner(name).rpartition(".")
            self.module.get_submodule(parent).register_module(child, module)

    def freeze(self, layers: Mapping[str, QuantLayer]) -> None:
        """From here on the block runs the codes of `layers`."""
        for name, layer in layers.items():
            self.swap({name: QuantLinear(layer.weight, self.linear(name), self.held).to(self.dtype)})

    def quantize_inputs(self, plan: Plan, fixed: Mapping[str, StaticScale | None]) -> None:
        """From here on the linears and the cache see their inputs as `plan` rounds them; until now they were only turned.

        fixed: linear -> the static scale of its input, for those that have one.
        """
        for name in self.linears:
            row = plan.linears[name]
            if row.input is not None:
                self.linear(name).stage = Stage(row, fixed.get(name), quantized=True)
        if self.attention is not None:
            attach_cache([self.module.get_submodule(self.inner(self.attention))], plan)

    @contextmanager
    def watch(self, names: Iterable[str], see: Any) -> Iterator[None]:
        """While open, `see(name, x)` is called with all that the weights of the linears `names` multiply, [..., inputs]: their
        inputs as they are turned and rounded by then."""
        with _while_hooked(_after({name: self.linear(name).stage for name in names}, see)):
            yield

    @contextmanager
    def given(self, modules: Iterable[str], see: Any) -> Iterator[None]:
        """While open, `see(name, x)` is called with the first argument of all calls of the modules of these names."""
        found = {name: self.module.get_submodule(self.inner(name)) for name in modules}
        with _while_hooked(
            module.register_forward_pre_hook(lambda _module, given, name=name: see(name, given[0]))
            for name, module in found.items()
        ):
            yield

    @contextmanager
    def made(self, modules: Iterable[str], see: Any) -> Iterator[None]:
        """While open, `see(name, y)` is called with what all calls of the modules of these names give."""
        with _while_hooked(_after({name: self.module.get_submodule(self.inner(name)) for name in modules}, see)):
            yield

    @contextmanager
    def replaced(self, name: str, module: nn.Module) -> Iterator[None]:
        """While open, another module stands where the one of this name does."""
        before = self.module.get_submodule(self.inner(name))
        self.swap({name: module})
        try:
            yield
        finally:
            self.swap({name: before})

    def inner(self, name: str) -> str:
        """A full name as the block's module knows it."""
        return name.removeprefix(f"{self.name}.") if self.name else name


def _after(modules: Mapping[str, nn.Module], see: Any) -> Iterator[RemovableHandle]:
    for name, module in modules.items():
        yield module.register_forward_hook(lambda _module, _inputs, output, name=name: see(name, output))


@contextmanager
def _while_hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attach_cache(attentions: Iterable[nn.Module], plan: Plan) -> None:
    """Have attention modules round the keys and values that they cache, if the plan says so."""
    rotation = next((rotation for rotation in plan.rotations if rotation.space == "qk"), None)
    if plan.kv is not None or rotation is not None:
        for attention in attentions:
            attach(attention, rotation=rotation, scheme=plan.kv)


def staged(block: B, weights: Weights) -> B:
    """The same block, its linears ready to have their inputs turned and rounded.

    Those of an original only turn them, where the plan says so: it is the model that is to be approximated. Those of a
    checkpoint of codes do all that its plan says.
    """
    rows = {} if weights.plan is None else weights.plan.linears
    for name in block.linears:
        linear = block.module.get_submodule(block.inner(name))
        assert isinstance(linear, nn.Linear)
        block.swap({name: StagedLinear(linear, Stage(rows.get(name, LayerPlan())))})
    if weights.plan is not None and weights.format is not None:
        block.quantize_inputs(weights.plan, {name: weights.static_scale(name) for name in block.linears})
    return block
