"""A plan as a file: it says the plan and nothing else, and says it again when it is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitlathe.errors import BitlatheError, OutputError, PlanError, RecipeError
from bitlathe.options import budgets_of
from bitlathe.plan import LayerPlan, Plan
from bitlathe.plan_file import fields_of, read_plan, refuse_both, refuse_files, write_plan
from bitlathe.prepare import prepare
from bitlathe.recipe import merge
from families import save_model

FIELDS: dict[str, dict[str, Any]] = {
    "weights": {"scheme": "W3A16G32", "overrides": {"*.o_proj": "W8A16_CHANNEL_ASYM", "*.layers.1.*": "keep"}},
    "activations": {"scheme": "W4A4", "overrides": {"*.o_proj": "W8A8"}, "act_asymmetric": True, "act_clip": 0.9},
    "whole rotations": {"scheme": "W4A4", "rotate": "R1,R2,R3,R4", "rotation_seed": 5, "kv": "KV4"},
    "blocks": {"scheme": "MXFP4", "rotate": "R1:hadamard,R2,R4:random", "rotation_block": 8},
    "heads alone": {"scheme": "W4A16G32", "rotate": "R2", "rotation_block": 8},
    "fp16": {"scheme": "W4A16G32", "dtype": "fp16"},
}


def planned(folder: Path, **fields: Any) -> Plan:
    return prepare(
        merge({"model": str(folder), "out": folder.parent / "q", "tuner": "rtn", "rtn": {"scale": "min-max"}, **fields})
    ).plan


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2_moe"])
@pytest.mark.parametrize("kind", FIELDS)
def test_a_plan_that_is_written_and_read_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    monkeypatch.setattr("bitlathe.prepare._calibration", lambda *_, **__: (None, ()))
    save_model(tmp_path / "m", family)
    plan = planned(tmp_path / "m", **FIELDS[kind])
    write_plan(tmp_path / "plan.yaml", plan, "why")
    assert (tmp_path / "plan.yaml").read_text().startswith("# why\n# bitlathe quantize MODEL --plan plan.yaml --out DIR\n")
    assert planned(tmp_path / "m", **read_plan(tmp_path / "plan.yaml")) == plan
    assert len(list(tmp_path.iterdir())) == 2  # the model, and nothing that was written aside


def test_it_is_one_line_a_linear_to_edit(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    write_plan(tmp_path / "plan.yaml", planned(tmp_path / "m", scheme="W4A16G32"), "why")
    text = (tmp_path / "plan.yaml").read_text()
    assert "\n  model.layers.1.mlp.down_proj: W4A16G32\n" in text
    edited = text.replace("model.layers.1.mlp.down_proj: W4A16G32", "model.layers.1.mlp.down_proj: bf16")
    (tmp_path / "plan.yaml").write_text(edited)
    assert planned(tmp_path / "m", **read_plan(tmp_path / "plan.yaml")).linears["model.layers.1.mlp.down_proj"] == LayerPlan()


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (("self_attn.q_proj: W4A16G32", "self_attn.q_proj: W8A16G32"), PlanError, "self_attn.qkv different schemes"),
        (("mlp.up_proj: W4A16G32", "mlp.up_proj: keep"), PlanError, "mlp.gate_up different schemes"),
        (("1.self_attn.o_proj:", "1.self_attn.oo_proj:"), PlanError, "Did you mean 'model.layers.1.self_attn.o_proj'?"),
        (("  model.layers.1.self_attn.o_proj: W4A16G32\n", ""), PlanError, "does not name model.layers.1.self_attn.o_proj"),
        (("1.self_attn.o_proj: W4A16G32", "1.self_attn.o_proj: W4A17"), RecipeError, "unknown scheme 'W4A17'"),
        (("1.self_attn.o_proj: W4A16G32", "1.self_attn.o_proj: W4A16"), PlanError, "128 inputs under one scale"),
        (("dtype: bf16", "dtype: bf16\ntuner: rtn"), RecipeError, "is no plan: it has tuner"),
        (("linears:", "linear:"), RecipeError, "is no plan: it has linear"),
        (("dtype: bf16\n", "dtype: bf16\nlinears: 3\n#"), RecipeError, "is no"),
    ],
)
def test_what_is_wrong_with_an_edited_plan_is_told(
    tmp_path: Path, edit: tuple[str, str], error: type[BitlatheError], words: str
) -> None:
    save_model(tmp_path / "m")
    write_plan(tmp_path / "plan.yaml", planned(tmp_path / "m", scheme="W4A16G32"), "why")
    text = (tmp_path / "plan.yaml").read_text()
    assert edit[0] in text
    (tmp_path / "plan.yaml").write_text(text.replace(*edit))
    with pytest.raises(error, match=re.escape(words)):
        planned(tmp_path / "m", **read_plan(tmp_path / "plan.yaml"))


def test_a_scheme_without_a_name_cannot_be_written() -> None:
    row = LayerPlan.model_validate({"weight": {"grid": "INT4", "block": [1, 48], "scale": {"grid": "BF16"}}})
    with pytest.raises(PlanError, match="a scheme without a name"):
        fields_of(Plan(linears={"a": row}))


def test_what_the_plan_says_is_not_said_again() -> None:
    for name in ("rotate", "dtype", "scheme", "bits", "overrides", "act_clip"):
        with pytest.raises(RecipeError, match=f"the plan says what {name} would"):
            refuse_both({"linears": {}}, {name: 1, "tuner": "rtn"})
    refuse_both({}, {"rotate": 1})
    refuse_both({"linears": {}}, {"tuner": "rtn", "seqlen": 3})


def test_files_are_named_and_never_overwritten(tmp_path: Path) -> None:
    assert refuse_files(None, [3.5]) == []
    assert refuse_files(tmp_path / "a.yaml", [3.5]) == [tmp_path / "a.yaml"]
    assert refuse_files(tmp_path / "a.b.yaml", [3, 3.25]) == [tmp_path / "a.b-3.yaml", tmp_path / "a.b-3.25.yaml"]
    (tmp_path / "a-3.yaml").touch()
    with pytest.raises(OutputError, match="perhaps edited"):
        refuse_files(tmp_path / "a.yaml", [3, 4])
    with pytest.raises(OutputError, match="is not there"):
        refuse_files(tmp_path / "none" / "a.yaml", [3])


def test_a_plan_is_yaml_that_other_programs_read(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    write_plan(tmp_path / "plan.yaml", planned(tmp_path / "m", scheme="W4A4", rotate="R1"), "a: b # c")
    read = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert list(read) == ["dtype", "rotate", "rotation_block", "rotation_seed", "linears"]


@pytest.mark.parametrize(
    ("texts", "budgets"),
    [
        (["3.5"], [3.5]),
        (["3,4", "4.5"], [3.0, 4.0, 4.5]),
        (["2.5:4:0.5", "3"], [2.5, 3.0, 3.5, 4.0]),
        (["3:3.3:0.1"], [3.0, 3.1, 3.2, 3.3]),
        (["3:3.35:0.1"], [3.0, 3.1, 3.2, 3.3]),
    ],
)
def test_budgets_are_numbers_or_ranges(texts: list[str], budgets: list[float]) -> None:
    assert budgets_of(texts) == pytest.approx(budgets)


@pytest.mark.parametrize("text", ["", "four", "3:4", "4:3:.5", "3:4:0", "3,,4"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="no number of bits"):
        budgets_of([text])
