"""auto-round, the format of that package and of transformers with it (quant_method "auto-round").

Integers of 2 to 6 and 8 bits; `extra_config` names the linears that have another scheme than most, and those that are kept.
The layout is GPTQ's without indices (words.py), and packing_format says which, once for all linears: "auto_round:auto_gptq"
for symmetric codes, "auto_round" for asymmetric ones, whose zero points are stored as they are. The package writes asymmetric
codes of 4 bits as AWQ does ("auto_round:auto_awq"); such folders are read, and not written, because no reader of it runs on a
CPU: the format awq has the same tensors. Weights only, scales in fp16; a folded rotation is in the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bitlathe.errors import FormatError
from bitlathe.formats.base import QuantLayer
from bitlathe.formats.gptq import facts_of, refuse_two_kinds, scheme_of
from bitlathe.formats.stored import HEADS, most_of, refuse_beyond_weights, refuse_rows, refuse_split_groups
from bitlathe.formats.words import AWQ, InWords, Words, bits_of_codes, decode, misfit, reason_against
from bitlathe.numerics.scheme import Scheme
from bitlathe.plan import LayerPlan, Plan

METHOD = "auto-round"
# The version of the package that this was checked against.
_VERSION = "0.16.1"
_SYMMETRIC, _ASYMMETRIC = Words(less=1), Words()
_PACKING: dict[Words, str] = {_SYMMETRIC: "auto_round:auto_gptq", _ASYMMETRIC: "auto_round", AWQ: "auto_round:auto_awq"}
_WIDTHS = (2, 3, 4, 5, 6, 8)
_KEPT = 16  # bits, at which the package keeps a linear


class AutoRound(InWords):
    """auto-round: integers of 2 to 6 and 8 bits, mixed, for that package through transformers."""

    name = "auto-round"

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError for what the layout or the configuration has no words for."""
        refuse_beyond_weights(plan, shapes, HEADS, self.name)
        refuse_rows(plan, shapes, self.name, _reason)
        refuse_two_kinds(plan, self.name)
        refuse_split_groups(plan, fused, self.name)

    def words(self, scheme: Scheme) -> Words:
        """GPTQ's without indices."""
        return _ASYMMETRIC if scheme.asymmetric else _SYMMETRIC

    def decode(self, tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantLayer:
        """The inverse of `encode`, and of how the package writes asymmetric codes of 4 bits. Raises CheckpointError for tensors
        that are not of this row and shape."""
        assert row.weight is not None
        codes = tensors.get("qweight")
        if row.weight.asymmetric and bits_of_codes(row.weight) == 4 and codes is not None and len(codes) == shape[1]:
            return QuantLayer(decode(tensors, row.weight, shape, AWQ))
        return super().decode(tensors, row, shape)

    def config(self, plan: Plan) -> dict[str, Any]:
        """What most linears have, and in `extra_config` the others by their names."""
        most = most_of(plan)
        kept = {name: {"bits": _KEPT, "data_type": "float"} for name, row in plan.linears.items() if row.weight is None}
        others = {name: facts_of(scheme) for name, scheme in plan.quantized.items() if scheme != most}
        return {
            "quant_method": METHOD,
            **facts_of(most),
            "data_type": "int",
            "packing_format": _PACKING[self.words(most)],
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
            rows[name] = LayerPlan() if kept else LayerPlan(weight=scheme_of({**config, **found}, self.name, _WIDTHS))
        plan = Plan(linears=rows, dtype="fp16")
        refuse_two_kinds(plan, self.name)
        found = config.get("packing_format")
        in_fours = {bits_of_codes(scheme) for scheme in plan.quantized.values()} == {4}
        across = found == _PACKING[AWQ] and in_fours and most_of(plan).asymmetric
        if not across and found != _PACKING[self.words(most_of(plan))]:
            raise FormatError(
                f"auto-round with packing_format {found!r} is not read here: of these schemes it is "
                f"{_PACKING[self.words(most_of(plan))]!r}. Load it with the auto-round package"
            )
        return plan


def _reason(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    return reason_against(scheme, _WIDTHS) or misfit(scheme, shape)


def _blocks(plan: Plan) -> str:
    """The path of the blocks that the quantized linears are in."""
    (first, *_) = plan.quantized
    return re.split(r"\.\d+\.", first)[0]
