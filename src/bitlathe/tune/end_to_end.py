"""Scales tuned on what the whole model says: every code stays, and every scale may become a little larger or smaller.

What is made smaller is the KL divergence of the quantized model's predictions from the original's, by Adam on one multiple a
scale (as EfficientQAT ends, Chen et al., arXiv:2407.11062, with the original's predictions in place of the text's). In each
step a few sequences go forward and back through the blocks, at most two of which are in memory. The model that runs is the one
that will be written: scales are rounded to the grid that they are stored on, straight through for the gradient. A few sequences
are held out, and where nothing is won on them, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitlathe.formats.base import QuantLayer
from bitlathe.model.block import Block
from bitlathe.model.hidden import Budget, Hidden
from bitlathe.model.skeleton import Head, Skeleton
from bitlathe.model.walk import See, Start, Tape, begin, go_back, walk, walk_back
from bitlathe.model.weights import Weights
from bitlathe.numerics.project import dequantize, movable, stretched
from bitlathe.numerics.scales import cut
from bitlathe.plan import Plan
from bitlathe.tune.base import draws, held_out

# The largest step of a multiple; it falls linearly to nothing, after a few steps in which Adam learns what is usual.
_LR, _WARM_UP = 2e-3, 5
_BETAS = (0.9, 0.95)

# Steps done, and steps.
Listen = Callable[[int, int], None]


@dataclass(frozen=True)
class Quantized:
    """The model that was made: how its original is read, what was made of it, and how much of it at a time is held.

    layers_of: the codes of a block's linears as they have been written.
    """

    skeleton: Skeleton
    weights: Weights
    plan: Plan
    layers_of: Callable[[Block], Mapping[str, QuantLayer]]
    budget: Budget
    batch_size: int

    def put(self, block: Block, multiples: Mapping[str, Tensor]) -> Mapping[str, QuantLayer]:
        """Have a block run its codes, on scales so many times as large; the codes on their own scales."""
        layers = self.layers_of(block)
        block.quantize_inputs(self.plan, {name: layer.input for name, layer in layers.items()})
        block.freeze({name: _times(layer, multiples.get(name)) for name, layer in layers.items()})
        return layers


def _times(layer: QuantLayer, multiples: Tensor | None) -> QuantLayer:
    return layer if multiples is None else replace(layer, weight=stretched(layer.weight, multiples))


def changed(layers: Mapping[str, QuantLayer], multiples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Linear -> what its file will hold for its scales: the multiples that `end_to_end` found, applied."""
    scales = {name: _times(layer, multiples[name]).weight.scale for name, layer in layers.items() if name in multiples}
    return {name: scale.codes for name, scale in scales.items() if scale is not None}


def rescaled(layers: Mapping[str, QuantLayer], scales: Mapping[str, Tensor]) -> dict[str, QuantLayer]:
    """The same codes on what `changed` gave."""
    made = dict(layers)
    for name, layer in layers.items():
        if name in scales and layer.weight.scale is not None:
            scale = replace(layer.weight.scale, codes=scales[name])
            made[name] = replace(layer, weight=replace(layer.weight, scale=scale))
    return made


@torch.no_grad()
def end_to_end(
    model: Quantized, tokens_NT: Tensor, *, steps: int, held: int, seed: int, listen: Listen
) -> tuple[dict[str, Tensor], float, float]:
    """Linear -> what its scales are to be multiplied by [block rows, block columns]; and the mean KL divergence a token, on
    the sequences held out, before and after. Nothing to multiply by where that has not become less.

    tokens_NT: the calibration windows. steps: of `model.batch_size` sequences. held: how many are held out at most.
    """
    run = _Run.of(model, tokens_NT)
    aside = held_out(len(tokens_NT), held)
    # Where too little is left to hold anything out, the first sequence serves for both.
    judges = slice(0, max(aside, 1))
    before = run.divergence(judges)
    if not run.multiples:
        return {}, before, before
    adam = torch.optim.Adam(list(run.multiples.values()), betas=_BETAS)
    for step, rows in zip(range(steps), draws(aside, len(tokens_NT), model.batch_size, seed=seed), strict=False):
        for group in adam.param_groups:
            group["lr"] = _LR * (1 - step / steps) * min(1.0, (step + 1) / _WARM_UP)
        run.gradients(rows)
        adam.step()
        adam.zero_grad()
        listen(step + 1, steps)
    after = run.divergence(judges)
    found = {name: multiple.detach() for name, multiple in run.multiples.items()}
    return (found if after < before else {}), before, after


@dataclass
class _Run:
    """What stays the same from step to step.

    first: hidden states before the first block. wanted: the original's after the last. heads: the original's and ours.
    received: room for what each block receives. multiples: of the linears seen so far.
    """

    model: Quantized
    calls: list[dict[str, Any]]
    first: Hidden
    wanted: Hidden
    heads: tuple[Head, Head]
    received: list[Hidden] = field(default_factory=list)
    multiples: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Quantized, tokens_NT: Tensor) -> _Run:
        """Embed the windows, and take the original through all of them."""
        skeleton, weights, unrounded = model.skeleton, model.weights, model.weights.unrounded
        start = begin(skeleton, weights, tokens_NT, model.budget, streams=1)
        original = begin(skeleton, unrounded, tokens_NT, model.budget, streams=1)
        for _ in walk(skeleton, unrounded, original, batch_size=model.batch_size):
            pass
        heads = skeleton.head(unrounded), skeleton.head(weights)
        model.put(heads[1], {})
        return cls(model, start.calls, start.streams[0], original.streams[0], heads)

    def _forward(self, stream: Hidden, received: list[Hidden] | None = None) -> None:
        """Take hidden states through the quantized blocks, in place. received: to be filled with what each block receives."""
        model = self.model
        for step in walk(model.skeleton, model.weights, Start(self.calls, (stream,)), batch_size=model.batch_size):
            if received is not None:
                received[step.block.index].copy_from(stream, model.batch_size)
            for name, layer in model.put(step.block, self.multiples).items():
                if movable(layer.weight.scheme) and name not in self.multiples:
                    ones = torch.ones(layer.weight.scheme.blocks(layer.weight.shape), device=layer.weight.codes.device)
                    self.multiples[name] = ones.requires_grad_()

    def _parts(self, last: Hidden, rows: slice | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Our last hidden states of some sequences and the original's log-probabilities, a few tokens at a time."""
        original, ours = self.heads
        for part, wanted in zip(ours.parts(last[slice(None)]), original.parts(self.wanted[rows]), strict=True):
            yield part, F.log_softmax(original(wanted).float(), dim=-1)

    def divergence(self, rows: slice) -> float:
        """The mean KL divergence a token over some sequences."""
        last = _some(self.first, rows)
        self._forward(last)
        total, count = 0.0, 0
        for part, log_p in self._parts(last, rows):
            log_q = F.log_softmax(self.heads[1](part).float(), dim=-1)
            total += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
            count += part.shape[1]
        return total / count

    def gradients(self, rows: Tensor) -> None:
        """Leave the gradient of the divergence over some sequences in the multiples."""
        model, last = self.model, _some(self.first, rows)
        if not self.received:
            shape, weights = last.shape, model.weights
            self.received += [model.budget.allocate(shape, weights.dtype, weights.device) for _ in range(model.skeleton.depth)]
        self._forward(last, self.received)
        flat = torch.cat([go_back(self.heads[1], part, _less(log_p), None) for part, log_p in self._parts(last, rows)], 1)
        last[slice(None)] = flat.view(last.shape)
        tape = Tape(self.calls, self.received, last)
        for block in walk_back(model.skeleton, model.weights, tape, batch_size=len(rows), watch=self._watch):
            del block  # before the next one comes

    def _watch(self, block: Block) -> See:
        layers = self.model.put(block, self.multiples)

        def see(name: str, x: Tensor, gradient: Tensor) -> None:
            multiple = self.multiples.get(name)
            if multiple is not None:
                own = layers[name].weight
                by_weight = gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()
                found = cut(by_weight.mul_(dequantize(own, torch.float32)), own.scheme).sum((1, 3))
                multiple.grad = found if multiple.grad is None else multiple.grad + found

        return see


def _less(log_p: Tensor) -> Callable[[Tensor], Tensor]:
    """The gradient by logits of KL(p || softmax(logits)), summed over tokens."""
    return lambda logits: (logits.float().softmax(-1) - log_p.exp()).to(logits.dtype)


def _some(stream: Hidden, rows: slice | Tensor) -> Hidden:
    """Some sequences of a stream, as one of their own."""
    part = stream[rows].clone()
    return Hidden(part, part.device)
