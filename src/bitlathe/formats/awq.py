"""AWQ, the format of AutoAWQ, read by GPTQModel, transformers and vLLM (quant_method "awq", version "gemm").

Integers of 4 bits with a zero point, one scheme for all linears; those of `modules_to_not_convert` are kept. Weights only,
scales in fp16; a folded rotation is in the weights. Its readers run zero points in any case, so symmetric schemes are for
GPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitlathe.errors import FormatError
from bitlathe.formats.gptq import facts_of, kept_by_name, scheme_of
from bitlathe.formats.stored import HEADS, refuse_beyond_weights, refuse_rows, some
from bitlathe.formats.words import AWQ, InWords, Words, misfit, reason_against
from bitlathe.numerics.scheme import Scheme, name_of
from bitlathe.plan import LayerPlan, Plan

METHOD = "awq"


class Awq(InWords):
    """AWQ: integers of 4 bits with zero points, for vLLM, transformers and GPTQModel."""

    name = "awq"

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError for what the layout or the configuration has no words for."""
        refuse_beyond_weights(plan, shapes, HEADS, self.name)
        refuse_rows(plan, shapes, self.name, _reason)
        schemes = dict.fromkeys(plan.quantized.values())
        if len(schemes) > 1:
            raise FormatError(
                f"awq cannot hold {' and '.join(map(name_of, schemes))}: it has one scheme for all linears. Choose one for "
                "all, or the native format, or gptq, which has one for each"
            )
        _refuse_parts(plan)

    def words(self, scheme: Scheme) -> Words:
        """AWQ's own."""
        return AWQ

    def config(self, plan: Plan) -> dict[str, Any]:
        """The scheme, and the names of what is kept."""
        facts = facts_of(next(iter(plan.quantized.values())))
        return {
            "quant_method": METHOD,
            "version": "gemm",
            "bits": facts["bits"],
            "group_size": facts["group_size"],
            "zero_point": True,
            "modules_to_not_convert": [name for name, row in plan.linears.items() if row.weight is None],
            # GPTQModel reads what is kept here, and not there.
            "dynamic": kept_by_name(plan),
        }

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """The inverse of `config`. Raises FormatError for another version of the layout."""
        told = (config.get("bits"), str(config.get("version", "gemm")).lower(), config.get("zero_point", True))
        if told != (4, "gemm", True):
            raise FormatError(
                f"awq with bits {told[0]!r}, version {told[1]!r}, zero_point {told[2]!r} is not read here: 4, 'gemm' and True "
                "are. Load it with the program that made it"
            )
        row = LayerPlan(weight=scheme_of({**config, "sym": False}, self.name))
        kept = list(config.get("modules_to_not_convert") or ())
        return Plan(
            linears={name: LayerPlan() if name in HEADS or any(part in name for part in kept) else row for name in linears},
            dtype="fp16",
        )


def _reason(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    if not scheme.asymmetric:
        return "its readers run zero points; choose the same scheme with _ASYM, or the format gptq"
    return reason_against(scheme, widths=(4,)) or misfit(scheme, shape)


def _refuse_parts(plan: Plan) -> None:
    """Raise FormatError where the name of what is kept is a part of the name of what is not: readers look for parts."""
    kept = [name for name, row in plan.linears.items() if row.weight is None]
    astray = [name for name in plan.quantized if any(part in name for part in kept)]
    if astray:
        raise FormatError(f"awq cannot keep {some(kept)} beside {some(astray)}, whose names hold theirs. Use the native format")
