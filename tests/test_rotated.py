"""Rotated models with quantized activations: what is frozen in memory, saved, loaded and continued is one model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitlathe
import bitlathe.hf
from bitlathe.errors import CheckpointError, FormatError, PlanError, ResumeError
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.fold import edits_of
from bitlathe.model.hidden import Budget
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.source import open_model
from bitlathe.model.walk import begin, walk
from bitlathe.model.weights import Weights
from bitlathe.pipeline import run
from bitlathe.plan import LayerPlan
from bitlathe.prepare import prepare
from bitlathe.recipe import merge
from bitlathe.report import BlockReport, Note, inspect, read_report
from families import FAMILIES, VOCABULARY, save_model, write_text
from frozen import Frozen
from test_pipeline import KILLED, content, interrupt_after, listen_to

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
ALL = "R1,R2,R3,R4"
W4A4: dict[str, Any] = {
    "samples": 6,
    "seqlen": 24,
    "batch_size": 2,
    "iters": 3,
    "scheme": "W4A4",
    "rotate": ALL,
    "kv": "KV4",
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 400)


@torch.no_grad()
def said(model: PreTrainedModel) -> list[Tensor]:
    """Logits of a prefill, without a cache and with one, and of the tokens after it, one at a time."""
    logits = [model(TOKENS, use_cache=False).logits]
    seen = model(TOKENS[:, :8], use_cache=True)
    logits.append(seen.logits)
    for index in range(8, TOKENS.shape[1]):
        seen = model(TOKENS[:, index : index + 1], past_key_values=seen.past_key_values, use_cache=True)
        logits.append(seen.logits)
    return logits


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


FRESH = """
import sys, torch
torch.set_num_threads(1)
from test_rotated import said
import bitlathe, bitlathe.hf
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
torch.save([said(bitlathe.load(folder, "cpu")), said(AutoModelForCausalLM.from_pretrained(folder))], sys.argv[2])
"""


def in_a_fresh_process(folder: Path, where: Path) -> list[list[Tensor]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", FRESH, str(folder), str(where)], check=True, env=environment)
    return torch.load(where)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_memory_saved_and_loaded_are_one_model(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    save_model(tmp_path / "m", family)
    frozen = Frozen(monkeypatch)
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **W4A4 | {"tuner": "rtn"})
    in_memory = said(frozen.model())
    assert same(in_memory, said(bitlathe.load(tmp_path / "q", "cpu")))
    assert same(in_memory, said(AutoModelForCausalLM.from_pretrained(tmp_path / "q")))
    assert not same(in_memory, said(bitlathe.load(tmp_path / "m", "cpu")))


SCHEMES = ("W4A4", "W4A8", "W8A8", "W8A8_STATIC", "FP8_DYNAMIC", "FP8_STATIC", "MXFP4", "MXFP8", "NVFP4")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_with_activations(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """Both formats, with R4 online, in a fresh process."""
    save_model(tmp_path / "m", "qwen2", hidden_size=128, intermediate_size=256, head_dim=32)
    frozen = Frozen(monkeypatch)
    asked = W4A4 | {"scheme": scheme, "tuner": "signround", "rotate": "R1,R2,R4", "kv": None}
    formats = ("native", "compressed-tensors")
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), formats=formats, **asked)
    in_memory = said(frozen.model())
    for format in formats:
        ours, theirs = in_a_fresh_process(tmp_path / "q" / format, tmp_path / "said.pt")
        assert same(ours, in_memory), format
        assert same(theirs, in_memory), format


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "NVFP4"])
def test_static_scales_of_activations_are_no_bytes_of_weights(tmp_path: Path, text: Path, scheme: str, format: str) -> None:
    save_model(tmp_path / "m")
    asked = W4A4 | {"scheme": scheme, "tuner": "rtn", "rotate": "none", "kv": None, "formats": format}
    asked |= {"act_asymmetric": scheme == "W8A8_STATIC"}
    plan = bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **asked)
    found = inspect(tmp_path / "q")
    for row in found["linears"]:
        if row["name"] in plan.quantized:
            assert 8 * row["bytes"] == plan.quantized[row["name"]].bits(row["shape"]), row["name"]
    header = Checkpoint(tmp_path / "q").header
    scales = [name for name in header if ".input_" in name]
    assert len(scales) >= len(plan.quantized)
    assert found["bytes"] == sum(info.nbytes for info in header.values())


def test_transformers_alone_ignores_r4_and_we_say_so(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m")
    asked = {"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), "formats": "compressed-tensors"}
    notes = listen_to(merge(asked | W4A4 | {"rotate": "R4", "kv": None, "tuner": "rtn"}), Note)
    assert any("transformers alone ignores it" in note.text and "bitlathe.load" in note.text for note in notes)
    assert "import bitlathe.hf" in (tmp_path / "q" / "README.md").read_text()
    alone = "import sys, torch; torch.set_num_threads(1)\nfrom transformers import AutoModelForCausalLM\n" + (
        "tokens = torch.load(sys.argv[2])\n"
        "torch.save(AutoModelForCausalLM.from_pretrained(sys.argv[1])(tokens).logits.detach(), sys.argv[2])"
    )
    torch.save(TOKENS, tmp_path / "said.pt")
    subprocess.run([sys.executable, "-c", alone, str(tmp_path / "q"), str(tmp_path / "said.pt")], check=True)
    assert not torch.equal(torch.load(tmp_path / "said.pt"), said(bitlathe.load(tmp_path / "q", "cpu"))[0])
    # As if another program had written it.
    (tmp_path / "q" / "report.json").unlink()
    assert [(row["name"], row["online"], row["linears"]) for row in inspect(tmp_path / "q")["rotations"]] == [("R4", True, 2)]


@pytest.mark.parametrize(("dtype", "nameless", "told"), [("fp16", False, "KV8"), ("bf16", True, "INT8 per token")])
def test_the_cache_has_its_name_where_there_is_one(tmp_path: Path, dtype: str, told: str, *, nameless: bool) -> None:
    save_model(tmp_path / "m")
    asked = {"model": tmp_path / "m", "out": tmp_path / "q", "scheme": "W8A8", "kv": "8", "dtype": dtype, "tuner": "rtn"}
    run(merge(asked | {"rtn": {"scale": "min-max"}}), restart=False, listen=lambda event: None)
    if nameless:
        # A scheme that this program gives no name to.
        report = json.loads((tmp_path / "q" / "report.json").read_text())
        report["plan"]["kv"]["asymmetric"] = False
        (tmp_path / "q" / "report.json").write_text(json.dumps(report))
    assert inspect(tmp_path / "q")["kv"] == told


def test_folded_rotations_need_no_reader(tmp_path: Path, text: Path) -> None:
    """--rotate hadamard: an ordinary checkpoint of the rotated model is the model."""
    save_model(tmp_path / "m", tie_word_embeddings=True)
    asked = W4A4 | {"rotate": "hadamard", "kv": None, "scheme": "W8A16G32", "tuner": "rtn", "formats": ("dense", "native")}
    plan = bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **asked)
    assert [(rotation.space, rotation.kind) for rotation in plan.rotations] == [("residual", "random"), ("value", "random")]
    assert plan.untied and not any(row.online for row in plan.linears.values())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "q" / "dense")
    assert same(said(dense), said(bitlathe.load(tmp_path / "q" / "native", "cpu")))
    assert not torch.equal(dense.get_input_embeddings().weight, dense.get_output_embeddings().weight)
    assert json.loads((tmp_path / "q" / "dense" / "config.json").read_text())["tie_word_embeddings"] is False
    report = inspect(tmp_path / "q" / "native")
    assert report["untied"] and [rotation["online"] for rotation in report["rotations"]] == [False, False]


def test_inspect_tells_what_online_rotations_cost(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m")
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **W4A4 | {"tuner": "rtn"})
    inspected = inspect(tmp_path / "q")
    assert inspected["kv"] == "KV4"
    found = {rotation["name"]: rotation for rotation in inspected["rotations"]}
    assert {name: rotation["online"] for name, rotation in found.items()} == {"R1": False, "R2": False, "R3": True, "R4": True}
    # Two blocks: down_proj reads 128 numbers, read and written in 16 bits; keys are 2 heads of 16, there and back.
    assert (found["R4"]["linears"], found["R4"]["block"], found["R4"]["bytes"]) == (2, 128, 2 * 4 * 128)
    assert found["R3"]["bytes"] == 2 * 2 * 4 * 32
    # At least as many operations as a fast transform has, at most those of the whole matrix.
    assert 2 * 128 * 7 <= found["R4"]["operations"] <= 2 * 2 * 128 * 129
    assert (found["R1"]["operations"], found["R1"]["bytes"]) == (0, 0)
    assert read_report(tmp_path / "q")["rotations"] == list(found.values())
    card = (tmp_path / "q" / "README.md").read_text()
    assert all(
        f"{name} ({how}, " in card for name, how in {"R1": "folded", "R2": "folded", "R3": "online", "R4": "online"}.items()
    )


DOWN: dict[str, Any] = {"scheme": "W4A16G32", "overrides": {"*.down_proj": "W4A4"}}
HEAD: dict[str, Any] = {"scheme": "W4A16G32", "overrides": {"lm_head": "W4A4"}}


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"formats": "dense"}, FormatError, "dense cannot hold a cache"),
        ({"formats": "dense", "kv": None}, FormatError, "dense cannot hold R3"),
        ({"formats": "compressed-tensors", "rotate": "R4:random", "kv": None}, FormatError, "random"),
        ({"formats": "compressed-tensors"}, FormatError, "compressed-tensors"),
        ({"rotation_block": 48}, PlanError, "--rotation-block 64"),
        ({"rotate": "R4", "overrides": {"*.down_proj": "keep"}}, PlanError, "nothing would be turned. Leave R4 out"),
        ({"scheme": "W4A16G32", "act_asymmetric": True}, PlanError, "--act-asym"),
        ({"scheme": "W4A16G32", "act_clip": 0.9}, PlanError, "--act-clip"),
        ({"scheme": "FP8_DYNAMIC", "act_asymmetric": True}, PlanError, "--act-asym"),
        ({"scheme": "W4A16G32", "rotation_trials": 3}, PlanError, "--rotation-trials"),
        # The draws have nothing to do with what is rounded: R3 turns keys, and down_proj does not read what R1 turns.
        ({"rotate": "R3:random", "rotation_trials": 3}, PlanError, "--rotation-trials"),
        ({"rotate": "R1,R4:hadamard", **DOWN, "rotation_trials": 3}, PlanError, "--rotation-trials"),
        # The head is not measured.
        ({"rotate": "R1", **HEAD, "rotation_trials": 3}, PlanError, "--rotation-trials"),
    ],
)
def test_what_cannot_be_held_is_refused_before_a_weight_is_read(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], error: type[Exception], message: str
) -> None:
    save_model(tmp_path / "m")

    def read(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(error, match=message):
        bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **W4A4 | asked)
    assert not (tmp_path / "q").exists()


def test_trials_keep_the_signs_with_the_least_error(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m")
    asked = {"model": str(tmp_path / "m"), "calib": str(text)} | W4A4 | {"tuner": "rtn", "rotation_seed": 5}
    notes = listen_to(merge(asked | {"out": tmp_path / "q", "rotation_trials": 6}), Note)
    told = next(note.text for note in notes if "is kept" in note.text)
    plan = read_report(tmp_path / "q")["plan"]
    seed = plan["rotations"][0]["seed"]
    assert f"of seed {seed} is kept" in told and 5 <= seed < 11
    # Asked for by its seed it is the same result, and R3 and R4 have no signs to draw.
    run(merge(asked | {"out": tmp_path / "again", "rotation_seed": seed}), restart=False, listen=lambda event: None)
    shards = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("q", "again")]
    assert shards[0] and [shard.read_bytes() for shard in shards[0]] == [shard.read_bytes() for shard in shards[1]]
    assert [rotation["seed"] for rotation in plan["rotations"][2:]] == [0, 0]


DRAWN: dict[str, Any] = W4A4 | {"tuner": "rtn", "kv": None, "rotate": "R1,R2", "rotation_trials": 3}


def no_second_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any, **__: Any) -> list[float]:
        raise AssertionError("the draws were compared")

    monkeypatch.setattr("bitlathe.starting.errors_of", measured)


def test_draws_are_compared_once_in_a_run(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is continued keeps what it has drawn, whatever it would draw now; so does a result that is there already."""
    save_model(tmp_path / "m", num_hidden_layers=3)
    recipe = {"model": str(tmp_path / "m"), "calib": str(text), **DRAWN}
    # The last draw wins, which is not the plan that the recipe alone gives.
    monkeypatch.setattr("bitlathe.starting.errors_of", lambda *_, **__: [0.3, 0.2, 0.1])
    run(merge(recipe | {"out": tmp_path / "whole"}), restart=False, listen=lambda event: None)
    interrupt_after(1, recipe | {"out": tmp_path / "q"})
    no_second_draw(monkeypatch)
    plan = run(merge(recipe | {"out": tmp_path / "q"}), restart=False, listen=lambda event: None)
    assert [rotation.seed for rotation in plan.rotations] == [2, 2]
    assert content(tmp_path / "q") == content(tmp_path / "whole")
    report = read_report(tmp_path / "q")
    assert any("the one of seed 2 is kept" in note for note in report["notes"])
    assert [rotation["seed"] for rotation in report["plan"]["rotations"]] == [2, 2]

    def read(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", read)
    assert run(merge(recipe | {"out": tmp_path / "q"}), restart=False, listen=lambda event: None) == plan


@pytest.mark.parametrize("change", [{"rotation_trials": 2}, {"rotation_seed": 1}, {"rotate": "R1"}, {"rotation_block": 16}])
def test_another_recipe_in_the_folder_is_noticed_before_draws_are_compared(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    save_model(tmp_path / "m")
    recipe = {"model": str(tmp_path / "m"), "calib": str(text), "out": tmp_path / "q", **DRAWN}
    monkeypatch.setattr("bitlathe.starting.errors_of", lambda *_, **__: [0.1, 0.2, 0.3])
    interrupt_after(1, recipe)
    no_second_draw(monkeypatch)
    with pytest.raises(ResumeError, match=rf"recipe\.{next(iter(change))}"):
        run(merge(recipe | change), restart=False, listen=lambda event: None)


def test_comparing_draws_is_told_and_stays_in_the_run_s_own_folder(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "m", tie_word_embeddings=True)
    folders: list[Path] = []

    def budget(limit: int, folder: Path) -> Budget:
        folders.append(folder)
        return Budget(limit, folder)

    monkeypatch.setattr("bitlathe.starting.Budget", budget)
    recipe = {"model": str(tmp_path / "m"), "calib": str(text), "out": tmp_path / "q", **DRAWN}
    told = [note.text for note in listen_to(merge(recipe | {"memory": {"activations": 1}}), Note)]
    # What is known beforehand comes before the work.
    order = ["share one weight", "comparing 3 draws of random signs on 6 windows", "is kept: rounding the activations loses"]
    assert [next(i for i, text in enumerate(told) if words in text) for words in order] == sorted(
        i for i, text in enumerate(told) if any(words in text for words in order)
    )
    assert folders == [tmp_path / "q" / ".bitlathe" / "work"] * 3


def test_damaged_embeddings_are_named_before_draws_are_compared(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "m")
    model.get_input_embeddings().weight.data[5, 3] = float("nan")
    model.save_pretrained(tmp_path / "m")
    no_second_draw(monkeypatch)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has infinite or NaN values"):
        bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **DRAWN)


def test_a_linear_that_reads_zeros_has_no_say_in_the_draw(tmp_path: Path, text: Path) -> None:
    """Values of zero: what o_proj reads is nothing at all, whatever the signs."""
    model = save_model(tmp_path / "m")
    for name, weight in model.named_parameters():
        if name.endswith("v_proj.weight"):
            weight.data.zero_()
    model.save_pretrained(tmp_path / "m")
    asked = {"model": str(tmp_path / "m"), "calib": str(text), "out": tmp_path / "q"} | DRAWN
    told = [note.text for note in listen_to(merge(asked), Note)]
    assert any("is kept: rounding the activations loses" in text for text in told) and not any("nan" in text for text in told)


def test_draws_that_cannot_be_compared_are_not_said_to_have_been(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings of zero: every linear of the model reads zeros."""
    model = save_model(tmp_path / "m")
    model.get_input_embeddings().weight.data.zero_()
    model.save_pretrained(tmp_path / "m")
    asked = {"model": str(tmp_path / "m"), "calib": str(text), "out": tmp_path / "q"} | DRAWN | {"rotation_seed": 4}
    told = [note.text for note in listen_to(merge(asked), Note)]
    assert any("cannot be compared" in text and "of seed 4" in text for text in told)
    assert not any("is kept" in text for text in told)
    assert read_report(tmp_path / "q")["plan"]["rotations"][0]["seed"] == 4


READ = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from safetensors.torch import save_file
from test_rotated import edited
weights, names = edited(Path(sys.argv[1]), sys.argv[2])
save_file({name: tensor.contiguous() for name, tensor in weights.read(names).items()}, sys.argv[3])
"""


def edited(folder: Path, rotations: str) -> tuple[Weights, list[str]]:
    """The weights of an original as a rotated plan reads them, and the names of all in its second block."""
    asked = {"model": folder, "out": folder.parent / "q", "scheme": "W8A8", "rotate": rotations, "rtn": {"scale": "min-max"}}
    ready = prepare(merge(asked | {"tuner": "rtn"}))
    return ready.weights, ready.skeleton.parameters_of(ready.skeleton.blocks[1])


def test_a_second_read_gives_the_same_bytes(tmp_path: Path) -> None:
    """In this process and in another; nothing is written in between but what is asked for."""
    save_model(tmp_path / "m", "qwen2")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    weights, names = edited(tmp_path / "m", ALL)
    first, second = weights.read(names), weights.read(names)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    there = tmp_path / "there.safetensors"
    subprocess.run([sys.executable, "-c", READ, str(tmp_path / "m"), ALL, str(there)], check=True, env=environment)
    third = load_file(there)
    plain = edited(tmp_path / "m", "none")[0].read(names)
    for name in names:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]), name
        # All but the biases of queries and keys, and of what writes no space that is turned.
        changed = not torch.equal(first[name], plain[name])
        assert changed == (not name.endswith(("q_proj.bias", "k_proj.bias"))), name


@pytest.mark.parametrize(("when", "where"), [(1, "after"), (2, "after"), (1, "inside")])
def test_a_rotated_run_that_is_killed_and_continued(tmp_path: Path, text: Path, when: int, where: str) -> None:
    save_model(tmp_path / "m", num_hidden_layers=3, tie_word_embeddings=True)
    recipe = {"model": str(tmp_path / "m"), "calib": str(text), **W4A4, "scheme": "NVFP4", "rotation_block": 16}
    run(merge(recipe | {"out": tmp_path / "whole"}), restart=False, listen=lambda event: None)
    recipe |= {"out": str(tmp_path / "q")}
    died = subprocess.run([sys.executable, "-c", KILLED, json.dumps(recipe), str(when), where], check=False)
    assert died.returncode == -9
    assert not (tmp_path / "q" / "config.json").exists()
    # No weight of the rotated model lies anywhere: what there is are codes, and what is kept of finished blocks.
    shards = list((tmp_path / "q").rglob("*.safetensors"))
    written = {name for shard in shards if shard.stat().st_size for name in tensors_of(shard)}
    assert not any(name.endswith("proj.weight") and shape != 1 for name, shape in written)
    blocks = listen_to(merge(recipe), BlockReport)
    assert sum(block.resumed for block in blocks) == when
    assert content(tmp_path / "q") == content(tmp_path / "whole")


def tensors_of(shard: Path) -> list[tuple[str, int]]:
    """Names and numbers of dimensions."""
    try:
        with safe_open(shard, framework="pt") as file:
            return [(name, len(file.get_slice(name).get_shape())) for name in file.keys()]  # noqa: SIM118 not a dictionary
    except SafetensorError:  # torn by the kill
        return []


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rotations_leave_the_function_as_it_was(tmp_path: Path, text: Path, family: str) -> None:
    """In float32, all four of them."""
    save_model(tmp_path / "m", family, torch.float32)
    checkpoint = Checkpoint(tmp_path / "m")
    skeleton, weights = open_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    asked = {"model": tmp_path / "m", "out": tmp_path / "q", "scheme": "W4A4", "rotate": ALL, "calib": text, "seqlen": 24}
    ready = prepare(merge(asked))
    unrounded = {name: LayerPlan(online=row.online) if row.online else LayerPlan() for name, row in ready.plan.linears.items()}
    plan = ready.plan.model_copy(update={"linears": unrounded})
    turned = replace(weights, plan=plan, edits=edits_of(ready.skeleton, plan))
    before, after = through(skeleton, weights), through(ready.skeleton, turned)
    assert not torch.equal(before, after)
    assert ((after - before).norm() / before.norm()) < 1e-5
    assert {rotation.space for rotation in plan.rotations} == {"residual", "value", "qk", "mid"}
    online = {name.rpartition(".")[2] for name, row in plan.linears.items() if row.online}
    assert online == ({"down_proj"} if skeleton.arch.folds("residual") else {*online, "down_proj", "q_proj", "up_proj"})


def through(skeleton: Skeleton, weights: Weights) -> Tensor:
    """Logits of the original that `weights` reads, its cache turned as its plan says."""
    with tempfile.TemporaryDirectory() as folder:
        start = begin(skeleton, weights, TOKENS, Budget(2**30, Path(folder)), streams=1)
        for step in walk(skeleton, weights, start, batch_size=1):
            if weights.plan is not None:
                step.block.quantize_inputs(weights.plan, {})
        return skeleton.head(weights)(start.streams[0][:])
