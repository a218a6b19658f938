"""Which random signs: of several draws of a plan's rotations, the one whose activations lose least when they are rounded."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import partial

import torch
from torch import Tensor

from bitlathe.model.block import Block
from bitlathe.model.fold import per_head, rotation_of
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.walk import Start, walk
from bitlathe.model.weights import Weights
from bitlathe.numerics.activation import rounded_input
from bitlathe.numerics.hadamard import turn, turn_back
from bitlathe.plan import Plan


def errors_of(skeleton: Skeleton, weights: Weights, start: Start, plans: Sequence[Plan], *, batch_size: int) -> list[float]:
    """For each plan the error of rounding activations: over all linears, the mean of |x - rounded x|^2 / |x|^2.

    weights: of an original, edited by the first plan; the others differ from that in the signs of their rotations only.
    start: a few windows of text, one stream. The model runs once, unrounded, turned as the first plan says; what its linears
    read is turned back, and then as each plan says. A linear that reads nothing but zeros counts for nothing; the errors are
    NaN where no linear counts, or where a model's numbers are not finite.
    """
    totals, count = torch.zeros(len(plans), dtype=torch.float64), 0
    drawn = set(drawn_for(skeleton, plans[0]))
    for step in walk(skeleton, weights, start, batch_size=batch_size):
        assert step.inputs is not None
        block, errors = step.block, _Errors(skeleton, plans)
        with torch.no_grad(), block.watch(_read_once(block, skeleton, drawn), errors.see):
            for batch in step.inputs.batches(batch_size):
                block(step.inputs[batch])
        del block
        for lost, all_of_it in errors.sums.values():
            if all_of_it != 0:
                totals += lost / all_of_it
                count += 1
    return (totals / count).tolist()


def drawn_for(skeleton: Skeleton, plan: Plan) -> list[str]:
    """The linears of blocks whose rounded inputs depend on the random signs of the plan's rotations."""
    found = []
    for name, row in plan.linears.items():
        if name == skeleton.arch.head or row.input is None:
            continue
        turned = rotation_of(plan, skeleton, name)
        if turned is not None and turned.kind == "random":
            found.append(name)
    return found


def _read_once(block: Block, skeleton: Skeleton, drawn: Container[str]) -> list[str]:
    """The linears of a block that are in `drawn`; one of each group that reads the same."""
    found: dict[str, str] = {}
    for name in block.linears:
        if name in drawn:
            # Behind the gate every expert has a space of its own.
            found.setdefault(name if skeleton.rows[name].reads == "mid" else block.fused.get(name, name), name)
    return list(found.values())


class _Errors:
    """sums: linear -> what rounding loses under each plan, and the sum of squares, float64 [plans] and []."""

    def __init__(self, skeleton: Skeleton, plans: Sequence[Plan]) -> None:
        self.skeleton, self.plans = skeleton, plans
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def see(self, name: str, x: Tensor) -> None:
        first, *_ = turns = [rotation_of(plan, self.skeleton, name) for plan in self.plans]
        row = self.plans[0].linears[name]
        assert first is not None and row.input is not None
        x = x.float()
        plain = per_head(partial(turn_back, rotation=first), first.space, self.skeleton)(x)
        lost = []
        for rotation in turns:
            assert rotation is not None
            turned = per_head(partial(turn, rotation=rotation), rotation.space, self.skeleton)(plain)
            rounded = rounded_input(turned, row.input, dtype=self.plans[0].dtype, clip=row.clip)
            lost.append((rounded - turned).square_().sum(dtype=torch.float64))
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before[0] + torch.stack(lost).cpu(), before[1] + x.square().sum(dtype=torch.float64).cpu()
