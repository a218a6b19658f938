"""Which schemes of compressed-tensors vLLM has a class and a kernel for. What was read is told in vllm_rules.py.

Asked of one NVIDIA GPU of compute capability 8.9 or later, whichever it is: what only some of them run is refused. Shapes are
not asked for, nor sizes of groups of integers, of which 32, 64 and 128 run everywhere.

That a class takes activations is not that its kernel rounds them. The kernels that integers of 4 and 8 bits get first, Machete
and Marlin, keep them in 16 bits whatever the configuration says; so do those of MXFP4, MXFP8 and NVFP4 before Blackwell. On
Blackwell those of MXFP8, and of MXFP4 in 0.33, round them even where the configuration keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP8, NAIVE = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "naive-quantized"
# Formats of which vLLM takes it that activations are quantized too, unless the weights are floats.
ROUNDING = (NAIVE, INT, FLOAT, NVFP4)


@dataclass(frozen=True)
class Version:
    """What differs between versions of vLLM.

    experts: the class of a block's experts. widths: of packed integers. humming: the Humming kernels come with it, and with
    them quantized activations beside packed integers, and zero points of experts. early: a target that is the name of a class
    goes before the names of the parts of a fused module; so do, in the ignore list, its parts before a pattern of its own name;
    and a linear that no target names stops the start, where later it is kept in 16 bits.
    """

    experts: str
    widths: tuple[int, ...]
    humming: bool
    early: bool


VERSIONS = {
    "0.20.0": Version(experts="FusedMoE", widths=(4, 8), humming=False, early=True),
    "0.33.0": Version(experts="RoutedExperts", widths=(2, 3, 4, 5, 6, 7, 8), humming=True, early=False),
}


@dataclass(frozen=True)
class Group:
    """What a config group says of its linears. format: how they are stored, the group's own or the configuration's."""

    weights: QuantizationArgs
    inputs: QuantizationArgs | None
    format: str


Fits = Callable[[Group, Version], bool]


def refusal(group: Group, version: Version, *, kind: str) -> str | None:
    """Why vLLM has nothing that runs a group's linears as a module of the class `kind`; None when it has."""
    experts = kind == "RoutedExperts"
    name = next((name for name, fits in (EXPERTS if experts else LINEARS) if fits(group, version)), None)
    if name is None:
        return f"no class takes {shown(group)}{' in experts' if experts else ''}"
    if name == "WNA16" and group.weights.num_bits not in version.widths:
        return f"the class {name} takes {', '.join(map(str, version.widths))} bits, and these have {group.weights.num_bits}"
    if name == "WNA16" and not (group.weights.symmetric or group.weights.num_bits == 4 or version.humming):
        return "zero points of 8 bits, which only a kernel of Hopper GPUs takes"
    if name == "WNA16" and experts and group.weights.strategy == "channel" and version.humming:
        return "experts with one scale a row: the Humming kernels, which Hopper GPUs prefer, take groups only"
    if kind == "ParallelLMHead" and group.weights.strategy == "block":
        return "a head in square blocks: its loader wants one row of scales for each row of the vocabulary"
    return None


def holds(group: Group) -> bool:
    """Whether weights like these can be stored in the group's format at all."""
    weights, integers = group.weights, group.weights.type == "int"
    return {
        PACKED: integers,
        INT: integers,
        NAIVE: weights.num_bits == 8,
        FLOAT: not integers and weights.num_bits == 8 and weights.strategy in ("tensor", "channel", "block"),
        NVFP4: _nvfp4(weights),
        MXFP4: _mx(weights, 4),
        MXFP8: _mx(weights, 8) and weights.scale_dtype == torch.uint8,
    }.get(group.format, False)


def shown(group: Group) -> str:
    """A group in a few words."""
    return f"{_words(group.weights)} with activations {'kept' if group.inputs is None else _words(group.inputs)}"


def _words(arguments: QuantizationArgs) -> str:
    extent = f" of {arguments.group_size}" if arguments.group_size else ""
    marks = ("" if arguments.symmetric else ", asymmetric") + (", dynamic" if arguments.dynamic else "")
    said = arguments.model_dump(mode="json")
    return f"{said['type']}{arguments.num_bits} a {said['strategy']}{extent}{marks}"


def _is(arguments: QuantizationArgs | None, kind: str, bits: int, strategies: Sequence[str]) -> bool:
    if arguments is None:
        return False
    return (arguments.type, arguments.num_bits) == (kind, bits) and arguments.strategy in strategies


def _nvfp4(arguments: QuantizationArgs | None) -> bool:
    return arguments is not None and _is(arguments, "float", 4, ["tensor_group"]) and arguments.group_size == 16


def _mx(weights: QuantizationArgs, bits: int) -> bool:
    return _is(weights, "float", bits, ["group"]) and weights.group_size == 32


def _takes_nvfp4(group: Group, _: Version) -> bool:
    return _nvfp4(group.weights) and (group.inputs is None or _nvfp4(group.inputs))


def _takes_mxfp4(group: Group, _: Version) -> bool:
    return _mx(group.weights, 4)


def _takes_mxfp8(group: Group, _: Version) -> bool:
    return _mx(group.weights, 8) and group.weights.scale_dtype == torch.uint8


def _packed(group: Group) -> bool:
    return group.format == PACKED and group.weights.type == "int" and group.weights.strategy in ("channel", "group")


def _takes_packed(group: Group, _: Version) -> bool:
    return _packed(group) and group.inputs is None


def _takes_packed_experts(group: Group, version: Version) -> bool:
    return _takes_packed(group, version) and (group.weights.symmetric or version.humming)


def _takes_rounded(group: Group, version: Version) -> bool:
    inputs = group.inputs
    if inputs is None or not (version.humming and _packed(group)):
        return False
    suits = any(_is(inputs, "int", bits, ["token", "group"]) for bits in (4, 8))
    return suits and inputs.symmetric and inputs.dynamic is True


def _takes_fp8(group: Group, _: Version) -> bool:
    fits = _is(group.weights, "float", 8, ["tensor", "channel", "block"]) and group.format in ROUNDING
    static = group.inputs is not None and not group.inputs.dynamic
    return fits and not (static and group.weights.strategy == "block")


def _takes_fp8_experts(group: Group, version: Version) -> bool:
    inputs = group.inputs
    if inputs is None or inputs.type != "float" or not _takes_fp8(group, version):
        return False
    pair = (group.weights.strategy, inputs.strategy)
    return pair == ("tensor", "tensor") or (bool(inputs.dynamic) and (pair == ("channel", "token") or pair[0] == "block"))


def _takes_int8(group: Group, _: Version) -> bool:
    inputs = group.inputs
    if inputs is None or group.format not in ROUNDING or not group.weights.symmetric:
        return False
    extent = "token" if inputs.dynamic else "tensor"
    return _is(group.weights, "int", 8, ["tensor", "channel"]) and _is(inputs, "int", 8, [extent])


def _takes_int8_experts(group: Group, version: Version) -> bool:
    dynamic = group.inputs is not None and bool(group.inputs.dynamic)
    return dynamic and _takes_int8(group, version) and group.weights.strategy == "channel"


# The first that fits is taken.
LINEARS: tuple[tuple[str, Fits], ...] = (
    ("W4A4Fp4", _takes_nvfp4),
    ("W4A4Mxfp4", _takes_mxfp4),
    ("W8A8Mxfp8", _takes_mxfp8),
    ("WNA8Int or WNA4Int", _takes_rounded),
    ("WNA16", _takes_packed),
    ("W8A8Fp8 or W8A16Fp8", _takes_fp8),
    ("W8A8Int8", _takes_int8),
)
EXPERTS: tuple[tuple[str, Fits], ...] = (
    ("W4A4Mxfp4", _takes_mxfp4),
    ("W8A8Mxfp8", _takes_mxfp8),
    ("WNA16", _takes_packed_experts),
    ("W4A4Nvfp4", _takes_nvfp4),
    ("W8A8Fp8", _takes_fp8_experts),
    ("W8A8Int8", _takes_int8_experts),
)
