"""Which errors of what the linears of a block make cost the model's predictions something, and which do not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bitlathe.model.walk import Step, back_at_a_time, go_back
from bitlathe.numerics.solve import Hessian, prepared

# Of G, in its mean diagonal: it comes of fewer tokens than H, and one label each, so most of what is small in it is chance.
_DAMPING = 0.3


@torch.no_grad()
def metrics_of(step: Step, names: Iterable[str], *, batch_size: int) -> dict[str, Hessian]:
    """Linear -> sum of g g^T [outputs, outputs], ready to be solved with; g the gradient of the original's likelihood by what
    it makes. Nothing on a walk without gradients, or where they have no inverse or say nothing."""
    if step.gradient is None:
        return {}
    assert step.sides is not None
    original = step.sides[1]
    wanted, found = set(names), dict[str, Tensor]()

    def see(name: str, _: Tensor, gradient: Tensor) -> None:
        if name in wanted:
            g = gradient.flatten(0, -2).float()
            found[name] = found.get(name, g.new_zeros(g.shape[-1], g.shape[-1])).addmm_(g.T, g)

    skipped = len(original.received) - len(step.gradient)
    for batch in step.gradient.batches(back_at_a_time(batch_size)):
        given = step.gradient[batch]
        x = original.received[slice(batch.start + skipped, batch.stop + skipped)]
        go_back(original.block, x, lambda _, given=given: given, see)
    metrics = {name: prepared(g, _DAMPING) for name, g in found.items()}
    return {name: metric for name, metric in metrics.items() if metric is not None}
