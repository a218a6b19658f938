"""auto-round, the format of that package and of transformers with it (quant_method "auto-round").

Integers of 2, 3, 4 and 8 bits; `extra_config` names the linears that have another scheme than most, and those that are kept.
The layouts are those of GPTQ and AWQ (words.py), and packing_format says which, once for all linears: "auto_round:auto_gptq"
for symmetric codes, "auto_round:auto_awq" for asymmetric ones of 4 bits, "auto_round" for asymmetric ones of other widths.
Weights only, scales in fp16; a folded rotation is in the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from bitlathe.errors import FormatError
from bitlathe.formats.base import QuantLayer
from bitlathe.formats.gptq import HEADS, facts_of, most_of, refuse_two_kinds, scheme_of
from bitlathe.formats.stored import bits_of, refuse_beyond_weights, refuse_rows, refuse_split_groups
from bitlathe.formats.words import AWQ, V1, V2, Words, bits_of_codes, decode, encode, layout_of, misfit, reason_against
from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.scheme import Scheme
from bitlathe.plan import LayerPlan, Plan

METHOD = "auto-round"
# The version of the package that this was checked against.
_VERSION = "0.16.1"
_PACKING: dict[Words, str] = {V1: "auto_round:auto_gptq", AWQ: "auto_round:auto_awq", V2: "auto_round"}
_KEPT = 16  # bits, at which the package keeps a linear


class AutoRound:
    """auto-round: integers of 2, 3, 4 and 8 bits, mixed, for that package through transformers."""

    name = "auto-round"
    dtype: ClassVar[Literal["bf16", "fp16"] | None] = "fp16"

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError for what the layout or the configuration has no words for."""
        refuse_beyond_weights(plan, shapes, HEADS, self.name)
        refuse_rows(plan, shapes, self.name, lambda scheme, shape: reason_against(scheme) or misfit(scheme, shape))
        refuse_two_kinds(plan, self.name)
        _packing(plan)
        refuse_split_groups(plan, fused, self.name)

    def bits(self, row: LayerPlan, shape: tuple[int, int]) -> int:
        """Those of codes, scales and zero points, which symmetric schemes have too."""
        assert row.weight is not None
        return bits_of(layout_of(row.weight, shape, _words(row.weight)))

    def encode(self, layer: QuantLayer, row: LayerPlan, dtype: str) -> dict[str, Tensor]:
        """See words.py."""
        return encode(layer.weight, _words(layer.weight.scheme))

    def decode(self, tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantLayer:
        """The inverse of `encode`. Raises CheckpointError for tensors that are not of this row and shape."""
        assert row.weight is not None
        return QuantLayer(decode(tensors, row.weight, shape, _words(row.weight)))

    def decode_input(self, tensors: Mapping[str, Tensor], row: LayerPlan) -> StaticScale | None:
        """None: activations are not quantized."""

    def config(self, plan: Plan) -> dict[str, Any]:
        """What most linears have, and in `extra_config` the others by their names."""
        most = most_of(plan)
        kept = {name: {"bits": _KEPT, "data_type": "float"} for name, row in plan.linears.items() if row.weight is None}
        others = {name: facts_of(scheme) for name, scheme in plan.quantized.items() if scheme != most}
        return {
            "quant_method": METHOD,
            **facts_of(most),
            "data_type": "int",
            "packing_format": _packing(plan),
            "autoround_version": _VERSION,
            "block_name_to_quantize": _blocks(plan),
            "extra_config": {name: (kept | others)[name] for name in plan.linears if name in kept | others},
        }

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """The inverse of `config`, and what the package writes, where a plan can say it. Raises FormatError for the rest."""
        if config.get("data_type", "int") != "int" or (config.get("act_bits") or _KEPT) < _KEPT:
            raise FormatError(
                f"auto-round with data_type {config.get('data_type')!r} and act_bits {config.get('act_bits')!r} is not read "
                "here: integers with activations in 16 bits are. Load it with the auto-round package"
            )
        extra, blocks = config.get("extra_config") or {}, config.get("block_name_to_quantize") or ""
        prefixes = tuple(f"{block.strip()}." for block in (blocks.split(",") if isinstance(blocks, str) else blocks) if block)
        rows = {}
        for name in linears:
            found = next((told for key, told in extra.items() if key == name or re.fullmatch(key, name)), {})
            outside = name in HEADS or (prefixes and not name.startswith(prefixes))
            kept = found.get("bits") == _KEPT or (outside and not found)
            rows[name] = LayerPlan() if kept else LayerPlan(weight=scheme_of({**config, **found}, self.name))
        plan = Plan(linears=rows, dtype="fp16")
        refuse_two_kinds(plan, self.name)
        if config.get("packing_format") != _packing(plan):
            raise FormatError(
                f"auto-round with packing_format {config.get('packing_format')!r} is not read here: of these schemes it is "
                f"{_packing(plan)!r}. Load it with the auto-round package"
            )
        return plan


def _words(scheme: Scheme) -> Words:
    if not scheme.asymmetric:
        return V1
    return AWQ if bits_of_codes(scheme) == 4 else V2


def _packing(plan: Plan) -> str:
    """packing_format. Raises FormatError where linears would need different ones."""
    found: dict[Words, str] = {_words(scheme): name for name, scheme in plan.quantized.items()}
    if len(found) > 1:
        raise FormatError(
            f"auto-round cannot hold {' and '.join(found.values())} side by side: asymmetric codes of 4 bits are packed "
            "differently than others, and that is said once for all linears. Choose one width, symmetric schemes, or the "
            "native format"
        )
    return _PACKING[next(iter(found))]


def _blocks(plan: Plan) -> str:
    """The path of the blocks that the quantized linears are in."""
    (first, *_) = plan.quantized
    return re.split(r"\.\d+\.", first)[0]
