"""The fp8 method of transformers and vLLM (quant_method "fp8"), in which DeepSeek and Qwen publish their models.

A linear is `weight`, float8_e4m3fn [outputs, inputs], and `weight_scale_inv`, float32, one for each block of 128 x 128: what
its codes are multiplied by, whatever the name says. Inputs are rounded to E4M3 as the model runs, in groups of 128 with a scale
in float32 each. There is one scheme, FP8_BLOCK_DYNAMIC, and `modules_to_not_convert` names the linears that do not have it.

What its readers do (read in transformers 5.23, and in vLLM's checks of shapes):

    transformers, on a CPU   multiplies codes and scales in float32 while it loads, casts once, and keeps activations; a block
                             has the rows that the scales divide all rows into, so that 160 would be two blocks of 80
    transformers, on a GPU   rounds activations and multiplies codes; experts it leaves out by the module that holds them
    vLLM                     the same; it stops where parts of what it fuses do not have multiples of 128 rows

Other programs' scales may be in bf16 or fp16; they are read as the float32 numbers that they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bitlathe.errors import FormatError
from bitlathe.formats.base import Container, QuantLayer
from bitlathe.formats.stored import (
    DTYPE_NAMES,
    EXPERTS,
    HEADS,
    Layout,
    bits_of,
    refuse_beyond_weights,
    refuse_each,
    refuse_split_groups,
    take,
)
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.scheme import PRESETS, described, name_of
from bitlathe.plan import LayerPlan, Plan

METHOD = "fp8"
_NAME = "FP8_BLOCK_DYNAMIC"
_ROW = LayerPlan(weight=PRESETS[_NAME].weight, input=PRESETS[_NAME].input)
_SIDE = 128
# What a configuration has to say of the scheme, and what it means where it says nothing.
_SAID: dict[str, Any] = {"activation_scheme": "dynamic", "weight_block_size": [_SIDE, _SIDE]}
_UNSAID: dict[str, Any] = {"fmt": "e4m3", "scale_fmt": "float"}


class Fp8:
    """FP8 in blocks of 128 x 128 with activations rounded as the model runs, for vLLM and transformers."""

    name = "fp8"
    dtype: ClassVar[Literal["bf16", "fp16"] | None] = None
    container: Container | None = None

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError for any other scheme, and for rows that transformers would cut into other blocks."""
        rows = {name: row.model_copy(update={"input": None}) for name, row in plan.linears.items()}
        refuse_beyond_weights(plan.model_copy(update={"linears": rows}), shapes, HEADS, self.name)
        reasons = (
            (name, _reason(row) or (None if row.weight is None else _misfit(shapes[name])))
            for name, row in plan.linears.items()
        )
        refuse_each(reasons, self.name)
        refuse_split_groups(plan, fused, self.name)

    def bits(self, row: LayerPlan, shape: tuple[int, int]) -> int:
        """A byte a weight, and 32 bits a block."""
        return bits_of(_layout(shape))

    def encode(self, layer: QuantLayer, row: LayerPlan, dtype: str) -> dict[str, Tensor]:
        """Codes and scales as they are; `dtype` does not matter."""
        scale = layer.weight.scale
        assert scale is not None and layer.input is None
        return {"weight": layer.weight.codes.contiguous(), "weight_scale_inv": scale.codes.contiguous()}

    def decode(self, tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantLayer:
        """The inverse of `encode`. Raises CheckpointError for tensors that are not of this row and shape."""
        scheme = row.weight
        assert scheme is not None and scheme.scale is not None
        stored = tensors.get("weight_scale_inv")
        if stored is not None and stored.dtype in (torch.bfloat16, torch.float16):
            tensors = {**tensors, "weight_scale_inv": stored.float()}
        found = {name: take(tensors, name, *place) for name, place in _layout(shape).items()}
        scale = QuantTensor(scheme.scale, scheme.blocks(shape), found["weight_scale_inv"])
        return QuantLayer(QuantTensor(scheme, shape, found["weight"], scale))

    def decode_input(self, tensors: Mapping[str, Tensor], row: LayerPlan) -> StaticScale | None:
        """None: nothing is static."""
        return None

    def config(self, plan: Plan) -> dict[str, Any]:
        """The scheme, and the names of what is kept, with the modules of experts that are."""
        kept = [name for name, row in plan.linears.items() if row.weight is None]
        experts = [f"{name.partition(part)[0]}{part[:-1]}" for name in kept for part in EXPERTS if part in name]
        named = list(dict.fromkeys((*kept, *experts)))
        return {"quant_method": METHOD, **_SAID, "fmt": _UNSAID["fmt"], "modules_to_not_convert": named}

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """The inverse of `config`, and other writers' where they have the same scheme. Raises FormatError for the rest.

        The dtype is what `config` holds under "dtype" (put there config.json's own), else bf16. Folded rotations and an untied
        head are in the weights and cannot be told.
        """
        told = {key: config.get(key) for key in _SAID} | {key: config.get(key, value) for key, value in _UNSAID.items()}
        if told != _SAID | _UNSAID:
            shown = ", ".join(f"{key} {value!r}" for key, value in told.items())
            raise FormatError(
                f"fp8 with {shown} is not read here as codes: activation_scheme 'dynamic', weight_block_size [128, 128], fmt "
                "'e4m3' and scale_fmt 'float' are. Load it with transformers or vLLM"
            )
        long = config.get("dtype", "bfloat16")
        if long not in DTYPE_NAMES:
            raise FormatError(f"the model's dtype is {long}; a plan's is bfloat16 or float16. Load it with transformers")
        names = _kept_names(config)
        rows = {name: LayerPlan() if name in HEADS or _is_kept(name, names) else _ROW for name in linears}
        return Plan.model_validate({"linears": rows, "dtype": DTYPE_NAMES[long]})


def _kept_names(config: Mapping[str, Any]) -> list[str]:
    """Modules that a configuration leaves out, by either name of the list."""
    return list(config.get("modules_to_not_convert") or config.get("ignored_layers") or ())


def _is_kept(linear: str, names: list[str]) -> bool:
    """Whether one of the modules `names` is the linear, or holds it, by its whole name or the end of one."""
    return any(f".{name}." in f".{linear}." for name in names)


def _reason(row: LayerPlan) -> str | None:
    """Why the format cannot hold a row, with the way out; None when it can."""
    if row.weight is None:
        return None if row.input is None else f"a kept weight with activations {described(row.input)}: keep both"
    if (row.weight, row.input) != (_ROW.weight, _ROW.input):
        what = name_of(row.weight, row.input)
        return f"{what}: its readers have blocks of 128 x 128 and round activations in groups of 128; choose {_NAME}"
    if row.clip != 1:
        return f"{_NAME} with {row.clip:g} of the range of its activations: readers take the whole of it; use --act-clip 1"
    return None


def _misfit(shape: tuple[int, int]) -> str | None:
    """Why a quantized matrix of `shape` cannot be held; None when it can."""
    rows, columns = shape
    if columns % _SIDE:
        return f"{_NAME}: {columns} inputs are no multiple of {_SIDE}; keep it"
    if rows > _SIDE and rows % _SIDE:
        return f"{_NAME}: {rows} outputs are no multiple of {_SIDE}, and transformers would cut them into other blocks; keep it"
    return None


def _layout(shape: tuple[int, int]) -> Layout:
    blocks = (ceil(shape[0] / _SIDE), ceil(shape[1] / _SIDE))
    return {"weight": (torch.float8_e4m3fn, shape), "weight_scale_inv": (torch.float32, blocks)}
