"""The layouts of GPTQ and AWQ: 32-bit words of codes, zero points beside, scales in fp16, [inputs, outputs].

Three formats store linears in them and differ in what their configurations say. `V1` and `V2` are GPTQ's (codes packed along
the inputs, zero points along the outputs), in which a zero point is stored less 1, or as it is. GPTQ's readers add the 1 to
whole words, so that a zero point of 0, stored as the largest code, would carry into its neighbour: only symmetric codes, whose
zero point is the middle one, are stored in the first. `AWQ` packs both along the outputs, eight columns to a word in an order
of its own.

Symmetric codes are stored with the middle of the grid added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bitlathe.errors import CheckpointError
from bitlathe.formats.base import Container, QuantLayer
from bitlathe.formats.stored import Layout, bits_of, take
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.bits import pack, unpack
from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.scheme import GRIDS, Scheme
from bitlathe.plan import LayerPlan


@dataclass(frozen=True)
class Words:
    """A layout. less: what stored zero points are less by. across: both are packed along the outputs, as AWQ has it. indexed:
    the
    group of every input is stored too."""

    less: int = 0
    across: bool = False
    indexed: bool = False


V1 = Words(less=1, indexed=True)
V2 = Words(indexed=True)
AWQ = Words(across=True)

WORD = 32  # bits
WIDTHS = (2, 3, 4, 8)  # that readers have kernels for
# Which of a word's eight columns its nibbles hold, lowest first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def bits_of_codes(scheme: Scheme) -> int:
    """The width of a scheme's codes."""
    return GRIDS[scheme.grid].bits


def reason_against(scheme: Scheme, widths: tuple[int, ...] = WIDTHS) -> str | None:
    """Why a scheme of weights cannot be stored in words, with the way out; None when it can."""
    if GRIDS[scheme.grid].kind != "int" or bits_of_codes(scheme) not in widths:
        return f"readers have kernels for integers of {', '.join(map(str, widths))} bits; choose one of these"
    if scheme.block[0] != 1 or scheme.block[1] == 1 or scheme.scale is None or scheme.scale.scale is not None:
        return "there is a scale for a group of inputs, or for a row; choose such a scheme"
    if scheme.minimum is not None or scheme.scale.fixed:
        return "its layout is one of llama.cpp's; choose a scheme such as W4A16G32, or the format gguf"
    if scheme.scale.grid != "FP16":
        return f"readers hold scales in fp16, and its are {scheme.scale.grid}; quantize with --dtype fp16"
    return None


def misfit(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why a matrix of `shape` cannot be stored in words; None when it can."""
    rows, columns = shape
    for size, what in ((columns, "inputs"), (rows, "outputs")):
        if size * bits_of_codes(scheme) % WORD:
            return f"{size} {what} of {bits_of_codes(scheme)} bits do not fill whole 32-bit words; keep it"
    if not scheme.fits(shape):
        return f"{columns} inputs are no multiple of {scheme.block[1]}; choose one scale a row (_CHANNEL), or keep it"
    return None


def layout_of(scheme: Scheme, shape: tuple[int, int], words: Words) -> Layout:
    """Name, dtype and shape of what `encode` gives for a weight of `shape`, [outputs, inputs]."""
    rows, columns = shape
    groups, share = scheme.blocks(shape)[1], bits_of_codes(scheme)
    packed = (columns, rows * share // WORD) if words.across else (columns * share // WORD, rows)
    stored: Layout = {
        "qweight": (torch.int32, packed),
        "qzeros": (torch.int32, (groups, rows * share // WORD)),
        "scales": (torch.float16, (groups, rows)),
    }
    return stored | {"g_idx": (torch.int32, (columns,))} if words.indexed else stored


def encode(q: QuantTensor, words: Words) -> dict[str, Tensor]:
    """The words of a weight [outputs, inputs]."""
    bits, middle = bits_of_codes(q.scheme), 2 ** (bits_of_codes(q.scheme) - 1)
    assert q.scale is not None and (not words.less or q.zero is None)
    scales = q.scale.codes.T.contiguous()
    if q.zero is None:
        codes = q.codes.view(torch.uint8) + middle  # wraps, so that the lowest code becomes 0
        zeros = torch.full(scales.shape, middle - words.less, dtype=torch.uint8, device=scales.device)
    else:
        codes, zeros = q.codes, q.zero.T.contiguous()
    if words.across:
        return {"qweight": _pack(_ordered(codes.T, ORDER), 4), "qzeros": _pack(_ordered(zeros, ORDER), 4), "scales": scales}
    tensors = {"qweight": _pack(codes, bits).T.contiguous(), "qzeros": _pack(zeros, bits), "scales": scales}
    return tensors | {"g_idx": _groups(q.scheme, q.shape)} if words.indexed else tensors


def decode(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], words: Words) -> QuantTensor:
    """The inverse of `encode`. Raises CheckpointError for tensors that are not of this scheme and shape, for inputs in another
    order than the model's, and for zero points that a symmetric scheme does not have."""
    assert scheme.scale is not None
    found = {name: take(tensors, name, *place) for name, place in layout_of(scheme, shape, words).items()}
    rows, columns = shape
    bits, middle = bits_of_codes(scheme), 2 ** (bits_of_codes(scheme) - 1)
    if words.across:
        inverse = tuple(ORDER.index(column) for column in range(len(ORDER)))
        codes = _ordered(_unpack(found["qweight"], 4, rows), inverse).T
        zeros = _ordered(_unpack(found["qzeros"], 4, rows), inverse)
    else:
        if words.indexed and not torch.equal(found["g_idx"], _groups(scheme, shape).to(found["g_idx"].device)):
            raise CheckpointError(
                "its groups are not of inputs that follow each other (it was made with desc_act), which no scheme here says. "
                "Make it anew with desc_act off, or with static groups"
            )
        codes = _unpack(found["qweight"].T.contiguous(), bits, columns)
        zeros = _unpack(found["qzeros"], bits, rows)
    zero = None
    if scheme.asymmetric:
        zero = zeros.T.contiguous()
    elif not bool((zeros == middle - words.less).all()):
        raise CheckpointError(
            "its configuration says that it is symmetric, and its zero points are not the middle of the grid. The file does "
            "not belong to this config.json: fetch the folder again"
        )
    else:
        codes = (codes - middle).view(torch.int8)
    scale = QuantTensor(scheme.scale, scheme.blocks(shape), found["scales"].T.contiguous())
    return QuantTensor(scheme, shape, codes.contiguous(), scale, zero)


class InWords(ABC):
    """What formats whose linears are stored in words have in common."""

    dtype: ClassVar[Literal["bf16", "fp16"] | None] = "fp16"
    container: Container | None = None

    @abstractmethod
    def words(self, scheme: Scheme) -> Words:
        """The layout of linears of a scheme."""

    def bits(self, row: LayerPlan, shape: tuple[int, int]) -> int:
        """Those of codes, scales and zero points, which symmetric schemes have too, and of the groups' indices if stored."""
        assert row.weight is not None
        return bits_of(layout_of(row.weight, shape, self.words(row.weight)))

    def encode(self, layer: QuantLayer, row: LayerPlan, dtype: str) -> dict[str, Tensor]:
        """The words of a linear."""
        return encode(layer.weight, self.words(layer.weight.scheme))

    def decode(self, tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantLayer:
        """The inverse of `encode`. Raises CheckpointError for tensors that are not of this row and shape."""
        assert row.weight is not None
        return QuantLayer(decode(tensors, row.weight, shape, self.words(row.weight)))

    def decode_input(self, tensors: Mapping[str, Tensor], row: LayerPlan) -> StaticScale | None:
        """None: activations are not quantized."""
        return None


def _groups(scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """The group of every input."""
    return torch.arange(shape[1], dtype=torch.int32) // (scheme.block[1] or shape[1])


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] to words int32 [rows, columns * bits / 32], lowest bits first; some straddle two words."""
    return pack(codes.contiguous(), bits).view(torch.int32)


def _unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    return unpack(words.contiguous().view(torch.uint8), bits, columns=columns)


def _ordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Every eight columns in another order."""
    return codes.reshape(codes.shape[0], -1, len(order))[:, :, list(order)].reshape(codes.shape[0], -1)
