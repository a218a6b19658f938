"""GGUF, llama.cpp's format: a weight is a matrix of blocks of bytes, and the whole model one file.

While a run goes on the stream holds `weight`, uint8 [outputs, bytes a row], of every linear under its own name; at the end
`model.gguf` is made of it (`gguf_file`). Beside it config.json says which linear is of which type, for our own reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bitlathe.errors import FormatError
from bitlathe.formats.base import Container, QuantLayer
from bitlathe.formats.gguf_blocks import bytes_a_row, decode, encode, type_of
from bitlathe.formats.gguf_file import GgufFile
from bitlathe.formats.stored import some, take
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.scheme import LLAMA_CPP, name_of
from bitlathe.plan import LayerPlan, Plan

METHOD = "gguf"


class Gguf:
    """llama.cpp's block types, in one file."""

    name = "gguf"
    dtype: ClassVar[Literal["bf16", "fp16"] | None] = None
    container: Container | None = GgufFile()

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError for schemes that are not llama.cpp's, rows that are no whole blocks, and what happens to inputs or
        to a cache. Fused linears may differ: llama.cpp runs each by itself."""
        known = ", ".join(LLAMA_CPP)
        beyond = [name for name, row in plan.linears.items() if row.input is not None or row.online is not None]
        if beyond:
            raise FormatError(
                f"gguf cannot hold what happens to the inputs of {some(beyond)}: llama.cpp neither rounds nor turns them as "
                "the plan says. Take a scheme of weights alone and leave online rotations out, or write the native format"
            )
        if plan.kv is not None or any(rotation.space == "qk" for rotation in plan.rotations):
            raise FormatError(
                "gguf cannot hold the scheme of a cache, nor R3: llama.cpp is told how to keep its cache when it runs. Leave "
                "out --kv and R3, or write the native format"
            )
        strange = [name for name, scheme in plan.quantized.items() if type_of(scheme) is None]
        if strange:
            raise FormatError(
                f"gguf cannot hold {name_of(plan.quantized[strange[0]])}, the scheme of {some(strange)}. Choose one "
                f"of {known}, or write another format"
            )
        ragged = [name for name, scheme in plan.quantized.items() if name in shapes and not scheme.fits(shapes[name])]
        if ragged:
            scheme = plan.quantized[ragged[0]]
            raise FormatError(
                f"{name_of(scheme)} is for rows of whole blocks of {scheme.run}, which the inputs of {some(ragged)} are not. "
                "Give them a type of 32, such as Q4_0, Q5_0 or Q8_0, with an override, or keep them"
            )

    def bits(self, row: LayerPlan, shape: tuple[int, int]) -> int:
        """Those of the blocks."""
        return 8 * shape[0] * bytes_a_row(_type(row), shape[1])

    def encode(self, layer: QuantLayer, row: LayerPlan, dtype: str) -> dict[str, Tensor]:
        """The blocks; `dtype` does not matter."""
        return {"weight": encode(_type(row), layer.weight)}

    def decode(self, tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantLayer:
        """The inverse of `encode`. Raises CheckpointError for tensors that are not of this row and shape."""
        name = _type(row)
        packed = take(tensors, "weight", torch.uint8, (shape[0], bytes_a_row(name, shape[1])))
        return QuantLayer(decode(name, packed, shape[1]))

    def decode_input(self, tensors: Mapping[str, Tensor], row: LayerPlan) -> StaticScale | None:
        """None: inputs are as they are."""
        return None

    def config(self, plan: Plan) -> dict[str, Any]:
        """The type of every linear, and what is kept."""
        types: dict[str, list[str]] = {}
        for name, scheme in plan.quantized.items():
            types.setdefault(name_of(scheme), []).append(name)
        kept = [name for name in plan.linears if name not in plan.quantized]
        rotations = [rotation.model_dump(mode="json") for rotation in plan.rotations]
        said = {"rotations": rotations} if rotations else {}
        untied = {"untied": True} if plan.untied else {}
        return (
            {"quant_method": METHOD, "file": GgufFile.file, "dtype": plan.dtype, "types": types, "kept": kept} | said | untied
        )

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """The inverse of `config`. Raises FormatError for a config of another model, or one that is damaged."""
        types = config.get("types", {})
        unknown = [name for name in types if name not in LLAMA_CPP]
        rows = {linear: LayerPlan(weight=LLAMA_CPP[name]) for name in types if name in LLAMA_CPP for linear in types[name]}
        rows |= {linear: LayerPlan() for linear in config.get("kept", [])}
        there = set(linears)
        strange = [name for name in (*linears, *rows) if (name in rows) != (name in there)]
        if unknown or strange:
            raise FormatError(
                f"the quantization_config and the model do not have the same linears and types: {some([*unknown, *strange])}. "
                "Take the config.json that was written with the weights"
            )
        said = {key: config[key] for key in ("dtype", "rotations", "untied") if key in config}
        return Plan.model_validate({"linears": {name: rows[name] for name in linears}, **said})


def _type(row: LayerPlan) -> str:
    name = type_of(row.weight)
    assert name is not None
    return name
