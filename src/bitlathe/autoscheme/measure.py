"""The true KL divergence of whole plans from the original, several in one walk.

All plans go through a block before the next one is read, each with hidden states of its own. A linear of a plan runs the codes
that rounding to nearest on the searched range gives it, made once for all plans in which it has the same row. Everything runs
in float32, as in evaluation, from weights rounded to the dtype of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitlathe.autoscheme.ground import Ground, Listen
from bitlathe.autoscheme.kept import Kept, Measured
from bitlathe.autoscheme.score import FIXED, HEAD, part_of
from bitlathe.model.block import Block, attach_cache
from bitlathe.model.hidden import Budget, Hidden
from bitlathe.model.layers import Stage, StagedLinear
from bitlathe.model.passage import Passage
from bitlathe.model.walk import Start, begin, walk
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.project import QuantTensor, dequantize, quantize, search
from bitlathe.plan import LayerPlan, Plan


def measure(ground: Ground, kept: Kept, plans: Sequence[Plan], listen: Listen) -> list[Measured]:
    """The mean KL divergence on the held-out text of each plan of the model's linears, whose scores are kept."""
    budget = Budget(ground.memory, kept.work)
    skeleton, weights = ground.plain
    start = begin(skeleton, weights, ground.held_out, budget, streams=1)
    for _ in walk(skeleton, weights, start, batch_size=ground.batch_size):
        pass
    original = start.streams[0], skeleton.head(weights)
    streams, calls = _embedded(ground, plans, budget)
    # Without streams of its own the walk only brings the blocks. Those are the same for all plans.
    blocks = ground.measured(ground.space.plan)
    for step in walk(ground.skeleton, blocks, Start(calls, ()), batch_size=ground.batch_size):
        shelf = _Shelf(ground, step.block, kept.tensors(part_of(step.block.index)))
        for plan, stream in zip(plans, streams, strict=True):
            shelf.put(plan)
            Passage(step.block, stream).advance(ground.batch_size)
        listen("measure", step.block.index + 1, ground.skeleton.depth)
        del shelf
    found: dict[int, Measured] = {}
    for indices in _alike(ground, plans, ground.skeleton.arch.head, ground.skeleton.arch.embed):
        head = ground.skeleton.head(ground.measured(plans[indices[0]]))
        _Shelf(ground, head, kept.tensors(HEAD)).put(plans[indices[0]])
        found |= _divergences(original, {index: streams[index] for index in indices}, head)
    return [found[index] for index in range(len(plans))]


def _alike(ground: Ground, plans: Sequence[Plan], *names: str) -> list[list[int]]:
    """The places of plans that have the same rows for some modules."""
    groups: dict[tuple[LayerPlan | None, ...], list[int]] = {}
    for index, plan in enumerate(plans):
        groups.setdefault(tuple(plan.linears.get(name) for name in names), []).append(index)
    return list(groups.values())


def _embedded(ground: Ground, plans: Sequence[Plan], budget: Budget) -> tuple[list[Hidden], list[dict[str, Any]]]:
    """The first hidden states of each plan, and the blocks' calls. Embeddings that are the same are read once."""
    streams: dict[int, Hidden] = {}
    calls: list[dict[str, Any]] = []
    for first, *others in _alike(ground, plans, ground.skeleton.arch.embed):
        start = begin(ground.skeleton, ground.measured(plans[first]), ground.held_out, budget, streams=1)
        (streams[first],), calls = start.streams, start.calls
        for index in others:
            streams[index] = copy = budget.allocate(streams[first].shape, torch.float32, ground.weights.device)
            copy.copy_from(streams[first], ground.batch_size)
    return [streams[index] for index in range(len(plans))], calls


class _Shelf:
    """The linears of a block, for every row that some plan gives them."""

    def __init__(self, ground: Ground, block: Block, tensors: Mapping[str, Tensor]) -> None:
        self.ground, self.block, self.tensors = ground, block, tensors
        self.original = {name: block.linear(name) for name in block.linears}
        self.made: dict[tuple[str, LayerPlan], QuantTensor] = {}
        self.peaks = block.peaks(name for name in block.linears if ground.space.rounds(name))

    def put(self, plan: Plan) -> None:
        """From here on the block runs as a plan says."""
        self.block.swap({name: self._linear(name, plan.linears[name]) for name in self.original})
        if self.block.attention is not None:
            attach_cache([self.block.module.get_submodule(self.block.inner(self.block.attention))], plan)

    def _linear(self, name: str, row: LayerPlan) -> nn.Module:
        original = self.original[name]
        if row.weight is None:
            return original
        linear = StagedLinear(original, Stage(row, self._fixed(name, row), quantized=True))
        weight = dequantize(self._codes(name, row), self.ground.dtype).to(self.block.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear

    def _codes(self, name: str, row: LayerPlan) -> QuantTensor:
        """Codes and not weights are kept, of which there may be as many as options."""
        if (name, row) not in self.made:
            assert row.weight is not None
            self.block.swap({name: self.original[name]})
            weight, peak = self.block.weight(name), self.peaks[name]
            learned = search(weight, row.weight, self.tensors.get(f"{name}|moments"), peak=peak)
            self.made[name, row] = quantize(weight, row.weight, learned, peak=peak)
        return self.made[name, row]

    def _fixed(self, name: str, row: LayerPlan) -> StaticScale | None:
        option = next((option for option, own in self.ground.space.rows.get(name, {}).items() if own == row), FIXED)
        scale = self.tensors.get(f"{name}|{option}|scale")
        return None if scale is None else StaticScale(scale, self.tensors.get(f"{name}|{option}|zero"))


@torch.no_grad()
def _divergences(original: tuple[Hidden, Block], streams: Mapping[int, Hidden], head: Block) -> dict[int, Measured]:
    """What was measured of each stream of last hidden states, by its key. head: of all of them."""
    states, reference = original
    windows, length, _ = states.shape
    kl = {index: torch.zeros(windows, dtype=torch.float64) for index in streams}
    for window in range(windows):
        row = slice(window, window + 1)
        for place, part in enumerate(reference.parts(states[row])):
            log_p = F.log_softmax(reference(part).float(), dim=-1)
            for index, stream in streams.items():
                log_q = F.log_softmax(head(head.parts(stream[row])[place]).float(), dim=-1)
                kl[index][window] += F.kl_div(log_q, log_p, reduction="sum", log_target=True).double().cpu() / length
    return {
        index: Measured(kl=one.mean().item(), error=one.std().item() / windows**0.5 if windows > 1 else None)
        for index, one in kl.items()
    }
