"""Static scales of activations: ranges measured on the calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

from bitlathe.model.block import Block
from bitlathe.model.hidden import Hidden
from bitlathe.numerics.activation import StaticScale, static_scale
from bitlathe.numerics.scheme import static
from bitlathe.plan import Plan


@torch.no_grad()
def static_scales(block: Block, plan: Plan, inputs: Hidden | None, *, batch_size: int) -> dict[str, StaticScale]:
    """Linear -> its static scale, for those of the block whose activations have one.

    inputs: what the block will receive. The block is as it was read: its linears turn their inputs and do not round them yet,
    so the ranges are those of what will be rounded, but for the rounding further up in the block.
    """
    names = [name for name in block.linears if static(plan.linears[name].input)]
    if not names:
        return {}
    assert inputs is not None
    low: dict[tuple[str, str], Tensor] = {}
    high: dict[tuple[str, str], Tensor] = {}

    # Engines run a projection of all experts as one, with one scale; and not every expert is chosen for this text.
    shared = {name: (block.fused.get(name, name), name.rpartition(".")[2]) for name in names}

    def see(name: str, x: Tensor) -> None:
        if x.numel():
            least, most = (end.float() for end in torch.aminmax(x))
            key = shared[name]
            low[key] = torch.minimum(low.get(key, least), least)
            high[key] = torch.maximum(high.get(key, most), most)

    with block.watch(names, see):
        for batch in inputs.batches(batch_size):
            for part in block.parts(inputs[batch]):
                block(part)
    found = {}
    for name in names:
        row = plan.linears[name]
        assert row.input is not None
        found[name] = static_scale(low[shared[name]], high[shared[name]], row.input, plan.dtype, clip=row.clip)
    return found
