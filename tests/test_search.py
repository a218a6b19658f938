"""Searches from end to end: honest about size, never worse than uniform, kept, continued, and carried out as predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitlathe
from bitlathe.autoscheme import choose, score
from bitlathe.autoscheme.kept import Kept
from bitlathe.autoscheme.options import default_schemes
from bitlathe.errors import PlanError
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.numerics.scheme import name_of
from bitlathe.plan import KEEP, Plan
from bitlathe.plan_file import write_plan
from bitlathe.prepare import prepare_search
from bitlathe.recipe import merge
from bitlathe.report import Event, Note, Searching
from bitlathe.searching import Searched, sweep
from families import FAMILIES, save_model, write_text
from vllm_rules import complaints

TEXT: dict[str, Any] = {"calib": "builtin", "seqlen": 64, "batch_size": 4, "search": {"tokens": 2048, "held_out": 1024}}
RTN: dict[str, Any] = {"calib": "builtin", "seqlen": 64, "batch_size": 4, "samples": 32, "tuner": "rtn"}


def swept(scores: Path, budgets: list[float], listen: Callable[[Event], None] = lambda event: None, **fields: Any) -> Searched:
    recipe = merge({"model": "builtin", "out": ".", "bits": budgets[0], "scores": scores, **TEXT, **fields})
    return sweep(recipe, budgets, listen)


def names(plan: Plan) -> dict[str, str]:
    return {name: KEEP if row.weight is None else name_of(row.weight, row.input) for name, row in plan.linears.items()}


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the searches of these tests keep what they find: most ask the same model for the same options."""
    return tmp_path_factory.mktemp("scores")


# What is chosen


def test_every_budget_is_kept_filled_and_no_uniform_choice_within_it_is_better(scores: Path) -> None:
    budgets = [2.5, 3.0, 3.125, 3.5, 4.125, 4.5, 5.0, 6.0, 8.125]
    found = swept(scores, budgets)
    uniform = {row["scheme"]: row for row in found.uniform}
    assert list(uniform) == ["W2A16G64", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16"]
    assert [record["asked"] for record in found.records] == budgets
    for bits, record in zip(budgets, found.records, strict=True):
        assert bits - 0.1 < record["bits"] <= bits  # the smallest step of this tiny model is about that
        assert all(record["kl"] <= row["kl"] for row in uniform.values() if row["bits"] <= bits)
    assert found.records[-1]["linears"] == dict.fromkeys(found.records[-1]["linears"], "W8A16")
    divergences = [record["kl"] for record in found.records]
    assert divergences == sorted(divergences, reverse=True)
    # Between two uniform schemes a mix is worth having.
    three, four = uniform["W3A16"]["kl"], uniform["W4A16"]["kl"]
    assert found.records[3]["kl"] < 0.9 * three ** (4.125 - 3.5) * four ** (3.5 - 3.125)


def test_linears_that_engines_run_as_one_have_one_scheme(scores: Path) -> None:
    (plan,) = swept(scores, [3.5]).plans
    chosen = names(plan)
    assert len(set(chosen.values()) - {KEEP}) > 1
    for block in range(4):
        at = f"model.layers.{block}"
        assert len({chosen[f"{at}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert chosen[f"{at}.mlp.gate_proj"] == chosen[f"{at}.mlp.up_proj"]
    assert chosen["lm_head"] == KEEP


def test_further_groups_share_one_scheme(scores: Path) -> None:
    (plan,) = swept(scores, [3.5], groups=[["*.o_proj", "*.down_proj"], ["*.layers.0.*.v_proj", "*.layers.1.*.v_proj"]]).plans
    chosen = names(plan)
    assert len({scheme for name, scheme in chosen.items() if name.endswith(("o_proj", "down_proj"))}) == 1
    assert len({chosen[f"model.layers.{block}.self_attn.{name}_proj"] for block in (0, 1) for name in "qkv"}) == 1


def test_overrides_hold_whatever_is_chosen(scores: Path) -> None:
    (found,) = (searched := swept(scores, [3.5], overrides={"*.down_proj": "W8A16", "*.layers.3.*": "keep"})).records
    assert not [name for name in found["linears"] if name.endswith("down_proj") or ".3." in name]
    chosen = names(searched.plans[0])
    assert chosen["model.layers.1.mlp.down_proj"] == "W8A16"
    assert chosen["model.layers.3.mlp.down_proj"] == KEEP
    assert found["bits"] <= 3.5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_searched_with_all_it_has(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head too where it has a weight of its own; what was kept joins only if it is asked for. In 16 bits on every CPU: how
    much of the budget is taken hangs on scores that are near to each other."""
    monkeypatch.setattr("bitlathe.prepare.computed_in", lambda dtype, device: dtype)
    model = save_model(tmp_path / "m", family)
    write_text(tmp_path / "text.txt", 900)
    tied = model.config.tie_word_embeddings
    fields = {"model": tmp_path / "m", "calib": tmp_path / "text.txt", "seqlen": 24, "search": {"tokens": 240, "held_out": 120}}
    fields |= {"schemes": "W3A16G32,W8A16G32,keep", **({} if tied else {"include": "lm_head"})}
    searched = swept(tmp_path / "scores", [6.0], **fields)
    (record,), (plan,) = searched.records, searched.plans
    assert 5.0 < record["bits"] <= 6.0
    assert ("lm_head" in record["linears"]) == (not tied)
    experts: dict[str, set[str]] = {}
    for name, scheme in record["linears"].items():
        if ".experts." in name:
            experts.setdefault(name.partition(".mlp.")[0], set()).add(scheme)
    assert all(len(schemes) == 1 for schemes in experts.values())
    bitlathe.quantize(
        str(tmp_path / "m"), plan=plan, out=tmp_path / "q", **{**RTN, "calib": str(tmp_path / "text.txt"), "seqlen": 24}
    )
    rows = {row["name"]: row for row in bitlathe.inspect(tmp_path / "q")["linears"]}
    used = sum(8 * rows[name]["bytes"] for name in record["linears"])
    numbers = sum(rows[name]["shape"][0] * rows[name]["shape"][1] for name in record["linears"])
    assert used / numbers == pytest.approx(record["bits"], abs=1e-9)
    assert bitlathe.inspect(tmp_path / "q")["bits_checkpoint"] == pytest.approx(record["bits_checkpoint"], abs=1e-9)


def test_what_16_bits_lose_of_a_float32_model_is_told(tmp_path: Path) -> None:
    """The original that a search measures against is that of the checkpoint, not one that is rounded as the result is."""
    save_model(tmp_path / "m", dtype=torch.float32)
    write_text(tmp_path / "text.txt", 900)
    fields = {"model": tmp_path / "m", "calib": tmp_path / "text.txt", "seqlen": 24, "search": {"tokens": 240, "held_out": 120}}
    searched = swept(tmp_path / "scores", [16.0], schemes="W8A16G32,keep", **fields)
    kept = {row["scheme"]: row["kl"] for row in searched.uniform}[KEEP]
    assert 0 < kept < 1e-5


def test_rotated_and_not_are_two_searches_and_what_is_predicted_comes_true(tmp_path: Path) -> None:
    fields = {"schemes": "INT4,INT8", "seqlen": 128, "search": {"tokens": 4096, "held_out": 4096}}
    plain = swept(tmp_path / "scores", [5.5], **fields)
    turned = swept(tmp_path / "scores", [5.5], **fields, rotate="R1,R2,R4")
    assert plain.records[0]["linears"] != turned.records[0]["linears"]
    assert plain.uniform[0]["kl"] != turned.uniform[0]["kl"]
    (record,), (plan,) = turned.records, turned.plans
    assert [rotation.space for rotation in plan.rotations] == ["residual", "value", "mid"]
    bitlathe.quantize("builtin", plan=plan, out=tmp_path / "q", **{**RTN, "seqlen": 128})
    true = bitlathe.evaluate(tmp_path / "q", against="builtin", seqlen=128, windows=32)["kl_mean"]["value"]
    assert 0.75 < true / record["kl"] < 1.25
    assert true < turned.uniform[0]["kl"]


def test_signs_are_drawn_before_scores_are_made(tmp_path: Path) -> None:
    told: list[Event] = []
    fields = {"schemes": "INT4,INT8", "rotate": "R1,R2", "rotation_trials": 3}
    (plan,) = swept(tmp_path, [5.5], told.append, **fields).plans
    note = next(event.text for event in told if isinstance(event, Note) and "draws of random signs the one" in event.text)
    assert {f"of seed {rotation.seed} " in note for rotation in plan.rotations} == {True}


# What is kept


def test_another_budget_reads_no_weight_for_scores_and_measures_only_what_is_new(
    scores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept(scores, [3.5])
    monkeypatch.setattr(score, "begin", None)
    told: list[Event] = []
    found = swept(scores, [3.7], told.append)
    assert found.records[0]["bits"] <= 3.7
    assert {event.what for event in told if isinstance(event, Searching)} == {"measure"}
    monkeypatch.setattr(choose, "measure", None)
    assert swept(scores, [3.7]).records == found.records
    # Fewer options are a part of what is known.
    assert prepare_search(merge({"model": "builtin", "out": ".", "bits": 4.5, **TEXT}), [4.5]).space.options[0] == "W3A16"  # type: ignore[union-attr]


@pytest.mark.parametrize("after", [2, 4])
def test_a_killed_search_goes_on_to_the_same_plan(
    tmp_path: Path, scores: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole = swept(scores, [3.5])
    put, parts = Kept.put, []

    def killed(self: Kept, part: str, *args: Any) -> None:
        if len(parts) == after:
            raise KeyboardInterrupt
        parts.append(part)
        put(self, part, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            swept(tmp_path, [3.5])
    (folder,) = (path for path in tmp_path.iterdir() if path.name != "smoothing")
    with (folder / "scores.jsonl").open("ab") as file:
        file.write(b'{"part": "block-00')  # torn by the kill
    done = len(parts)
    monkeypatch.setattr(Kept, "put", lambda self, part, *args: (parts.append(part), put(self, part, *args)))
    again = swept(tmp_path, [3.5])
    assert len(parts) == len(set(parts)) == 6 > done  # four blocks, the head, and what is smoothed, each once
    assert again.records == whole.records
    assert not (folder / "work").exists()


def test_what_the_numbers_depend_on_has_scores_of_its_own(tmp_path: Path) -> None:
    for fields in ({}, {"rotate": "R1"}, {"seed": 1}, {"overrides": {"*.down_proj": "W8A16"}}, {"search": {"tokens": 1024}}):
        merged = {**TEXT, **fields}
        ready = prepare_search(merge({"model": "builtin", "out": ".", "bits": 4.5, **merged, "scores": tmp_path}), [4.5])
        assert ready.space is not None
    folders = set()
    for fields in ({}, {"schemes": "W4A16,W8A16"}, {"groups": [["*.o_proj"]]}, {"formats": "compressed-tensors"}):
        swept(tmp_path, [5.0], **{"schemes": "W4A16,W8A16", **fields})
        folders |= {path.name for path in tmp_path.iterdir()} - {"smoothing"}
    assert len(folders) == 1
    for fields in ({"rotate": "R1"}, {"seed": 1}, {"overrides": {"*.down_proj": "W8A16"}}):
        swept(tmp_path, [5.0], **{"schemes": "W4A16,W8A16", **fields})
    assert len(list(tmp_path.iterdir())) == 5  # four, and the one of what is smoothed


# What is made of it


def test_a_run_that_searches_is_a_search_and_a_run(tmp_path: Path, scores: Path) -> None:
    fields = {**RTN, "search": TEXT["search"]}
    plan = bitlathe.search("builtin", bits=3.5, scores=scores, **TEXT)
    carried_out = bitlathe.quantize("builtin", bits=3.5, out=tmp_path / "a", scores=scores, **fields)
    assert carried_out == plan
    assert bitlathe.quantize("builtin", plan=plan, out=tmp_path / "b", **RTN) == plan
    write_plan(tmp_path / "plan.yaml", plan, "as it was found")
    assert bitlathe.quantize("builtin", plan=tmp_path / "plan.yaml", out=tmp_path / "c", **RTN) == plan
    shards = [sorted(path.read_bytes() for path in (tmp_path / run).glob("*.safetensors")) for run in "abc"]
    assert shards[0] == shards[1] == shards[2]
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["search"]["bits"] == bitlathe.inspect(tmp_path / "a")["bits_quantized"] <= 3.5
    assert report["search"]["told"] in report["notes"]
    assert "3.50 bits a weight, a scheme for each linear" in (tmp_path / "a" / "README.md").read_text()


def test_a_run_that_is_continued_does_not_search_again(tmp_path: Path, scores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {**RTN, "search": TEXT["search"], "bits": 3.5, "scores": scores}
    bitlathe.quantize("builtin", out=tmp_path / "whole", **fields)

    def stop(event: Event) -> None:
        if not isinstance(event, Note | Searching):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bitlathe.quantize("builtin", out=tmp_path / "q", listen=stop, **fields)
    monkeypatch.setattr("bitlathe.pipeline.mix", None)
    bitlathe.quantize("builtin", out=tmp_path / "q", **fields)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "q" / path.name).read_bytes() == path.read_bytes()
    # And what is finished is not begun again.
    assert names(bitlathe.quantize("builtin", out=tmp_path / "q", **fields)) == names(
        bitlathe.search("builtin", bits=3.5, scores=scores, **TEXT)
    )


@pytest.mark.parametrize(
    ("fields", "bits"),
    [
        ({}, 5.0),
        ({"schemes": "W8A16,W4A16,FP8_CHANNEL,keep"}, 6.0),
        ({"schemes": "INT4,INT8", "rotate": "R1,R2"}, 5.0),
        ({"schemes": "NVFP4,FP8_DYNAMIC"}, 6.0),
    ],
    ids=["default", "weights and 16 bits", "activations, rotated", "floats"],
)
@pytest.mark.usefixtures("one_thread")
def test_a_mix_in_compressed_tensors_is_what_transformers_runs(tmp_path: Path, fields: dict[str, Any], bits: float) -> None:
    fields = {**fields, "formats": "native,compressed-tensors", "search": TEXT["search"], "scores": tmp_path / "scores"}
    plan = bitlathe.quantize("builtin", bits=bits, out=tmp_path / "q", **RTN, **fields)
    assert len(set(plan.linears.values())) > 2
    folder = tmp_path / "q" / "compressed-tensors"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert len(groups) == len({row for row in plan.linears.values() if row.weight is not None})
    assert all(group["format"] and set(group["targets"]) <= set(plan.linears) for group in groups)
    assert [fault for fault in complaints(config, "llama", list(plan.linears)) if fault.severity == "structural"] == []
    used = sum(8 * row["bytes"] for row in bitlathe.inspect(folder)["linears"] if row["name"] != "lm_head")
    numbers = sum(row["shape"][0] * row["shape"][1] for row in bitlathe.inspect(folder)["linears"] if row["name"] != "lm_head")
    assert used / numbers <= bits
    tokens = torch.arange(100, 196).view(2, 48)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        assert torch.equal(bitlathe.load(folder, "cpu")(tokens).logits, theirs)
        assert torch.equal(bitlathe.load(tmp_path / "q" / "native", "cpu")(tokens).logits, theirs)


def test_a_fake_folder_of_a_mix_with_activations_is_what_was_measured(tmp_path: Path) -> None:
    """As people who come from another tool ask for it."""
    fields = {
        "schemes": "INT4,INT8",
        "rotate": "hadamard",
        "formats": "fake",
        "search": TEXT["search"],
        "scores": tmp_path / "s",
    }
    bitlathe.quantize("builtin", bits=5.0, out=tmp_path / "q", **RTN, **fields)
    record = json.loads((tmp_path / "q" / "report.json").read_text())["search"]
    true = bitlathe.evaluate(tmp_path / "q", against="builtin", seqlen=64, windows=64)["kl_mean"]["value"]
    assert 0.75 < true / record["kl"] < 1.25


def test_a_mix_in_gguf_has_types_for_rows_that_are_no_blocks_of_256(tmp_path: Path) -> None:
    fields = {"formats": "gguf", "search": TEXT["search"], "scores": tmp_path / "scores"}
    plan = bitlathe.quantize("builtin", bits=4.7, out=tmp_path / "q", **RTN, **fields)
    record = json.loads((tmp_path / "q" / "report.json").read_text())["search"]
    assert record["schemes"] == ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
    assert len(set(names(plan).values())) > 2
    assert 4.6 < record["bits"] <= 4.7
    assert record["kl"] <= min(row["kl"] for row in record["uniform"].values() if row["bits"] <= 4.7)
    with pytest.raises(PlanError, match=r"4\.4 bits a weight cannot be had: Q8_0, Q4_0, .* from 4\.5000 to 8\.5000"):
        bitlathe.quantize("builtin", bits=4.4, out=tmp_path / "less", **RTN, **fields)
    assert default_schemes([4.5], ["gguf"], [256, 768]) == ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


def test_nothing_is_read_of_a_model_that_has_its_scores_and_measures(scores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(scores, [3.5])
    monkeypatch.setattr(Checkpoint, "read", None)
    assert swept(scores, [3.5]).records[0]["asked"] == 3.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "fields", [{}, {"schemes": "NVFP4,FP8_STATIC,W8A8_STATIC", "rotate": "R1,R2,R4", "include": "lm_head"}]
)
def test_a_search_on_a_gpu_finds_about_what_one_on_a_cpu_does(tmp_path: Path, fields: dict[str, Any]) -> None:
    here, there = (swept(tmp_path / device, [6.0], device=device, **fields) for device in ("cpu", "cuda"))
    for one, other in zip(here.uniform, there.uniform, strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=0.05, abs=1e-5)
    assert there.records[0]["bits"] <= 6.0
    assert here.records[0]["kl"] == pytest.approx(there.records[0]["kl"], rel=0.1)
