"""compressed-tensors, the format of its own library, of transformers and of vLLM (quant_method "compressed-tensors").

The configuration is built from the library's own types. How the library decodes and runs, and so what is refused here (read in
its version 0.20, and tested against it):

    pack-, int-, float-quantized        in the dtype of the scales, which transformers holds in the dtype of the model: 16-bit
                                        scales of another dtype than the plan's would be cast on the way in
    mxfp4-pack-, nvfp4-pack-quantized,  always in bf16: a model that runs in fp16 would be given bf16 weights
    mxfp8-quantized
    pack-quantized with zero points     by transformers only while it loads, only by one scheme for all, and then it drops what
                                        the configuration says of activations (see `config`)
    activations                         as numerics/activation.py has them; of a clipped range only where the scale is static,
                                        for then the scale alone says it
    experts                             as linears, one by one; see ct_experts.py
    names                               as vLLM looks for them too; what it makes of them is retold in tests/vllm_rules.py
    rotations                           folded ones are in the weights; of those online see ct_rotations.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.utils.match import match_name
from pydantic import ValidationError
from torch import Tensor

from bitlathe.errors import FormatError
from bitlathe.formats.base import Container, QuantLayer
from bitlathe.formats.ct_experts import first_experts, named, refuse_experts
from bitlathe.formats.ct_rotations import online_of, reason_against, transforms_of
from bitlathe.formats.ct_schemes import FIXED, PACKED, dtype_of, input_arguments, layout_of, row_of, weight_arguments
from bitlathe.formats.ct_tensors import WORD, decode_input, decode_weight, encode_input, encode_weight, layout_of_weight, same
from bitlathe.formats.stored import HEADS, bits_of, refuse_each, refuse_split_groups, some
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.scheme import GRIDS, described, name_of, static
from bitlathe.plan import LayerPlan, Plan

METHOD = "compressed-tensors"
MIXED = CompressionFormat.mixed_precision


class CompressedTensors:
    """compressed-tensors: weights, activations, and rotations that run online with a Hadamard matrix of a power of two."""

    name = "compressed-tensors"
    dtype: ClassVar[Literal["bf16", "fp16"] | None] = None
    container: Container | None = None

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError for what the library has no layout for, or would decode or run as other numbers than ours."""
        if not plan.quantized:
            raise FormatError("compressed-tensors cannot hold a plan that quantizes nothing: write the dense format instead")
        _refuse_beyond_linears(plan)
        _refuse_tables(plan, shapes)
        reasons: dict[str, str | None] = {}
        for name, row in plan.linears.items():
            why = _reason(row, plan.dtype) or (None if row.weight is None else _misfit(row, shapes[name]))
            reasons[name] = why and f"{_named(row)}: {why}"
        refuse_each(reasons.items(), self.name, mark=":")
        _refuse_zero_points(plan)
        refuse_experts(plan)
        refuse_split_groups(plan, fused, self.name)

    def bits(self, row: LayerPlan, shape: tuple[int, int]) -> int:
        """Those of the library's tensors; codes fill whole words, and a packed weight has its shape beside it."""
        return bits_of(layout_of_weight(row, shape))

    def encode(self, layer: QuantLayer, row: LayerPlan, dtype: str) -> dict[str, Tensor]:
        """The library's tensors of a linear."""
        assert static(row.input) == (layer.input is not None)
        tensors = encode_weight(layer.weight, row)
        assert same(decode_weight(tensors, row, layer.weight.shape), layer.weight)
        if layer.input is not None and row.input is not None:
            tensors |= encode_input(layer.input, row.input)
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantLayer:
        """The inverse of `encode`. Raises CheckpointError for tensors that are not of this row and shape."""
        return QuantLayer(decode_weight(tensors, row, shape), self.decode_input(tensors, row))

    def decode_input(self, tensors: Mapping[str, Tensor], row: LayerPlan) -> StaticScale | None:
        """The static scale of a row's activations, None for a row without. Raises CheckpointError like `decode`."""
        return decode_input(tensors, row.input)

    def config(self, plan: Plan) -> dict[str, Any]:
        """A group for each scheme: of all linears when there is one, of their names when there are more."""
        groups: dict[LayerPlan, list[str]] = {}
        for name, row in plan.linears.items():
            if (reason := _reason(row, plan.dtype)) is not None:
                raise FormatError(f"compressed-tensors cannot hold {name}, {_named(row)}: {reason}")
            if row.weight is not None:
                groups.setdefault(LayerPlan(weight=row.weight, input=row.input), []).append(name)
        groups = first_experts(groups)
        formats = {layout_of(row) for row in groups}
        config = QuantizationConfig(
            config_groups={
                f"group_{index}": _group(row, named(names, plan) if len(groups) > 1 else _all_of(names))
                for index, (row, names) in enumerate(groups.items())
            },
            format=(MIXED if len(formats) != 1 else formats.pop()).value,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=named((name for name, row in plan.linears.items() if row.weight is None), plan),
        ).model_dump(mode="json")
        if (transforms := transforms_of(plan)) is not None:
            config["transform_config"] = transforms
        # How transformers loads lazily has no place for packed zero points, and stops at their shape; how it dequantizes while
        # it loads has. That way decodes every linear by the first group, which is why `check` wants one scheme.
        if any(_packs_zero_points(row) for row in groups):
            config["dequantize"] = True
        return config

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """The inverse of `config`; other writers' configurations are read as far as a plan can say what they say.

        What is in the weights or in static scales cannot be told from them: folded rotations, an untied head, clipped ranges.
        The plan's dtype is what the configuration gives for its scales, else what `config` holds under "dtype" (put there
        config.json's own: the library writes it nowhere else), else bf16. Raises FormatError for the rest.
        """
        known = {key: value for key, value in config.items() if key in QuantizationConfig.model_fields}
        try:
            stored = QuantizationConfig.model_validate(known)
        except (ValidationError, ValueError, NotImplementedError, KeyError) as error:
            raise FormatError(f"the compressed-tensors library does not accept the quantization_config: {error}") from error
        _refuse_beyond_plans(config, stored)
        groups = [group for group in stored.config_groups.values() if isinstance(group, QuantizationScheme)]
        dtype = dtype_of(config, groups)
        read = {id(group): row_of(group, stored.format, dtype) for group in groups}
        online = online_of(config["transform_config"], linears) if config.get("transform_config") else {}
        rows = {}
        for name in linears:
            group = None if _matches(name, stored.ignore or []) else _group_of(name, groups)
            row = LayerPlan() if group is None else read[id(group)]
            rows[name] = row.model_copy(update={"online": online.get(name)})
        rotations = tuple(dict.fromkeys(online.values()))
        return Plan.model_validate({"linears": rows, "dtype": dtype, "rotations": rotations})


def _all_of(names: list[str]) -> list[str]:
    """The targets of the only group, whose linears are `names`. vLLM does not count output heads among linears, so the class
    does not name them to it."""
    return ["Linear", *(name for name in names if name in HEADS)]


def _group(row: LayerPlan, targets: list[str]) -> QuantizationScheme:
    assert row.weight is not None
    return QuantizationScheme(
        targets=targets,
        weights=weight_arguments(row.weight),
        input_activations=None if row.input is None else input_arguments(row.input),
        format=layout_of(row),
    )


def _named(row: LayerPlan) -> str:
    if row.weight is not None:
        return name_of(row.weight, row.input)
    return "a kept weight" if row.input is None else f"a kept weight with activations {described(row.input)}"


def _reason(row: LayerPlan, dtype: str) -> str | None:
    """Why the library cannot hold a row of a plan of this dtype, with the way out; None when it can."""
    if row.online is not None and (reason := reason_against(row.online)) is not None:
        return reason
    if row.weight is None:
        return None if row.input is None else "activations are quantized only beside a quantized weight; keep both or none"
    if weight_arguments(row.weight) is None or (row.input is not None and input_arguments(row.input) is None):
        return "the library has no layout for it; choose another scheme"
    if row.weight in FIXED.values() and dtype != "bf16":
        return "the library decodes it in bf16 and the plan's dtype is fp16; use --dtype bf16"
    for scheme in (row.weight, row.input):
        grid = None if scheme is None or scheme in FIXED.values() or scheme.scale is None else scheme.scale.grid
        if grid not in (None, dtype.upper()):
            return f"its scales are {grid} and readers would cast them to the plan's {dtype}; use scales of the plan's dtype"
    if row.clip != 1 and row.input is not None and row.input.block != (0, 0):
        return f"readers make the scales of its activations of their whole range, not of {row.clip:g} of it; use --act-clip 1"
    return None


def _misfit(row: LayerPlan, shape: tuple[int, int]) -> str | None:
    """Why a matrix of `shape` cannot be stored by a row that the library knows; None when it can."""
    assert row.weight is not None
    rows, columns = shape
    for scheme in (row.weight, row.input):
        if scheme is not None and not scheme.fits(shape):
            return f"{columns} inputs are no multiple of {scheme.block[1]}; choose one scale a row (_CHANNEL), or keep it"
    if layout_of(row) != PACKED:
        return None
    bits = GRIDS[row.weight.grid].bits
    if columns * bits % WORD:
        return f"a row of {columns} codes does not fill whole 32-bit words, as serving engines need; keep it"
    if row.weight.asymmetric and rows * bits % WORD:
        return f"a column of {rows} zero points does not fill whole 32-bit words, as serving engines need; keep it"
    return None


def _packs_zero_points(row: LayerPlan) -> bool:
    return row.weight is not None and row.weight.asymmetric and layout_of(row) == PACKED


def _refuse_beyond_linears(plan: Plan) -> None:
    if plan.kv is not None:
        raise FormatError(
            f"compressed-tensors cannot hold a cache of keys and values in {described(plan.kv)}: its own schemes for one have "
            "fixed scales. Leave out --kv, or write the native format, which can"
        )
    if any(rotation.space == "qk" for rotation in plan.rotations):
        raise FormatError(
            "compressed-tensors cannot hold R3, the rotation of queries and keys: transformers would not run it. Leave R3 out "
            "of --rotate, or write the native format, which can"
        )


def _refuse_tables(plan: Plan, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise FormatError for quantized embeddings. shapes: of the linears."""
    tables = [name for name in plan.quantized if name not in shapes]
    if tables:
        raise FormatError(
            f"compressed-tensors cannot hold quantized embeddings ({some(tables)}): its readers run its schemes on linears. "
            f"Keep them in 16 bits, give the head a weight of its own with --rotate R1, or write the native format"
        )


def _refuse_zero_points(plan: Plan) -> None:
    """Raise FormatError for packed zero points beside anything that transformers then loses."""
    asymmetric = [name for name, row in plan.linears.items() if _packs_zero_points(row)]
    rounded = [name for name, row in plan.linears.items() if row.input is not None]
    if asymmetric and len(set(plan.quantized.values())) > 1:
        raise FormatError(
            f"compressed-tensors cannot hold zero points beside other schemes ({some(asymmetric)}): transformers reads "
            "them only where all linears share one scheme. Choose symmetric schemes, one for all, or the native format"
        )
    if asymmetric and rounded:
        raise FormatError(
            f"compressed-tensors cannot hold zero points of weights ({some(asymmetric)}) with quantized activations: the way "
            "in which transformers reads them keeps the activations as they are. Choose symmetric weights, or the native format"
        )


def _refuse_beyond_plans(config: Mapping[str, Any], stored: QuantizationConfig) -> None:
    beyond = [key for key in ("sparsity_config", "kv_cache_scheme") if config.get(key)]
    for group in stored.config_groups.values():
        if isinstance(group, QuantizationScheme) and group.output_activations is not None:
            beyond.append("output_activations")
    if beyond:
        raise FormatError(
            f"the quantization_config has {', '.join(dict.fromkeys(beyond))}, which plans of this version cannot say, so "
            "the model would not be the one that was made. Load the folder with its own reader"
        )


def _matches(name: str, targets: list[str]) -> bool:
    return any(target == "Linear" or match_name(name, target) for target in targets)


def _group_of(name: str, groups: list[QuantizationScheme]) -> QuantizationScheme | None:
    """The group of a linear as the library chooses it: exact names first, then regular expressions, then the class."""
    targets = {target: group for group in reversed(groups) for target in reversed(group.targets)}
    for target in sorted(targets, key=lambda target: (target == "Linear", "re:" in target, target)):
        if _matches(name, [target]):
            return targets[target]
    return None
