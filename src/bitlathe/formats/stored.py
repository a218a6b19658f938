"""The tensors of a linear in a file: what they take, taking them out, and saying what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from bitlathe.errors import CheckpointError, FormatError
from bitlathe.plan import Plan

# Name of a tensor -> its dtype and shape.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def bits_of(layout: Layout) -> int:
    """What tensors take in a file, in bits."""
    return sum(8 * dtype.itemsize * prod(shape) for dtype, shape in layout.values())


def take(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor `name`. Raises CheckpointError when it is missing or not of this dtype and shape."""
    if name not in tensors:
        raise CheckpointError(
            f"there is no tensor {name!r} beside {', '.join(map(repr, tensors)) or 'nothing else'}. "
            "The file does not belong to this config.json, or its download is incomplete: fetch the folder again"
        )
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"the tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, where its scheme needs {dtype} {list(shape)}. "
            "The file does not belong to this config.json: fetch the folder again"
        )
    return tensor


def refuse_split_groups(plan: Plan, fused: Mapping[str, str], format_name: str) -> None:
    """Raise FormatError where linears that serving engines fuse into one matrix are stored differently.

    fused: linear -> label of its group; linears that are not in it are served alone. What runs before them may differ: of
    experts, some read another space.
    """
    groups: dict[str, list[str]] = {}
    for linear in plan.linears:
        if linear in fused:
            groups.setdefault(fused[linear], []).append(linear)
    rows = {linear: row.model_copy(update={"online": None}) for linear, row in plan.linears.items()}
    split = [names for names in groups.values() if any(rows[name] != rows[names[0]] for name in names)]
    if split:
        more = f" ({len(split) - 1} more such groups)" if len(split) > 1 else ""
        raise FormatError(
            f"{format_name} cannot hold different schemes for {some(split[0])}{more}: serving engines run them as one matrix. "
            "Give the whole group one scheme with an override, keep all of it in 16 bits, or write the native format"
        )


def some(names: list[str]) -> str:
    """Up to four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
