"""A plan as a file to read, to edit, and to give to `quantize`: the fields of a recipe that say it, one linear a line.

dtype: bf16
rotate: [R1, R2, R4]
linears:
  model.layers.0.self_attn.q_proj: W4A16
  model.layers.0.self_attn.k_proj: W4A16
  ...
  lm_head: keep
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bitlathe.errors import OutputError, PlanError, RecipeError
from bitlathe.io.files import replace_file
from bitlathe.numerics.scheme import KV_SCHEMES, PRESETS, Scheme, name_of
from bitlathe.plan import KEEP, ROTATION_NAMES, LayerPlan, Plan
from bitlathe.recipe import read_yaml
from bitlathe.turns import ROTATIONS

# What a plan file may say; the rest of a recipe is not the plan's.
_FIELDS = ("dtype", "rotate", "rotation_block", "rotation_seed", "act_asymmetric", "act_clip", "kv", "linears")
# What in a recipe says the same in another way.
_SAME = {"scheme", "overrides", "bits", "schemes", "include", "groups", "rotation_trials"}


def fields_of(plan: Plan) -> dict[str, Any]:
    """The fields of a recipe that say a plan. Raises PlanError for a plan that they cannot say."""
    rounded = [row for row in plan.linears.values() if row.input is not None]
    asymmetric = any(row.input.asymmetric for row in rounded if row.input is not None)
    fields: dict[str, Any] = {"dtype": plan.dtype}
    if plan.rotations:
        fields |= _rotations(plan)
    if asymmetric:
        fields["act_asymmetric"] = True
    if clips := {row.clip for row in rounded} - {1.0}:
        fields["act_clip"] = min(clips)
    if plan.kv is not None:
        known = {scheme.served_in(plan.dtype): name for name, scheme in KV_SCHEMES.items()}
        fields["kv"] = known.get(plan.kv, "")
    return fields | {"linears": {name: _name(name, row) for name, row in plan.linears.items()}}


def write_plan(path: Path, plan: Plan, told: str) -> None:
    """Write a plan's file, all of it or nothing. told: a line to put in front."""
    head = (
        f"# {told}\n# bitlathe quantize MODEL --plan {path.name} --out DIR\n"
        f"# Linears that engines run as one (q, k, v; gate, up; a block's experts) share one scheme; '{KEEP}' is 16 bits.\n"
    )
    text = yaml.safe_dump(fields_of(plan), sort_keys=False, default_flow_style=False, width=1000)
    replace_file(path, (head + text).encode())


def refuse_files(out: Path | None, budgets: Sequence[float]) -> list[Path]:
    """The files that the plans for some budgets (bits a weight) will be: `out`, or for several one each, with the bits in its
    name; none without `out`. Raises OutputError for a folder that is not there, and for a file that is."""
    if out is None:
        return []
    several = len(budgets) > 1
    files = [out.with_name(f"{out.stem}-{bits:g}{out.suffix}") if several else out for bits in budgets]
    if not out.parent.is_dir():
        raise OutputError(f"the folder {out.parent} of --out is not there: make it, or choose another one")
    for file in files:
        if file.exists():
            raise OutputError(f"{file} is there already, perhaps edited: choose another name for --out, or remove it")
    return files


def read_plan(path: Path | str) -> dict[str, Any]:
    """The fields that a plan's file gives, not checked yet. Raises RecipeError for a file that is no plan's."""
    fields = read_yaml(path)
    strange = [name for name in fields if name not in _FIELDS]
    if strange or not isinstance(fields.get("linears"), dict):
        what = f"has {', '.join(strange)}" if strange else "has no linears, each with its scheme"
        raise RecipeError(
            f"{str(path)!r} is no plan: it {what}. A plan has {', '.join(_FIELDS)} and nothing else; bitlathe search writes "
            "one. A recipe is given as --recipe"
        )
    return fields


def refuse_both(planned: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise RecipeError where a plan's fields and others of the same run say the same thing twice."""
    twice = [name for name in given if planned and (name in _SAME or name in _FIELDS)]
    if twice:
        raise RecipeError(
            f"the plan says what {', '.join(twice)} would: it was made for its own rotations, schemes and dtype. Leave "
            f"{'it' if len(twice) == 1 else 'them'} out, or search again"
        )


def _name(linear: str, row: LayerPlan) -> str:
    if row.weight is None:
        return KEEP
    plain: Scheme | None = row.input and row.input.model_copy(update={"asymmetric": False})
    for name in (name_of(row.weight, row.input), name_of(row.weight, plain)):
        if name in PRESETS:
            return name
    raise PlanError(
        f"{linear} has {name_of(row.weight, row.input)}, a scheme without a name, which no recipe can ask for. Use one that "
        "`bitlathe list schemes` names"
    )


def _rotations(plan: Plan) -> dict[str, Any]:
    names = [ROTATION_NAMES[rotation.space] for rotation in plan.rotations]
    kinds = [
        name if rotation.kind == ROTATIONS[name].kind else f"{name}:{rotation.kind}"
        for name, rotation in zip(names, plan.rotations, strict=True)
    ]
    # Heads are turned whole where they are smaller than the block that was asked for.
    whole = [rotation for rotation in plan.rotations if rotation.space in ("residual", "mid")]
    blocks = {rotation.block for rotation in whole or plan.rotations}
    fields: dict[str, Any] = {"rotate": kinds}
    if len(blocks) == 1:
        fields["rotation_block"] = blocks.pop()
    if any(rotation.kind == "random" for rotation in plan.rotations):
        fields["rotation_seed"] = next(rotation.seed for rotation in plan.rotations if rotation.kind == "random")
    return fields
