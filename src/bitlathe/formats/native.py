"""The lossless format: codes as they are, and the plan in config.json (quant_method "bitlathe").

Every tensor of a quantized linear is a flat stream of bits. `weight` holds the codes, `weight_zero` the zero points,
`weight_scale` the codes of the scales, and so on down (`weight_scale_scale`). Integers and E2M1 are packed densely, low bits
first, each row padded to a byte, symmetric integers with 2^(bits-1) added; E8M0 and E4M3 are bytes; 16- and 32-bit floats are
their bit patterns as int16 and int32, because loaders cast floats to the dtype they are asked for. `input_scale` and
`input_zero` are one number each, what is static of the linear's activations.

The configuration is the plan, each of its different rows once. Its format_version is the least that says the plan: 1 says
schemes of weights, 2 adds activations, rotations, and the scheme of a cache, 3 minima and scales of a fixed dtype
(`weight_minimum`, stored like scales).

A loader that does not know the quant_method must not run the model. transformers only warns about one it does not know, and
fills weights it does not find with random numbers; but it stops at a `weight` of another shape than the linear's. So the codes
carry that name, and the stream is flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from bitlathe.errors import FormatError
from bitlathe.formats.base import Container, QuantLayer
from bitlathe.formats.stored import Layout, bits_of, some, take
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.bits import pack, unpack
from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import GRIDS, Grid, Scheme, static
from bitlathe.plan import LayerPlan, Plan

METHOD = "bitlathe"
VERSIONS = (1, 2, 3)

# Grids whose codes are machine words: dtype of the codes in memory, dtype of the same bits in the file.
WORDS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "E4M3": (torch.float8_e4m3fn, torch.uint8),
    "E8M0": (torch.uint8, torch.uint8),
    "BF16": (torch.bfloat16, torch.int16),
    "FP16": (torch.float16, torch.int16),
    "FP32": (torch.float32, torch.int32),
}


class _Group(BaseModel):
    """The linears of one row. scheme: of its weight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: Scheme | None = None
    input: Scheme | None = None
    clip: float = 1.0
    online: Rotation | None = None
    linears: list[str]

    def row(self) -> LayerPlan:
        return LayerPlan(weight=self.scheme, input=self.input, clip=self.clip, online=self.online)


class _Config(BaseModel):
    """What config.json holds under "quantization_config"; a plan with each different row once."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # other programs add keys of their own

    quant_method: str
    format_version: int
    dtype: str
    groups: list[_Group]
    kept: list[str]
    rotations: list[Rotation] = []
    kv: Scheme | None = None
    untied: bool = False


class Native:
    """The lossless format; it holds every plan."""

    name = "native"
    dtype: ClassVar[Literal["bf16", "fp16"] | None] = None
    container: Container | None = None

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Nothing is refused."""

    def encode(self, layer: QuantLayer, row: LayerPlan, dtype: str) -> dict[str, Tensor]:
        """The streams of a linear; `dtype` does not matter."""
        assert static(row.input) == (layer.input is not None)
        tensors = _encode(layer.weight, "weight")
        if layer.input is not None:
            tensors["input_scale"] = layer.input.scale.view(_static_word(row)[1])
            if layer.input.zero is not None:
                tensors["input_zero"] = layer.input.zero.view(torch.uint8)
        return tensors

    def bits(self, row: LayerPlan, shape: tuple[int, int]) -> int:
        """Those of the streams that begin with "weight"."""
        assert row.weight is not None
        return bits_of(_layout(row.weight, shape, "weight"))

    def layout(self, row: LayerPlan, shape: tuple[int, int]) -> Layout:
        """Name, dtype and shape of what `encode` gives for a linear of `shape` with a scheme of weights."""
        assert row.weight is not None
        layout = _layout(row.weight, shape, "weight")
        if row.input is not None and static(row.input):
            layout["input_scale"] = (_static_word(row)[1], (1,))
            if row.input.asymmetric:
                layout["input_zero"] = (torch.uint8, (1,))
        return layout

    def decode(self, tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantLayer:
        """The inverse of `encode`. Raises CheckpointError for tensors that are not of this row and shape."""
        assert row.weight is not None
        return QuantLayer(_decode(tensors, "weight", row.weight, shape), self.decode_input(tensors, row))

    def decode_input(self, tensors: Mapping[str, Tensor], row: LayerPlan) -> StaticScale | None:
        """The static scale of a row's activations, None for a row without. Raises CheckpointError like `decode`."""
        if row.input is None or not static(row.input):
            return None
        held, word = _static_word(row)
        scale = take(tensors, "input_scale", word, (1,)).view(held)
        zero = take(tensors, "input_zero", torch.uint8, (1,)).view(torch.int8) if row.input.asymmetric else None
        return StaticScale(scale, zero)

    def config(self, plan: Plan) -> dict[str, Any]:
        """The plan, each different row once."""
        groups: dict[LayerPlan, list[str]] = {}
        for name, row in plan.linears.items():
            groups.setdefault(row, []).append(name)
        kept = groups.pop(LayerPlan(), [])
        more = plan.rotations or plan.kv or plan.untied or any(row != LayerPlan(weight=row.weight) for row in groups)
        return {
            "quant_method": METHOD,
            "format_version": 3 if any(scheme.reader_bound for scheme in plan.quantized.values()) else 2 if more else 1,
            "dtype": plan.dtype,
            "groups": [_group(row, names) for row, names in groups.items()],
            "kept": kept,
            "rotations": [rotation.model_dump(mode="json") for rotation in plan.rotations],
            **({} if plan.kv is None else {"kv": plan.kv.model_dump(mode="json", exclude_defaults=True)}),
            **({"untied": True} if plan.untied else {}),
        }

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """The inverse of `config`. Raises FormatError for another version's config, or one of another model."""
        if config.get("quant_method") != METHOD or config.get("format_version") not in VERSIONS:
            raise FormatError(
                f"this is quant_method {config.get('quant_method')!r}, format_version {config.get('format_version')!r}; this "
                f"program reads {METHOD!r}, versions {', '.join(map(str, VERSIONS))}. Use the version of bitlathe that "
                "wrote the folder"
            )
        try:
            stored = _Config.model_validate(dict(config))
            rows = {name: group.row() for group in stored.groups for name in group.linears}
            rows |= {name: LayerPlan() for name in stored.kept}
            said = stored.model_dump(include={"dtype", "rotations", "kv", "untied"})
            plan = Plan.model_validate({"linears": rows, **said})
        except ValidationError as error:
            raise FormatError(
                f"the quantization_config is damaged: {error.errors()[0]['msg']} at "
                f"{'.'.join(map(str, error.errors()[0]['loc']))}. Take the config.json that was written with the weights"
            ) from error
        there = set(linears)
        strange = [name for name in linears if name not in rows] + [name for name in rows if name not in there]
        if strange:
            raise FormatError(
                f"the quantization_config and the model do not have the same linears: {some(strange)}. "
                "Take the config.json that was written with the weights"
            )
        return plan.model_copy(update={"linears": {name: plan.linears[name] for name in linears}})


def _group(row: LayerPlan, names: list[str]) -> dict[str, Any]:
    """What a configuration says of a row's linears."""
    said = row.model_dump(mode="json", exclude_defaults=True)
    scheme = {"scheme": said.pop("weight")} if "weight" in said else {}
    return scheme | said | {"linears": names}


def _static_word(row: LayerPlan) -> tuple[torch.dtype, torch.dtype]:
    """Dtype of the static scale of a row's activations, in memory and in the file."""
    assert row.input is not None and row.input.scale is not None
    return WORDS[row.input.scale.grid if row.input.block == (0, 0) else "FP32"]


def _encode(q: QuantTensor, name: str) -> dict[str, Tensor]:
    grid = GRIDS[q.scheme.grid]
    tensors = {name: _stream(q.codes, grid, asymmetric=q.scheme.asymmetric)}
    if q.zero is not None:
        tensors[f"{name}_zero"] = _stream(q.zero, grid, asymmetric=True)
    for part, held in (("scale", q.scale), ("minimum", q.minimum)):
        tensors |= {} if held is None else _encode(held, f"{name}_{part}")
    return tensors


def _layout(scheme: Scheme, shape: tuple[int, int], name: str) -> Layout:
    grid, blocks = GRIDS[scheme.grid], scheme.blocks(shape)
    layout: Layout = {name: _place(grid, shape)}
    if scheme.asymmetric:
        layout[f"{name}_zero"] = _place(grid, blocks)
    for part, held in (("scale", scheme.scale), ("minimum", scheme.minimum)):
        layout |= {} if held is None else _layout(held, blocks, f"{name}_{part}")
    return layout


def _place(grid: Grid, shape: tuple[int, int]) -> tuple[torch.dtype, tuple[int]]:
    """Dtype and length of the stream of codes [rows, columns]."""
    rows, columns = shape
    if grid.name in WORDS:
        return WORDS[grid.name][1], (rows * columns,)
    return torch.uint8, (rows * ceil(columns * grid.bits / 8),)


def _decode(tensors: Mapping[str, Tensor], name: str, scheme: Scheme, shape: tuple[int, int]) -> QuantTensor:
    grid = GRIDS[scheme.grid]
    blocks = scheme.blocks(shape)
    return QuantTensor(
        scheme=scheme,
        shape=shape,
        codes=_codes(tensors, name, grid, shape, asymmetric=scheme.asymmetric),
        scale=None if scheme.scale is None else _decode(tensors, f"{name}_scale", scheme.scale, blocks),
        zero=_codes(tensors, f"{name}_zero", grid, blocks, asymmetric=True) if scheme.asymmetric else None,
        minimum=None if scheme.minimum is None else _decode(tensors, f"{name}_minimum", scheme.minimum, blocks),
    )


def _stream(codes: Tensor, grid: Grid, *, asymmetric: bool) -> Tensor:
    """Codes [rows, columns] as they lie in the file, flat."""
    if grid.name in WORDS:
        return codes.contiguous().view(WORDS[grid.name][1]).flatten()
    if grid.kind == "int" and not (asymmetric or grid.unsigned):
        codes = codes.view(torch.uint8) + 2 ** (grid.bits - 1)  # wraps, so that -2^(bits-1) becomes 0
    return pack(codes, grid.bits).flatten()


def _codes(tensors: Mapping[str, Tensor], name: str, grid: Grid, shape: tuple[int, int], *, asymmetric: bool) -> Tensor:
    stream = take(tensors, name, *_place(grid, shape))
    if grid.name in WORDS:
        return stream.view(WORDS[grid.name][0]).view(shape)
    codes = unpack(stream.view(shape[0], -1), grid.bits, columns=shape[1])
    if grid.kind == "int" and not (asymmetric or grid.unsigned):
        codes = (codes - 2 ** (grid.bits - 1)).view(torch.int8)
    return codes
