"""Which channels are smoothed, and by how much: what loses least when weights and activations are rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isfinite

import torch
from torch import Tensor

from bitlathe.model.block import Block
from bitlathe.model.edit import Turn
from bitlathe.model.fold import per_head, rotation_of
from bitlathe.model.moments import Moments, counting
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.smooth import Junction, junctions_of
from bitlathe.model.walk import Start, walk
from bitlathe.model.weights import Weights
from bitlathe.numerics.activation import rounded_input
from bitlathe.numerics.hadamard import turn
from bitlathe.numerics.project import fake_quantize
from bitlathe.numerics.scales import nested
from bitlathe.numerics.smoothing import factors
from bitlathe.plan import LayerPlan, Plan

# Tokens on which the outputs of a linear are compared, about; with fewer than the second number it has no say.
_TOKENS, _LEAST_TOKENS = 512, 64
# A junction is left alone where smoothing leaves more than this part of the error: what is tuned later mends small differences,
# and measures better.
_WORTH = 0.95


@dataclass(frozen=True)
class Smoothing:
    """factors: writer of a junction -> the factors [channels] of its channels, float32 on the CPU. places: how many junctions
    were compared. left: of those that are smoothed, the part of the error that is left."""

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
    listen: Callable[[int, int], None],
) -> Smoothing:
    """For every junction that `plan` leaves room for, the factors with which its readers lose least, or none.

    weights: of an original without any edits. start: a few windows of text, one stream. What a reader loses is the squared
    error of its outputs, in parts of their squares, where its weight and its inputs are smoothed, turned as the plan says and
    rounded to nearest; a junction's error is the sum over its readers. Factors come from every other token, errors from those
    in between; tokens of extreme norm count for neither (see `counting`).
    """
    found, left, places = {}, [], 0
    rows = {name: row for name, row in plan.linears.items() if row.weight is not None}
    of_block = junctions_of(skeleton, plan)
    for step in walk(skeleton, weights, start, batch_size=batch_size):
        assert step.inputs is not None
        block, junctions = step.block, of_block[step.block.name]
        names = [name for junction in junctions for name in junction.readers if name in rows]
        tokens = step.inputs.shape[0] * step.inputs.shape[1]
        seen = _Seen({name: max(1, int(tokens * skeleton.share(name)) // (2 * _TOKENS)) for name in names})
        with torch.no_grad(), block.watch(names, seen.see):
            for batch in step.inputs.batches(batch_size):
                block(step.inputs[batch])
            for junction in junctions:
                readers = [
                    _Reader(block, name, rows[name], seen.sample(name), _turn(skeleton, plan, name), plan.dtype)
                    for name in junction.readers
                    if name in rows and seen.count(name) >= _LEAST_TOKENS
                ]
                if not readers:
                    continue
                places += 1
                chosen = _chosen(junction, readers, seen, dtype=plan.dtype)
                if chosen is not None:
                    found[junction.writer] = chosen[0].cpu()
                    left.append(chosen[1])
        listen(block.index + 1, skeleton.depth)
        del block, seen
    return Smoothing(found, places, tuple(left))


class _Seen:
    """What linears read, of the tokens that count. every: linear -> of so many odd ones one is kept."""

    def __init__(self, every: dict[str, int]) -> None:
        self.moments = Moments()
        self.largest: dict[str, Tensor] = {}
        self._every, self._samples = every, dict[str, list[Tensor]]()

    def see(self, name: str, x: Tensor) -> None:
        """Take in [..., tokens, inputs]. The largest magnitudes are those of all tokens."""
        odd = x[..., 1::2, :]
        if not odd.numel():  # an expert may be given one token, or none
            return
        self.moments.see(name, x[..., ::2, :])
        self._samples.setdefault(name, []).append(odd[counting(odd)][:: self._every[name]].clone())
        largest = x.abs().flatten(0, -2).amax(0)
        self.largest[name] = torch.maximum(self.largest.get(name, largest), largest)

    def sample(self, name: str) -> Tensor:
        """[tokens, inputs]."""
        return torch.cat(self._samples[name])

    def count(self, name: str) -> int:
        """Of the sample's tokens."""
        return sum(len(part) for part in self._samples.get(name, []))


@dataclass(frozen=True)
class _Reader:
    """A quantized linear: its row of the plan, a sample of what it reads, and what turns its inputs."""

    block: Block
    name: str
    row: LayerPlan
    sample: Tensor
    turn: Turn
    dtype: str

    @cached_property
    def made(self) -> Tensor:
        """What it makes of the sample [tokens, outputs], float32, nothing rounded."""
        return self.sample.float() @ self.block.weight(self.name).float().T

    def weight(self, by: Tensor | None) -> Tensor:
        """Its weight, float32, as it is turned, of columns multiplied by `by`."""
        weight = self.block.weight(self.name).float()
        return self.turn(weight if by is None else weight * by)

    @property
    def label(self) -> str:
        """Of the fused group it belongs to; its own name where it is alone."""
        return self.block.fused.get(self.name, self.name)

    @property
    def shares(self) -> bool:
        """Whether it has a scale for the whole matrix, which a fused group shares."""
        scheme = self.row.weight
        return scheme is not None and (scheme.block == (0, 0) or nested(scheme))

    def lost(self, by: Tensor | None, peak: Tensor | None) -> float:
        """The squared error of its outputs, in parts of their squares, where its inputs are divided by `by`."""
        assert self.row.weight is not None
        x, y = self.sample.float(), self.made
        read = rounded_input(self.turn(x if by is None else x / by), self.row.input, dtype=self.dtype, clip=self.row.clip)
        z = read @ fake_quantize(self.weight(by), self.row.weight, peak=peak, dtype=torch.float32).T
        all_of_it = float(y.square().sum())
        return float(z.sub_(y).square_().sum()) / all_of_it if all_of_it else 0.0


def _error(readers: Sequence[_Reader], by: Tensor | None) -> float:
    """Of all readers, one at a time. A scale that a fused group shares covers the largest weight of those that are here."""
    peaks: dict[str, Tensor] = {}
    for reader in readers:
        if reader.shares:
            peak = reader.weight(by).abs().max()
            peaks[reader.label] = torch.maximum(peaks.get(reader.label, peak), peak)
    return sum(reader.lost(by, peaks.get(reader.label)) for reader in readers)


def _chosen(junction: Junction, readers: Sequence[_Reader], seen: _Seen, *, dtype: str) -> tuple[Tensor, float] | None:
    """The factors as they are written that lose least, and the part of the error that is left; None for none."""
    plain = _error(readers, None)
    means = [mean for reader in readers if (mean := seen.moments.mean(reader.name)) is not None]
    if not means or not isfinite(plain) or plain == 0:
        return None
    x_squares = torch.stack(means).mean(0)
    w_squares = torch.stack([reader.block.weight(reader.name).float().square().mean(0) for reader in readers]).mean(0)
    largest = torch.stack([seen.largest[reader.name] for reader in readers]).amax(0)
    tried = factors(*map(junction.written, (x_squares, w_squares, largest.float())), dtype=dtype)
    errors = [(error, each) for each in tried if isfinite(error := _error(readers, junction.read(each)))]
    if not errors:
        return None
    least, best = min(errors, key=lambda error: error[0])
    return (best, least / plain) if least < _WORTH * plain else None


def _turn(skeleton: Skeleton, plan: Plan, name: str) -> Turn:
    rotation = rotation_of(plan, skeleton, name)
    return (lambda x: x) if rotation is None else per_head(partial(turn, rotation=rotation), rotation.space, skeleton)
