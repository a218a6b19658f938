"""Closed-form tuning: weights rounded so that what a linear makes is nearly what it made, with no descent on their codes.

A block is done in the order in which it runs: q, k and v together, then o, gate and up, down; each stage reads what the stages
before it make once they are rounded. For a stage, the second moments of its input are gathered on the text, and the functions
of `numerics.solve` do the rest: the range of each group is searched, errors are fed back column by column (GPTQ), codes are
moved once more with all others as they are, and scales refitted to them. What is come near to are weights that also make up for
what the input has lost by then, where sequences that nothing was learned from say that this helps. Where gradients say which
errors of an output cost the model's predictions most, its rows make up for each other (`numerics.two_sided`).

At the end the block's own error is measured on those sequences; where it is more than that of searched rounding, that is what
the block gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bitlathe.formats.base import QuantLayer
from bitlathe.model.passage import Passage
from bitlathe.model.walk import Step
from bitlathe.numerics.lattice import Lattice, lattice_of, side_by_side
from bitlathe.numerics.project import Learned, quantize, search
from bitlathe.numerics.scheme import GRIDS, Scheme
from bitlathe.numerics.solve import Hessian, descend, feed_back, prepared, refit, towards
from bitlathe.numerics.two_sided import Outputs, Side, refitted, settled, two_sided
from bitlathe.tune.base import Listen, Needs, Tuned, error_between, held_out
from bitlathe.tune.fisher import metrics_of
from bitlathe.tune.grams import Gram, blended, grams_of
from bitlathe.tune.options import ClosedFormOptions, TuneOptions
from bitlathe.tune.rtn import Rtn

# Damping of H, in its mean diagonal: that of fine integer grids, and of coarse ones or where text is short.
_DAMPING, _MORE_DAMPING = 0.01, 0.05
_SHORT = 16  # tokens a channel, below which text is short
# How much of what an input lost is made up for, and the ridge of what makes up for it; with rounded activations, all of it
# over-fits.
_ALL, _HALF = (1.0, 0.03), (0.5, 0.1)
_NEVER = 4  # tokens a channel, below which nothing is made up for
_REFIT_RIDGE = 0.01
_AT_A_TIME = 1 << 25  # weights that are solved together
_FINER = 3  # times as many gradients for the best effort


@dataclass(frozen=True)
class _Work:
    """One linear, on a range: at first the plain one, then the one that is searched for it."""

    name: str
    weight: Tensor
    scheme: Scheme
    peak: Tensor
    learned: Learned = field(default_factory=Learned)

    def searched(self, gram: Gram | None) -> _Work:
        """On the range that loses least where its inputs are large."""
        importance = None if gram is None else gram.h.diagonal() / gram.tokens
        return replace(self, learned=search(self.weight, self.scheme, importance, peak=self.peak))

    def layer(self, at: Tensor | None = None) -> QuantLayer:
        """Rounded to nearest; or the codes of numbers `at` [rows, columns] that it may have."""
        return QuantLayer(quantize(self.weight, self.scheme, self.learned, self.peak, at=at))

    def lattice(self) -> Lattice:
        """Where its weights may lie."""
        return lattice_of(self.weight, self.scheme, self.learned, self.peak)

    def stretched(self, multiples: Tensor) -> _Work:
        """With the range of each group so many times as wide: [groups, rows]."""
        low, high = (multiples.T if end is None else end * multiples.T for end in (self.learned.low, self.learned.high))
        return replace(self, learned=Learned(low=low if self.scheme.two_ended else None, high=high))


@dataclass(frozen=True)
class _Found:
    """A linear on the range that it ends with, what its weights [rows, columns] should be near to, and what they become."""

    work: _Work
    wanted: Tensor
    weight: Tensor


class ClosedForm:
    """GPTQ with searched scales and what improves on it; see the module."""

    def __init__(self, *, batch_size: int, options: ClosedFormOptions, end_to_end: int = 0) -> None:
        self.batch_size, self.options = batch_size, options
        self.needs, self.end_to_end = Needs(streams=2, beside=True, gradients=options.gradients), end_to_end

    @classmethod
    def of(cls, options: TuneOptions) -> ClosedForm | Rtn:
        """The tuner that a recipe's options ask for."""
        if options.effort == "fast":
            return Rtn(searched=True, batch_size=options.batch_size)
        asked = options.closed_form
        if options.effort == "normal":
            return cls(batch_size=options.batch_size, options=asked)
        finer = asked.model_copy(update={"gradients": _FINER * asked.gradients})
        return cls(batch_size=options.batch_size, options=finer, end_to_end=asked.end_to_end)

    @torch.no_grad()
    def tune(self, step: Step, schemes: Mapping[str, Scheme], listen: Listen) -> Tuned:
        """See `Tuner.tune`."""
        assert step.sides is not None
        block, (ours, original), inputs = step.block, step.sides, step.sides[0].received
        peaks = block.peaks(schemes)
        linears = {name: block.linear(name) for name in schemes}
        works = {name: _Work(name, block.weight(name), scheme, peaks[name]) for name, scheme in schemes.items()}
        aside = held_out(len(inputs), self.options.held_out)
        held, rest = inputs.batches(self.batch_size, first=aside), inputs.batches(self.batch_size, start=aside)
        outputs = metrics_of(step, schemes, batch_size=self.batch_size)
        rounded: dict[str, QuantLayer] = {}
        solved: dict[str, QuantLayer] = {}
        starved: list[str] = []
        failed: list[str] = []
        for number, stage in enumerate(block.stages):
            groups = [group for names in stage if (group := [works[name] for name in names if name in works])]
            firsts = [group[0].name for group in groups]
            grams, checks = (grams_of(step, firsts, batches=batches) for batches in (rest, held))
            grams = blended(grams)
            nearest: dict[str, QuantLayer] = {}
            now: dict[str, QuantLayer] = {}
            for group, first in zip(groups, firsts, strict=True):
                gram = grams.get(first)
                searched = [work.searched(gram) for work in group]
                nearest |= {work.name: work.layer() for work in searched}
                if gram is None:
                    starved += [work.name for work in group]
                    continue
                made_up = _ALL if linears[first].stage.scheme is None else _HALF
                for alike in _alike(searched):
                    found = _solve(alike, gram, checks.get(first), outputs, made_up=made_up, options=self.options)
                    failed += [work.name for work in alike if work.name not in found]
                    now |= found
            rounded |= nearest
            solved |= nearest | now
            block.freeze(nearest | now)
            listen(number + 1, len(block.stages), 0.0)
        after = error_between(ours, original, batches=held or rest[:1])
        block.swap(linears)
        block.freeze(rounded)
        before = error_between(Passage(block, inputs), original, batches=held or rest[:1])
        if not after <= before:  # a NaN is neither
            told = "in closed form it loses more than rounded to nearest, on text that nothing was learned from: it is rounded"
            return Tuned(rounded, before, before, tuple(starved), told)
        fallen = f"the moments of what {', '.join(failed)} reads have no inverse: rounded to nearest" if failed else None
        return Tuned(solved, before, after, tuple(starved), fallen)


def _alike(works: Sequence[_Work]) -> list[list[_Work]]:
    """In parts of one scheme, which are solved as one matrix."""
    parts: dict[Scheme, list[_Work]] = {}
    for work in works:
        parts.setdefault(work.scheme, []).append(work)
    return list(parts.values())


def _solve(
    works: list[_Work],
    gram: Gram,
    check: Gram | None,
    outputs: Mapping[str, Hessian],
    *,
    made_up: tuple[float, float],
    options: ClosedFormOptions,
) -> dict[str, QuantLayer]:
    """The codes of linears of one scheme that read the same; nothing where the moments have no inverse. outputs: what errors of
    what they make cost, where that is known."""
    grid, h, width = GRIDS[works[0].scheme.grid], gram.h / gram.tokens, len(gram.h)
    coarse = grid.bits <= 3 or (grid.kind == "float" and grid.bits <= 4) or gram.tokens < _SHORT * width
    hessian = prepared(h, _MORE_DAMPING if coarse else _DAMPING)
    if hessian is None:
        return {}
    tried: list[tuple[_Work, Tensor]] = []
    for work in works:
        weight = work.weight.float()
        tried.append((work, weight))
        missing = gram.missing(weight)
        if missing is not None and check is not None and gram.tokens >= _NEVER * width:
            tried.append((work, towards(weight, h, missing, part=made_up[0], ridge=made_up[1])))
    best: dict[str, _Found] = {}
    for portion in _portions(tried):
        for found in _descended(portion, hessian, options):
            name = found.work.name
            if name not in best or (check is not None and _lost(found, check) < _lost(best[name], check)):
                best[name] = found
    known = [found for name, found in best.items() if name in outputs]
    if known:
        best |= {found.work.name: found for found in _across(known, hessian, outputs, options)}
    return {name: found.work.layer(found.weight) for name, found in best.items()}


def _portions(tried: list[tuple[_Work, Tensor]]) -> Iterator[list[tuple[_Work, Tensor]]]:
    """As many at a time as there should be in memory: rows side by side are solved in the same steps."""
    portion: list[tuple[_Work, Tensor]] = []
    for work, wanted in tried:
        if portion and sum(before.numel() for _, before in portion) + wanted.numel() > _AT_A_TIME:
            yield portion
            portion = []
        portion.append((work, wanted))
    yield portion


def _lost(found: _Found, check: Gram) -> float:
    """How far what a linear makes of its input is from what the original makes of its own, squared, but for a constant."""
    weight = found.work.weight.float()
    error, missing = weight - found.weight, check.missing(weight)
    lost = error @ check.h / check.tokens
    return ((lost if missing is None else lost + 2 * missing) * error).sum().item()


def _across(tried: list[_Found], hessian: Hessian, outputs: Mapping[str, Hessian], options: ClosedFormOptions) -> list[_Found]:
    """The same with rows that make up for each other; then on scales that are refitted to that."""
    order, back, works, sides = hessian.order, hessian.order.argsort(), [one.work for one in tried], []
    for one in tried:
        metric = Outputs(outputs[one.work.name], options.slices)
        sides.append(Side.of(one.wanted.T[order], one.weight.T[order], one.work.lattice().ordered(order), metric))
    best, scheme = two_sided(sides, hessian, passes=options.passes), works[0].scheme
    for _ in range(options.refits if _refits(scheme) else 0):
        width = scheme.block[1] or len(order)
        stretched = [
            work.stretched(refitted(side, hessian, width=width, ridge=_REFIT_RIDGE))
            for work, (_, side) in zip(works, best, strict=True)
        ]
        moved = [side.moved(work.lattice().ordered(order)) for (_, side), work in zip(best, stretched, strict=True)]
        for index, now in enumerate(settled(moved, hessian, passes=1)):
            if now[0] < best[index][0]:
                works[index], best[index] = stretched[index], now
    parts = zip(tried, works, best, strict=True)
    return [replace(one, work=work, weight=side.result[back].T.contiguous()) for one, work, (_, side) in parts]


def _refits(scheme: Scheme) -> bool:
    """Whether each scale can become another one on its own."""
    return scheme.block[0] == 1 and scheme.moves


def _descended(tried: list[tuple[_Work, Tensor]], hessian: Hessian, options: ClosedFormOptions) -> list[_Found]:
    """Each work with what its weights [rows, columns] should be near to, solved."""
    works, wanted = [work for work, _ in tried], torch.cat([wanted for _, wanted in tried])
    scheme, order = works[0].scheme, hessian.order
    back, rows = order.argsort(), [len(work.weight) for work in works]
    aim = wanted.T[order].contiguous()
    lattice = side_by_side([work.lattice() for work in works]).ordered(order)
    found = feed_back(aim, lattice, hessian)
    for _ in range(options.passes):
        found = descend(aim, found, lattice, hessian)
    lost = hessian.loss(aim - found)
    refits = options.refits if _refits(scheme) else 0
    h = hessian.h[back][:, back]
    for _ in range(refits):
        multiples = refit(wanted.T, found[back], h, width=scheme.block[1] or len(aim), ridge=_REFIT_RIDGE)
        stretched = [work.stretched(own) for work, own in zip(works, multiples.split(rows, dim=1), strict=True)]
        other = side_by_side([work.lattice() for work in stretched]).ordered(order)
        moved = descend(aim, lattice.moved(found, other), other, hessian)
        now = hessian.loss(aim - moved)
        better = now < lost
        kept = torch.where(better, multiples, 1.0)
        works = [work.stretched(own) for work, own in zip(works, kept.split(rows, dim=1), strict=True)]
        lattice = lattice.mixed(other, better)
        found, lost = torch.where(better, moved, found), torch.minimum(now, lost)
    parts = found[back].T.contiguous().split(rows)
    return [_Found(work, own, part) for work, (_, own), part in zip(works, tried, parts, strict=True)]
