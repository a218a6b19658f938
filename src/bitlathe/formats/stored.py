"""The tensors of a linear in a file: what they take, taking them out, and saying what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from bitlathe.arch import ARCHS
from bitlathe.errors import CheckpointError, FormatError
from bitlathe.numerics.scheme import Scheme, name_of
from bitlathe.plan import Plan

# Name of a tensor -> its dtype and shape.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

HEADS = frozenset(arch.head for arch in ARCHS.values())
# What the names of experts hold.
EXPERTS = tuple(f".{arch.experts}." for arch in ARCHS.values() if arch.experts is not None)
# Dtypes by their names in config.json, and in a plan.
DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16"}


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


def refuse_beyond_weights(plan: Plan, shapes: Mapping[str, tuple[int, int]], heads: Container[str], format_name: str) -> None:
    """Raise FormatError for a plan with anything but quantized weights of linears, and rotations that are folded into them.

    shapes: of the linears. heads: names of output heads, which are kept too.
    """
    rows = plan.linears.items()
    beyond = {
        "quantizes nothing: write the dense format instead": not plan.quantized,
        "quantizes activations: choose schemes of weights": any(row.input is not None for _, row in rows),
        "turns inputs while it runs (R4): leave that rotation out": any(row.online is not None for _, row in rows),
        "turns queries and keys (R3): leave that rotation out": any(turn.space == "qk" for turn in plan.rotations),
        "quantizes cached keys and values: leave out --kv": plan.kv is not None,
        "quantizes embeddings: keep them": any(name not in shapes for name in plan.quantized),
        "quantizes the output head: keep it": any(name in heads for name in plan.quantized),
    }
    told = [words for words, there in beyond.items() if there]
    if told:
        raise FormatError(
            f"{format_name} cannot hold a plan that {told[0]}, or write the native format, which holds every plan"
        )


def refuse_rows(
    plan: Plan,
    shapes: Mapping[str, tuple[int, int]],
    format_name: str,
    reason: Callable[[Scheme, tuple[int, int]], str | None],
) -> None:
    """Raise FormatError for quantized linears that there is a reason against, each reason once. shapes: (outputs, inputs)."""
    found = ((name, scheme, reason(scheme, shapes[name])) for name, scheme in plan.quantized.items())
    refuse_each(((name, why and f"{name_of(scheme)}: {why}") for name, scheme, why in found), format_name)


def refuse_each(reasons: Iterable[tuple[str, str | None]], format_name: str, *, mark: str = ",") -> None:
    """Raise FormatError for linears that there is a reason against, each reason once, after the names and a `mark`."""
    refused: dict[str, list[str]] = {}
    for name, why in reasons:
        if why is not None:
            refused.setdefault(why, []).append(name)
    if refused:
        told = "; ".join(f"{some(names)}{mark} {why}" for why, names in refused.items())
        raise FormatError(f"{format_name} cannot hold {told}. The native format holds every scheme")


def most_of(plan: Plan) -> Scheme:
    """The scheme that most of a plan's linears have, the first of them if there are more."""
    counts = Counter(plan.quantized.values())
    if not counts:
        raise FormatError("no linear is quantized by what its quantization_config says, so there is nothing to read")
    return max(counts, key=lambda scheme: counts[scheme])


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
