"""Which channels are smoothed, and by how much: what loses least when weights and activations are rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bitlathe.model.block import Block
from bitlathe.model.edit import Turn
from bitlathe.model.fold import per_head, rotation_of
from bitlathe.model.moments import Moments
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.smooth import Junction, junctions_of
from bitlathe.model.walk import Start, walk
from bitlathe.model.weights import Weights
from bitlathe.numerics.activation import fake_quantize_input, static_scale
from bitlathe.numerics.hadamard import turn
from bitlathe.numerics.project import fake_quantize
from bitlathe.numerics.scheme import static
from bitlathe.numerics.smoothing import factors
from bitlathe.plan import LayerPlan, Plan

# Tokens on which the outputs of a linear are compared, about.
_TOKENS = 512
# A junction is left alone where smoothing leaves more than this part of the error: what is tuned later mends small differences,
# and measures better.
_WORTH = 0.95


@dataclass(frozen=True)
class Smoothing:
    """factors: writer of a junction -> the factors [channels] of its channels, float32 on the CPU. places: how many junctions
    there are. left: of those that are smoothed, the part of the error that is left."""

    factors: dict[str, Tensor] = field(default_factory=dict)
    places: int = 0
    left: tuple[float, ...] = ()


def smoothing_of(
    skeleton: Skeleton,
    weights: Weights,
    start: Start,
    plan: Plan,
    *,
    batch_size: int,
    listen: Callable[[int, int], None] = lambda done, of: None,
) -> Smoothing:
    """For every junction that `plan` leaves room for, the factors with which its readers lose least, or none.

    weights: of an original without any edits. start: a few windows of text, one stream. What a reader loses is the squared
    error of its outputs, in parts of their squares, where its weight and its inputs are smoothed, turned as the plan says and
    rounded to nearest; a junction's error is the sum over its readers.
    """
    found, left, places = {}, [], 0
    of_block = junctions_of(skeleton, plan)
    for step in walk(skeleton, weights, start, batch_size=batch_size):
        assert step.inputs is not None
        block, junctions = step.block, of_block[step.block.name]
        names = [name for junction in junctions for name in junction.readers if name in plan.quantized]
        seen = _Seen(every=max(1, step.inputs.shape[0] * step.inputs.shape[1] // _TOKENS))
        with torch.no_grad(), block.watch(names, seen.see):
            for batch in step.inputs.batches(batch_size):
                block(step.inputs[batch])
        for junction in junctions:
            places += 1
            chosen = _chosen(junction, _Readers(block, skeleton, plan, seen, junction))
            if chosen is not None:
                found[junction.writer] = chosen[0].cpu()
                left.append(chosen[1])
        listen(block.index + 1, skeleton.depth)
        del block, seen
    return Smoothing(found, places, tuple(left))


class _Seen:
    """Of what linears read: the mean squares of channels, and a sample of tokens [tokens, inputs] by name."""

    def __init__(self, *, every: int) -> None:
        self.moments, self.samples = Moments(), dict[str, list[Tensor]]()
        self._every = every

    def see(self, name: str, x: Tensor) -> None:
        """Take in [..., tokens, inputs]."""
        self.moments.see(name, x)
        self.samples.setdefault(name, []).append(x.flatten(0, -2)[:: self._every].clone())


class _Readers:
    """The quantized readers of a junction that some token has reached."""

    def __init__(self, block: Block, skeleton: Skeleton, plan: Plan, seen: _Seen, junction: Junction) -> None:
        self.plan = plan
        self.names = [name for name in junction.readers if name in seen.samples and name in plan.quantized]
        self.weights = {name: block.weight(name).float() for name in self.names}
        self.samples = {name: torch.cat(seen.samples[name]).float() for name in self.names}
        self.outputs = {name: self.samples[name] @ self.weights[name].T for name in self.names}
        self.turns = {name: _turn(skeleton, plan, name) for name in self.names}
        self.fused = {name: block.fused.get(name, name) for name in self.names}
        self.moments = [mean for name in self.names if (mean := seen.moments.mean(name)) is not None]

    def error(self, by: Tensor | None) -> float:
        """Of all readers, where their inputs are divided and the columns of their weights multiplied by `by` [inputs]."""
        weights = {name: self.turns[name](w if by is None else w * by) for name, w in self.weights.items()}
        peaks: dict[str, Tensor] = {}
        for name, w in weights.items():
            label = self.fused[name]
            peaks[label] = torch.maximum(peaks.get(label, w.new_zeros(())), w.abs().max())
        total = 0.0
        for name, w in weights.items():
            x, y = self.samples[name], self.outputs[name]
            rounded = _rounded(self.turns[name](x if by is None else x / by), self.plan.linears[name], self.plan.dtype)
            scheme = self.plan.quantized[name]
            z = rounded @ fake_quantize(w, scheme, peak=peaks[self.fused[name]], dtype=torch.float32).T
            lost, all_of_it = float(z.sub_(y).square_().sum()), float(y.square().sum())
            total += lost / all_of_it if all_of_it else 0.0
        return total


def _chosen(junction: Junction, readers: _Readers) -> tuple[Tensor, float] | None:
    """The factors as they are written that lose least, and the part of the error that is left; None for none."""
    if not readers.moments:
        return None
    x_squares = junction.written(torch.stack(readers.moments).mean(0))
    w_squares = junction.written(torch.cat(list(readers.weights.values())).square().mean(0))
    plain = readers.error(None)
    errors = [(readers.error(junction.read(each)), each) for each in factors(x_squares, w_squares)]
    least, best = min(errors, key=lambda error: error[0], default=(plain, x_squares))
    return (best, least / plain) if least < _WORTH * plain else None


def _turn(skeleton: Skeleton, plan: Plan, name: str) -> Turn:
    rotation = rotation_of(plan, skeleton, name)
    return (lambda x: x) if rotation is None else per_head(partial(turn, rotation=rotation), rotation.space, skeleton)


def _rounded(x: Tensor, row: LayerPlan, dtype: str) -> Tensor:
    """A sample of a linear's inputs as its row rounds them."""
    if row.input is None:
        return x
    fixed = static_scale(*torch.aminmax(x), row.input, dtype, clip=row.clip) if static(row.input) else None
    return fake_quantize_input(x, row.input, clip=row.clip, fixed=fixed)
