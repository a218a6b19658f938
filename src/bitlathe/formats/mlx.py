"""Affine quantization of Apple's MLX, as mlx-lm writes and reads it.

A linear is `weight`, uint32 [outputs, inputs * bits / 32], each row one little-endian stream of codes, low bits first, at 3, 5
and 6 bits too; and `scales` and `biases` [outputs, inputs / group] in the model's dtype. A weight is scale * code + bias.

A bias is a 16-bit number. That of a symmetric scheme, -scale * 2^(bits-1), is a power of two times the scale, and exact. That
of an integer zero point, -scale * zero, would be rounded in general, and the model another one than was measured; such schemes
are refused.

How close readers come (mlx 0.32 on a CPU, measured over random scales and every code): they round scale * code to the dtype of
the scales, then the sum with the bias, where our product is rounded once. The two differ by up to 2^-7 of the group's largest
number, 2^(bits-1) * scale, in bf16, and by up to 2^-10 of it in fp16: one step of the dtype at that number.

The configuration is read by mlx-lm under "quantization", and stands under "quantization_config" too, as mlx-lm writes it. It
names every linear that is not stored as most are. mlx-lm stacks experts, and in some families (qwen3_moe, read in its version
0.32) their weights alone, so that codes would lose their scales; quantized experts are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bitlathe.errors import CheckpointError, FormatError
from bitlathe.formats.base import Container, QuantLayer
from bitlathe.formats.stored import DTYPE_NAMES, EXPERTS, Layout, bits_of, most_of, refuse_each, refuse_split_groups, take
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.bits import pack, unpack
from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.scheme import GRIDS, Scheme, described, name_of
from bitlathe.plan import LayerPlan, Plan

METHOD = "mlx"
DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16}
_GRIDS = tuple(f"INT{bits}" for bits in (2, 3, 4, 5, 6, 8))
_GROUPS = (32, 64, 128)
_WORD = 32


class Mlx:
    """Symmetric integers in groups of 32, 64 or 128, mixed freely; embeddings too."""

    name = "mlx"
    dtype: ClassVar[Literal["bf16", "fp16"] | None] = None
    container: Container | None = None

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError for what is no symmetric integer in a group, and for all that happens while a model runs."""
        if not plan.quantized:
            raise FormatError("mlx cannot hold a plan that quantizes nothing: write the dense format instead")
        if plan.kv is not None:
            raise FormatError(
                f"mlx cannot hold a cache of keys and values in {described(plan.kv)}: its readers choose their own. Leave out "
                "--kv, or write the native format, which can"
            )
        if any(rotation.space == "qk" for rotation in plan.rotations):
            raise FormatError(
                "mlx cannot hold R3, the rotation of queries and keys: mlx-lm would not run it. Leave R3 out of --rotate, or "
                "write the native format, which can"
            )
        refuse_each(((name, _reason(name, row, plan.dtype)) for name, row in plan.linears.items()), self.name, mark=":")
        refuse_split_groups(plan, fused, self.name)

    def bits(self, row: LayerPlan, shape: tuple[int, int]) -> int:
        """Codes, and two numbers of 16 bits a group."""
        return bits_of(_layout(row, shape))

    def encode(self, layer: QuantLayer, row: LayerPlan, dtype: str) -> dict[str, Tensor]:
        """MLX's tensors. Raises FormatError for a scale whose bias no 16-bit number is large enough for."""
        q = layer.weight
        assert q.scale is not None and layer.input is None
        bits, scales = GRIDS[q.scheme.grid].bits, q.scale.codes.contiguous()
        biases = _biases(scales, bits)
        if not torch.isfinite(biases).all():
            raise FormatError(
                f"mlx cannot hold a group whose scale is {scales.abs().max().item():g}: {dtype} cannot say its bias. "
                "Use --dtype bf16, or write the native format"
            )
        codes = q.codes.view(torch.uint8) + 2 ** (bits - 1)  # wraps, so that -2^(bits-1) becomes 0
        codes = codes & 2**bits - 1
        return {"weight": pack(codes, bits).view(torch.uint32), "scales": scales, "biases": biases}

    def decode(self, tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantLayer:
        """The inverse of `encode`. Raises CheckpointError for tensors that are not of this row and shape, and for biases that
        no symmetric scheme has."""
        scheme = row.weight
        assert scheme is not None and scheme.scale is not None
        found = {name: take(tensors, name, *place) for name, place in _layout(row, shape).items()}
        bits, scales = GRIDS[scheme.grid].bits, found["scales"]
        if not torch.equal(found["biases"], _biases(scales, bits)):
            raise CheckpointError(
                f"the biases are not -{2 ** (bits - 1)} times the scales: what mlx-lm quantized itself has biases of its own, "
                "which no scheme here has. Load the folder with mlx-lm, or quantize the original model"
            )
        codes = unpack(found["weight"].contiguous().view(torch.uint8), bits, columns=shape[1])
        codes = (codes - 2 ** (bits - 1)).view(torch.int8)
        return QuantLayer(QuantTensor(scheme, shape, codes, QuantTensor(scheme.scale, scheme.blocks(shape), scales)))

    def decode_input(self, tensors: Mapping[str, Tensor], row: LayerPlan) -> StaticScale | None:
        """None: nothing is static."""
        return None

    def config(self, plan: Plan) -> dict[str, Any]:
        """What most linears have, and by name what the others have: False for one that is kept."""
        common = most_of(plan)
        others = {name: row.weight for name, row in plan.linears.items() if row.weight != common}
        named = {name: scheme is not None and _said(scheme) for name, scheme in others.items()}
        return {"quant_method": METHOD, **_said(common), **named}

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """The inverse of `config`, and what mlx-lm writes.

        The dtype is what `config` holds under "dtype" (put there config.json's own), else bf16. Folded rotations and an untied
        head are in the weights and cannot be told. Raises FormatError for other quantizations than affine ones.
        """
        long = config.get("dtype", "bfloat16")
        if long not in DTYPE_NAMES:
            raise FormatError(f"the model's dtype is {long}; a plan's is bfloat16 or float16. Load the folder with mlx-lm")
        dtype = DTYPE_NAMES[long]
        rows = {name: LayerPlan(weight=_scheme(config.get(name, config), dtype)) for name in linears}
        return Plan.model_validate({"linears": rows, "dtype": dtype})


def _reason(name: str, row: LayerPlan, dtype: str) -> str | None:
    """Why MLX cannot hold the row of a linear in a plan of this dtype, with the way out; None when it can."""
    scheme = row.weight
    if row.online is not None:
        return "a rotation that runs online, and mlx-lm would not run it; leave R4 out of --rotate"
    if row.input is not None:
        return f"activations in {described(row.input)}, and mlx-lm keeps them in 16 bits; quantize weights alone"
    if scheme is None:
        return None
    if any(experts in name for experts in EXPERTS):
        return "a quantized expert, whose scales mlx-lm would lose; keep experts in 16 bits with an override"
    if scheme.asymmetric:
        return f"{name_of(scheme)}: scale times zero point is no 16-bit number in general; use a symmetric scheme"
    if scheme.grid not in _GRIDS or scheme.block[0] != 1 or scheme.block[1] not in _GROUPS:
        return f"{name_of(scheme)}: MLX has integers in groups of 32, 64 or 128; use W4A16G64 or another of these"
    if scheme.scale != Scheme(grid=dtype.upper()):
        return f"{name_of(scheme)} with scales that are not of the plan's {dtype}; use scales of the plan's dtype"
    return None


def _biases(scales: Tensor, bits: int) -> Tensor:
    """What makes codes from 0 to 2^bits - 1 symmetric; exact where it is finite."""
    return scales * -float(2 ** (bits - 1))


def _layout(row: LayerPlan, shape: tuple[int, int]) -> Layout:
    scheme = row.weight
    assert scheme is not None and scheme.scale is not None
    words, scales = shape[1] * GRIDS[scheme.grid].bits // _WORD, (DTYPES[scheme.scale.grid], scheme.blocks(shape))
    return {"weight": (torch.uint32, (shape[0], words)), "scales": scales, "biases": scales}


def _said(scheme: Scheme) -> dict[str, Any]:
    """A scheme in MLX's words."""
    return {"group_size": scheme.block[1], "bits": GRIDS[scheme.grid].bits, "mode": "affine"}


def _scheme(said: Any, dtype: str) -> Scheme | None:
    """The inverse of `_said`; None for False. Raises FormatError for what is no scheme here."""
    if said is False:
        return None
    words = said if isinstance(said, Mapping) else {}
    bits, group, mode = words.get("bits"), words.get("group_size"), words.get("mode", "affine")
    if f"INT{bits}" not in _GRIDS or group not in _GROUPS or mode != "affine":
        raise FormatError(
            f"the quantization has {bits} bits in groups of {group}, mode {mode!r}, which this program does not read. Load the "
            "folder with mlx-lm"
        )
    return Scheme(grid=f"INT{bits}", block=(1, group), scale=Scheme(grid=dtype.upper()))
