"""Experts in compressed-tensors: stored as linears, one by one, which serving engines and transformers fuse again.

transformers 5 has no linears to put the library's schemes on: it decodes the experts of all blocks while it loads, by the first
group (that of the experts, see `first_experts`), and drops what the configuration says of their activations. Tested in versions
5.17 and 5.23: it decodes packed symmetric integers, FP8 and MXFP4; NVFP4 it decodes as other numbers, and at the rest it stops.
After `import bitlathe.hf` experts are linears there too, and all of it is read.

Beside experts, dense blocks need care as well: see `named`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from bitlathe.errors import FormatError
from bitlathe.formats.ct_schemes import FLOAT, MXFP4, PACKED, layout_of
from bitlathe.formats.stored import some
from bitlathe.plan import LayerPlan, Plan

_EXPERT = re.compile(r"\.experts\.\d+\.")
_DENSE = re.compile(r"(.*\.mlp\.)(gate|up)_proj")


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


def named(linears: Iterable[str], plan: Plan) -> list[str]:
    """What a configuration calls linears of a plan: their full names.

    vLLM runs gate_proj and up_proj of a dense block as gate_up_proj, and does not know of which names it is made where other
    blocks have experts (qwen3_moe, read in its versions 0.20 and 0.33): one pattern then says all three names.
    """
    names = list(linears)
    if not _experts(plan):
        return names
    both = set(names)
    said = []
    for name in names:
        part = _DENSE.fullmatch(name)
        if part is not None and {f"{part[1]}gate_proj", f"{part[1]}up_proj"} <= both:
            name = f"re:{re.escape(part[1])}(gate|up|gate_up)_proj$"
        said.append(name)
    return list(dict.fromkeys(said))


def _decoded(row: LayerPlan) -> bool:
    if row.weight is None or row.input is not None:
        return False
    layout = layout_of(row)
    return layout in (PACKED, MXFP4) or (layout == FLOAT and row.weight.block in ((1, 0), (0, 0)))


def _experts(plan: Plan) -> dict[str, LayerPlan]:
    return {name: row for name, row in plan.linears.items() if _EXPERT.search(name)}
