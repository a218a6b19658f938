"""Experts in compressed-tensors: stored as linears, one by one, which serving engines and transformers fuse again.

transformers 5 has no linears to put the library's schemes on: it decodes the experts of all blocks while it loads, by the first
group (that of the experts, see `first_experts`), and drops what the configuration says of their activations. Tested in versions
5.17 and 5.23: it decodes packed symmetric integers, FP8 and MXFP4; NVFP4 it decodes as other numbers, and at the rest it stops.
After `import bitlathe.hf` experts are linears there too, and all of it is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from bitlathe.errors import FormatError
from bitlathe.formats.ct_schemes import FLOAT, MXFP4, PACKED, layout_of
from bitlathe.formats.stored import some
from bitlathe.plan import LayerPlan, Plan

_EXPERT = re.compile(r"\.experts\.\d+\.")


def refuse_experts(plan: Plan) -> None:
    """Raise FormatError for experts that no reader of the format is known to read."""
    asymmetric = [name for name, row in _experts(plan).items() if row.weight is not None and row.weight.asymmetric]
    if asymmetric:
        raise FormatError(
            f"compressed-tensors cannot hold zero points of experts ({some(asymmetric)}): transformers fuses experts without "
            "them. Choose a symmetric scheme for the experts, or write the native format"
        )


def read_alone(plan: Plan) -> bool:
    """Whether transformers reads the experts of a plan as they are, without bitlathe.hf."""
    rows = set(_experts(plan).values())
    return not rows or (len(rows) == 1 and _decoded(rows.pop()))


def first_experts(groups: Mapping[LayerPlan, list[str]]) -> dict[LayerPlan, list[str]]:
    """Rows with their linears, those of experts first."""
    return dict(sorted(groups.items(), key=lambda group: not any(_EXPERT.search(name) for name in group[1])))


def _decoded(row: LayerPlan) -> bool:
    if row.weight is None or row.input is not None:
        return False
    layout = layout_of(row)
    return layout in (PACKED, MXFP4) or (layout == FLOAT and row.weight.block in ((1, 0), (0, 0)))


def _experts(plan: Plan) -> dict[str, LayerPlan]:
    return {name: row for name, row in plan.linears.items() if _EXPERT.search(name)}
