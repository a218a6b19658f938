"""GPTQ, the format of GPTQModel, of transformers with it, and of vLLM (quant_method "gptq").

Integers of 2, 3, 4 and 8 bits in groups of inputs or one scale a row; `dynamic` names linears that have another scheme than
most ("+:") and those that are kept ("-:"), by regular expressions. Symmetric codes are stored in the first version of the
layout (checkpoint_format "gptq"), asymmetric ones in the second ("gptq_v2"), see words.py; one file has one version, so a plan
has one kind. Weights only, scales in fp16; a folded rotation is in the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bitlathe.errors import FormatError
from bitlathe.formats.stored import HEADS, most_of, refuse_beyond_weights, refuse_rows, refuse_split_groups
from bitlathe.formats.words import V1, V2, WIDTHS, InWords, Words, bits_of_codes, misfit, reason_against
from bitlathe.numerics.scheme import Scheme
from bitlathe.plan import LayerPlan, Plan

METHOD = "gptq"
_VERSIONS: dict[Words, str] = {V1: "gptq", V2: "gptq_v2"}


class Gptq(InWords):
    """GPTQ: integers of 2, 3, 4 and 8 bits, for GPTQModel, transformers and vLLM."""

    name = "gptq"

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError for what the layout or the configuration has no words for."""
        refuse_beyond_weights(plan, shapes, HEADS, self.name)
        refuse_rows(plan, shapes, self.name, lambda scheme, shape: reason_against(scheme) or misfit(scheme, shape))
        refuse_two_kinds(plan, self.name)
        refuse_split_groups(plan, fused, self.name)

    def words(self, scheme: Scheme) -> Words:
        """The first version where zero points are the middle of the grid, otherwise the second."""
        return V2 if scheme.asymmetric else V1

    def config(self, plan: Plan) -> dict[str, Any]:
        """What most linears have, and in `dynamic` the others by their names."""
        most = most_of(plan)
        kept = kept_by_name(plan)
        others = {f"+:^{re.escape(name)}$": facts_of(scheme) for name, scheme in plan.quantized.items() if scheme != most}
        return {
            "quant_method": METHOD,
            **facts_of(most),
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "checkpoint_format": _VERSIONS[self.words(most)],
            **({"dynamic": kept | others} if kept or others else {}),
        }

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """The inverse of `config`, and other writers' where a plan can say what they say. Raises FormatError for the rest."""
        if config.get("lm_head"):
            raise FormatError("its output head is quantized by GPTQ, which is not read here. Load it with GPTQModel")
        dynamic = config.get("dynamic") or {}
        rows = {}
        for name in linears:
            found = _override(dynamic, name)
            kept = found is None or name in HEADS
            rows[name] = LayerPlan() if kept else LayerPlan(weight=scheme_of({**config, **(found or {})}, self.name))
        plan = Plan(linears=rows, dtype="fp16")
        refuse_two_kinds(plan, self.name)
        version, wanted = config.get("checkpoint_format", "gptq"), _VERSIONS[self.words(most_of(plan))]
        if version != wanted:
            raise FormatError(
                f"its checkpoint_format is {version!r} with sym {config.get('sym')}; what is read here is symmetric in 'gptq' "
                "and asymmetric in 'gptq_v2'. GPTQModel converts one into the other"
            )
        return plan


def refuse_two_kinds(plan: Plan, format_name: str) -> None:
    """Raise FormatError for symmetric linears beside asymmetric ones."""
    kinds = {scheme.asymmetric: name for name, scheme in plan.quantized.items()}
    if len(kinds) > 1:
        raise FormatError(
            f"{format_name} cannot hold zero points ({kinds[True]}) beside symmetric schemes ({kinds[False]}): how zero points "
            "are stored is said once for all linears. Choose one kind for all, or the native format"
        )


def kept_by_name(plan: Plan) -> dict[str, dict[str, Any]]:
    """What `dynamic` says of the linears that are kept; of heads it says nothing."""
    return {f"-:^{re.escape(name)}$": {} for name, row in plan.linears.items() if row.weight is None and name not in HEADS}


def facts_of(scheme: Scheme) -> dict[str, Any]:
    """What configurations of this family say of a scheme."""
    return {"bits": bits_of_codes(scheme), "group_size": scheme.block[1] or -1, "sym": not scheme.asymmetric}


def scheme_of(facts: Mapping[str, Any], format_name: str, widths: tuple[int, ...] = WIDTHS) -> Scheme:
    """The inverse of `facts_of`. Raises FormatError for a width or a group that is not read."""
    bits, size, sym = facts.get("bits"), facts.get("group_size"), facts.get("sym", True)
    if bits not in widths or not isinstance(size, int) or not isinstance(sym, bool) or size == 0 or size < -1:
        raise FormatError(
            f"{format_name} with bits {bits!r}, group_size {size!r}, sym {sym!r} is not read here: bits are one of "
            f"{', '.join(map(str, widths))}, a group is a number of inputs or -1. Load it with the program that made it"
        )
    block = (1, 0 if size == -1 else size)
    return Scheme(grid=f"INT{bits}", block=block, scale=Scheme(grid="FP16"), asymmetric=not sym)


def _override(dynamic: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What `dynamic` says of a linear, by its first pattern that matches; None where it is kept."""
    for pattern, found in dynamic.items():
        if re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, name):
            return None if pattern.startswith("-:") else found
    return {}
