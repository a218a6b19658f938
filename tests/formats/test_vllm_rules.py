"""What compressed-tensors configurations say to vLLM: ours load, and the rules that say so can fail."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitlathe.arch import ARCHS
from bitlathe.errors import FormatError
from bitlathe.formats.compressed_tensors import CompressedTensors
from bitlathe.model.experts import split_experts
from bitlathe.model.skeleton import Skeleton, linears_of
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import PRESETS
from bitlathe.plan import LayerPlan, Plan
from families import FAMILIES, config_of
from format_samples import APART, ROWS_BESIDE, row_named
from vllm_rules import Complaint, complaints
from vllm_schemes import VERSIONS

CT = CompressedTensors()
EXPERTS = ("qwen2_moe", "qwen3_moe", "olmoe")
PAIRS = (("W4A4", "W8A8"), ("W4A16", "W8A16"), ("NVFP4", "FP8_DYNAMIC"), ("MXFP4", "MXFP8"))
Q, K, V, OUT = (f"model.layers.0.self_attn.{own}_proj" for own in "qkvo")
GATE, UP, DOWN = (f"model.layers.0.mlp.{own}_proj" for own in ("gate", "up", "down"))
BLOCK = [Q, K, V, OUT, GATE, UP, DOWN, "lm_head"]


def skeleton(family: str) -> Skeleton:
    """A tiny model of the family, never filled, experts one by one."""
    arch = ARCHS[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(family))
    split_experts(model, arch)
    return Skeleton(model, arch, linears_of(model, arch))


def mixed(model: Skeleton, names: tuple[str, ...], *, kept: int = 3, head: str | None = None) -> Plan:
    """Schemes dealt out by fused groups: every `kept`th group stays in 16 bits, and so do routers."""
    dealt: dict[str, LayerPlan] = {}
    rows = {}
    for name, row in model.rows.items():
        label = row.fused or name
        if label not in dealt and not row.router:
            scheme = None if len(dealt) % kept == kept - 1 else names[len(dealt) // 2 % len(names)]
            dealt[label] = LayerPlan() if scheme is None else row_named(scheme, "bf16")
        rows[name] = LayerPlan() if row.router else dealt[label]
    rows[model.arch.head] = LayerPlan() if head is None else row_named(head, "bf16")
    return Plan(linears=rows)


def asked(model: Skeleton, plan: Plan, version: str = "0.33.0") -> list[Complaint]:
    """What vLLM says of our configuration of a plan that our own check accepts, after a trip through a file."""
    CT.check(plan, dict.fromkeys(plan.linears, (1024, 1024)), model.fused)
    config = json.loads(json.dumps(CT.config(plan)))
    assert CT.parse(config, list(plan.linears)) == plan
    return complaints(config, model.model.config.model_type, list(plan.linears), version=version)


def of(found: list[Complaint], severity: str) -> list[Complaint]:
    return [complaint for complaint in found if complaint.severity == severity]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_plans_have_a_place_for_every_tensor(family: str, pair: tuple[str, ...], version: str) -> None:
    model = skeleton(family)
    for kept in (2, 3, 5, 99):
        plan = mixed(model, pair, kept=kept)
        assert len(set(plan.quantized.values())) == 2
        found = asked(model, plan, version)
        assert not of(found, "structural")
        if "W4A4" not in pair:
            assert not found
    assert not of(asked(model, mixed(model, pair, head=pair[1]), version), "structural")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("head", [None, "W8A16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plans_of_one_scheme_load(family: str, head: str | None, version: str) -> None:
    model = skeleton(family)
    for kept in (3, 99):
        assert not asked(model, mixed(model, ("W8A16",), kept=kept, head=head), version)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_beside_what_is_kept(family: str) -> None:
    """Experts alone, all but the experts, and experts of one block of two."""
    model = skeleton(family)
    w4, kept = row_named("W4A16", "bf16"), LayerPlan()
    experts = {name for name in model.linears if ".experts." in name}
    routers = {name for name, row in model.rows.items() if row.router} | {"lm_head"}
    assert routers - {"lm_head"}
    for chosen in (experts, set(model.linears) - experts, {name for name in model.linears if ".layers.1." in name}):
        rows = {name: w4 if name in chosen - routers else kept for name in model.linears}
        for version in VERSIONS:
            assert not asked(model, Plan(linears=rows), version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_group_is_refused_by_both(family: str, version: str) -> None:
    model = skeleton(family)
    label = next((row.fused for row in model.rows.values() if row.fused), None)
    if label is None:
        assert family == "phi3"  # its groups are fused in the file
        return
    for fused in dict.fromkeys(row.fused for row in model.rows.values() if row.fused):
        plan = mixed(model, ("W4A16", "W8A16"), kept=99)
        last = [name for name, row in model.rows.items() if row.fused == fused][-1]
        for other in (row_named("NVFP4", "bf16"), LayerPlan()):
            split = Plan(linears=plan.linears | {last: other})
            with pytest.raises(FormatError, match="different schemes for"):
                CT.check(split, dict.fromkeys(split.linears, (1024, 1024)), model.fused)
            said = of(complaints(CT.config(split), family, list(split.linears), version=version), "structural")
            assert [complaint.module for complaint in said] == [served(fused)]


def served(label: str) -> str:
    """vLLM's module of a fused group."""
    return label if label.endswith("experts") else f"{label}_proj"


def block(targets: dict[str, list[str]], ignore: list[str]) -> dict[str, Any]:
    """A configuration with groups as given, by the names of their schemes."""
    groups = {}
    for index, (name, names) in enumerate(targets.items()):
        (stored,) = CT.config(Plan(linears={"a": row_named(name, "bf16")}))["config_groups"].values()
        groups[f"group_{index}"] = stored | {"targets": names}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, "ignore": ignore}


LOADED = block({"W4A16": [Q, K, V, OUT], "FP8_DYNAMIC": [GATE, UP, DOWN]}, ["lm_head"])


@pytest.mark.parametrize(
    ("config", "module", "told"),
    [
        (
            block({"W4A16": [Q, K, OUT], "W8A16": [V, GATE, UP, DOWN]}, ["lm_head"]),
            "self_attn.qkv_proj",
            "int4 .*v_proj in int8",
        ),
        (block({"W4A16": [Q, K, V, OUT, GATE, DOWN]}, ["lm_head", UP]), "mlp.gate_up_proj", "some of its parts are ignored"),
        (block({"W4A16": [Q, K, V, OUT, GATE, UP]}, ["lm_head"]), "mlp.down_proj", "in no group and not ignored"),
        (
            block({"W4A16": [Q, K, V, OUT, GATE, DOWN]}, ["lm_head"]),
            "mlp.gate_up_proj",
            "built for 16 bits, .*gate_proj in int4",
        ),
        # What a class takes, it takes from the parts whose group names not all of them.
        (block({"W4A16": ["Linear"], "W8A16": [Q, K]}, ["lm_head"]), "self_attn.qkv_proj", "int4 .*q_proj in int8"),
        # A pattern that comes first goes before an exact name, and the library has it the other way around.
        (block({"W4A16": ["re:.*proj"], "W8A16": [DOWN]}, ["lm_head"]), "mlp.down_proj", "int4 .*down_proj in int8"),
        (block({"W4A16": ["Linear"]}, []), "lm_head", "built for 16 bits, and the file holds lm_head in int4"),
    ],
)
def test_what_is_known_to_fail(config: dict[str, Any], module: str, told: str) -> None:
    (found,) = complaints(config, "llama", BLOCK)
    assert (found.severity, found.module.removeprefix("model.layers.0.")) == ("structural", module)
    assert re.search(told, found.reason), found.reason
    assert not complaints(LOADED, "llama", BLOCK)


def test_a_class_that_swallows_a_named_group() -> None:
    """Before 0.33 the name of a class went before the names of parts."""
    config = block({"W4A16": ["Linear"], "W8A16": [Q, K, V]}, ["lm_head"])
    assert not complaints(config, "llama", BLOCK)
    (found,) = complaints(config, "llama", BLOCK, version="0.20.0")
    assert (found.severity, found.module) == ("structural", "model.layers.0.self_attn.qkv_proj")


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        ("W4A16", "int-quantized"),
        ("W8A16", "int-quantized"),
        ("W4A16", "mxfp4-pack-quantized"),
        ("W4A16", "packed"),
        ("FP8_CHANNEL", "pack-quantized"),
        ("NVFP4", "mxfp4-pack-quantized"),
        ("MXFP4", "float-quantized"),
        ("MXFP8", "float-quantized"),
    ],
)
def test_a_wrong_format(scheme: str, format: str) -> None:
    config = block({scheme: [name for name in BLOCK if name != "lm_head"]}, ["lm_head"])
    assert not complaints(config, "llama", BLOCK)
    config["config_groups"]["group_0"]["format"] = format
    found = complaints(config, "llama", BLOCK)
    assert ("structural", "group_0") in [(complaint.severity, complaint.module) for complaint in found]
    config["config_groups"]["group_0"]["format"], config["format"] = None, format
    assert complaints(config, "llama", BLOCK) == found


def test_experts_of_different_groups() -> None:
    names = [f"model.layers.0.mlp.experts.{number}.{own}_proj" for number in (0, 1) for own in ("gate", "up", "down")]
    linears = [Q, K, V, OUT, "model.layers.0.mlp.gate", *names, "lm_head"]
    ignore = [Q, K, V, OUT, "model.layers.0.mlp.gate", "lm_head"]
    assert not complaints(block({"W4A16": names}, ignore), "qwen3_moe", linears)
    assert not complaints(block({"W4A16": ["Linear"]}, ignore), "qwen3_moe", linears)
    for first, told in ((names[:2], "its first expert"), (names[:3], r"experts\.1\.gate_proj in int8")):
        split = {"W4A16": first, "W8A16": names[len(first) :]}
        (found,) = complaints(block(split, ignore), "qwen3_moe", linears)
        assert (found.severity, found.module) == ("structural", "model.layers.0.mlp.experts")
        assert re.search(told, found.reason), found.reason
    # Of a router some models ask, and some do not.
    routed = block({"W4A16": [*names, "model.layers.0.mlp.gate"]}, [name for name in ignore if not name.endswith("gate")])
    assert not complaints(routed, "qwen3_moe", linears)
    (found,) = complaints(routed, "olmoe", linears)
    assert (found.severity, found.module) == ("structural", "model.layers.0.mlp.gate")


# Where each runs: a linear in 0.20.0, experts in 0.20.0, a linear in 0.33.0, experts in 0.33.0.
GROUPS = ("", "G32", "G64")
RUN: dict[str, str] = {
    **{f"W{bits}A16{group}{zero}": "no no yes yes" for bits in (2, 3, 5, 6) for group in GROUPS for zero in ("", "_ASYM")},
    **{f"W{bits}A16_CHANNEL{zero}": "no no yes no" for bits in (2, 3, 5, 6) for zero in ("", "_ASYM")},
    **{f"W{bits}A16{group}": "yes yes yes yes" for bits in (4, 8) for group in GROUPS},
    **{f"W4A16{group}_ASYM": "yes no yes yes" for group in GROUPS},
    **{f"W8A16{group}_ASYM": "no no yes yes" for group in GROUPS},
    **dict.fromkeys(("W4A16_CHANNEL", "W8A16_CHANNEL"), "yes yes yes no"),
    **{"W4A16_CHANNEL_ASYM": "yes no yes no", "W8A16_CHANNEL_ASYM": "no no yes no"},
    **dict.fromkeys(("MXFP4A16", "MXFP8A16", "NVFP4A16", "MXFP4", "MXFP8", "NVFP4"), "yes yes yes yes"),
    **dict.fromkeys(("FP8_DYNAMIC", "W8A8"), "yes yes yes yes"),
    **dict.fromkeys(("FP8_TENSOR", "FP8_CHANNEL", "FP8_BLOCK", "FP8_STATIC", "W8A8_STATIC"), "yes no yes no"),
    **dict.fromkeys(("W4A4", "W4A4G128", "W4A8"), "no no yes no"),
}


HELD = [name for name in PRESETS if name not in APART]  # the format holds none of those


@pytest.mark.parametrize("name", HELD)
def test_schemes_that_run(name: str) -> None:
    row, experts = row_named(name, "bf16"), [f"m.experts.0.{own}_proj" for own in ("gate", "up", "down")]
    answers = []
    for version in VERSIONS:
        for linears in ([OUT], experts):
            config = CT.config(Plan(linears=dict.fromkeys(linears, row)))
            found = complaints(config, "olmoe", linears, version=version)
            assert not of(found, "structural")
            answers.append("no" if found else "yes")
    assert " ".join(answers) == RUN[name]


def test_schemes_without_a_name() -> None:
    found = {}
    for name, row in ROWS_BESIDE.items():
        config = CT.config(Plan(linears={OUT: row, "lm_head": LayerPlan()}))
        found[name] = complaints(config, "llama", [OUT, "lm_head"])
        assert not of(found[name], "structural")
    stopped = {name for name, said in found.items() if said}
    assert stopped == {"asymmetric activations", "asymmetric bytes", "six bits a token", "W4 with E4M3"}


def test_heads_that_run() -> None:
    for name in HELD:
        config = CT.config(Plan(linears=dict.fromkeys([OUT, "lm_head"], row_named(name, "bf16"))))
        found = complaints(config, "llama", [OUT, "lm_head"])
        assert [(said.severity, said.module) for said in found] == ([("scheme", "lm_head")] if name == "FP8_BLOCK" else [])


def test_rotations_that_run() -> None:
    """R4 runs, but in experts; R1 where it is not folded, if all parts of a module have it, but in the head."""
    turned, residual = (Rotation(space=space, block=64, kind="hadamard") for space in ("mid", "residual"))
    for family in FAMILIES:
        model = skeleton(family)
        mid = [name for name, row in model.rows.items() if row.reads == "mid"]
        modules = {said.module for said in asked(model, rotated(mixed(model, ("W4A16", "W8A16"), kept=99), mid, turned))}
        assert modules == {name.partition(".experts.")[0] + ".experts" for name in mid if ".experts." in name}
    model = skeleton("olmo2")
    plan = mixed(model, ("W4A16", "W8A16"), kept=99, head="W8A16")
    *blocks, head = [name for name, row in model.rows.items() if row.reads == "residual"]
    for names, modules in ((blocks, []), (blocks[1:], [Q.replace("q_proj", "qkv_proj")]), ([*blocks, head], [head])):
        found = asked(model, rotated(plan, names, residual))
        assert [said.module for said in of(found, "structural")] == modules


def rotated(plan: Plan, names: list[str], rotation: Rotation) -> Plan:
    """The plan with the inputs of some linears turned as they run."""
    rows = {name: plan.linears[name].model_copy(update={"online": rotation}) for name in names}
    return Plan(linears=plan.linears | rows, rotations=(rotation,))
