"""Whole runs: what is frozen in memory is what is written, read back and continued."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bitlathe
import bitlathe.hf
from bitlathe.errors import OutputError, ResumeError
from bitlathe.pipeline import run
from bitlathe.prepare import prepare
from bitlathe.recipe import merge
from bitlathe.report import BlockReport, Event, Note, Step, inspect, read_report
from families import FAMILIES, VOCABULARY, save_model, write_text
from frozen import Frozen

TOKENS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {"samples": 6, "seqlen": 24, "batch_size": 2, "iters": 4, "scheme": "W4A16G32"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 400)


def content(folder: Path) -> dict[str, str]:
    """Every file but those that hold times."""
    timed = {"report.json", "progress.jsonl"}
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file() and p.name not in timed}


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return bitlathe.load(folder, "cpu")(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_in_memory_saved_and_loaded_are_one_model(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    save_model(tmp_path / "m", family)
    frozen = Frozen(monkeypatch)
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **SMALL)
    loaded = logits(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(loaded, frozen.model()(TOKENS).logits)
    assert not torch.equal(loaded, logits(tmp_path / "m"))


COMPUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "closed-form, rotated": ("qwen2", {"scheme": "W4A4", "rotate": "R1,R2,R4", "tuner": "closed-form", "iters": 200}),
    "signround, rotated": ("llama", {"scheme": "W4A4", "rotate": "R1,R2,R4", "tuner": "signround"}),
    "static scales, cache": ("gemma2", {"scheme": "W8A8_STATIC", "kv": "8", "tuner": "signround"}),
    "experts": ("qwen3_moe", {"scheme": "NVFP4", "tuner": "closed-form", "iters": 200}),
    "end to end": ("qwen3", {"scheme": "W4A16G32", "tuner": "closed-form", "effort": "best", "iters": 200}),
}


@pytest.mark.parametrize(("family", "asked"), COMPUTED.values(), ids=COMPUTED)
def test_a_run_in_float32_makes_the_model_that_is_loaded(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, family: str, asked: dict[str, Any]
) -> None:
    """The weights in memory are those of a result in bfloat16."""
    save_model(tmp_path / "m", family)
    monkeypatch.setattr("bitlathe.prepare.computed_in", lambda dtype, device: torch.float32)
    frozen = Frozen(monkeypatch)
    recipe = merge({"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **SMALL, **asked})
    notes = listen_to(recipe, Note)
    assert (frozen.weights.dtype, frozen.weights.held) == (torch.float32, torch.bfloat16)
    if asked.get("effort") != "best":  # which writes the blocks anew
        with torch.no_grad():
            assert torch.equal(logits(tmp_path / "q"), frozen.model()(TOKENS).logits)
    stored = {tensor.dtype for file in (tmp_path / "q").glob("*.safetensors") for tensor in load_file(file).values()}
    assert torch.bfloat16 in stored and torch.float32 not in stored
    assert any("no products of bf16" in note.text for note in notes)


def test_a_run_is_not_continued_in_another_arithmetic(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "m")
    asked = merge({"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **SMALL})
    parts = []
    for computed in (torch.bfloat16, torch.float32):
        monkeypatch.setattr("bitlathe.prepare.computed_in", lambda dtype, device, computed=computed: computed)
        parts.append(prepare(asked).fingerprint())
    assert {key for key, value in parts[0].items() if value != parts[1][key]} == {"arithmetic"}


def test_a_fresh_process_gives_the_same_logits_and_generates(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m", tie_word_embeddings=True)
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **SMALL | {"tuner": "rtn"})
    torch.save({"tokens": TOKENS, "logits": logits(tmp_path / "q")}, tmp_path / "expected.pt")
    program = f"""
import torch, bitlathe
torch.set_num_threads({torch.get_num_threads()})
expected = torch.load({str(tmp_path / "expected.pt")!r})
model = bitlathe.load({str(tmp_path / "q")!r}, "cpu")
with torch.no_grad():
    assert torch.equal(model(expected["tokens"]).logits, expected["logits"])
row = expected["tokens"][:1]
assert model.generate(row, max_new_tokens=4, do_sample=False).shape == (1, 28)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("fp16", torch.float16), ("bf16", torch.float32)], ids=["fp16 model", "fp32 model in bf16"]
)
def test_other_dtypes(tmp_path: Path, text: Path, dtype: str, stored: torch.dtype) -> None:
    save_model(tmp_path / "m", dtype=stored)
    notes = listen_to(merge({"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **SMALL}), Note)
    assert bitlathe.load(tmp_path / "q", "cpu").dtype == (torch.float16 if dtype == "fp16" else torch.bfloat16)
    assert any("stored in fp32" in note.text for note in notes) == (stored == torch.float32)


def test_biases_shards_and_an_untied_head_that_is_quantized(tmp_path: Path, text: Path) -> None:
    model = save_model(tmp_path / "m", attention_bias=True, mlp_bias=True)
    (tmp_path / "m" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    overrides = {"lm_head": "W8A16_CHANNEL", "*.0.mlp.*": "keep", "*down_proj": "W8A16G32_ASYM"}
    plan = bitlathe.quantize(
        str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), overrides=overrides, **SMALL | {"tuner": "rtn"}
    )
    assert set(plan.linears) - set(plan.quantized) == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}
    report = inspect(tmp_path / "q")
    kept = {row["name"]: row["kept"] for row in report["linears"] if row["kept"]}
    assert kept == dict.fromkeys(sorted(set(plan.linears) - set(plan.quantized)), "the override *.0.mlp.*=keep")
    error = (logits(tmp_path / "q") - logits(tmp_path / "m")).abs().max()
    assert 0 < error < 1
    loaded = bitlathe.load(tmp_path / "q", "cpu")
    assert torch.equal(loaded.get_submodule("model.layers.1.mlp.down_proj").bias, model.model.layers[1].mlp.down_proj.bias)


def test_several_formats_hold_the_same_weights(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m")
    formats = ("native", "compressed-tensors", "dense")
    plan = bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), formats=formats, **SMALL)
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == sorted([*formats, "progress.jsonl"])
    first, *others = [bitlathe.load(tmp_path / "q" / name, "cpu") for name in formats]
    others += [AutoModelForCausalLM.from_pretrained(tmp_path / "q" / name) for name in formats]
    with torch.no_grad():  # also where compressed-tensors decompresses
        assert all(torch.equal(other(TOKENS).logits, first(TOKENS).logits) for other in others)
    for name in plan.quantized:
        weight = first.get_submodule(name).weight
        assert all(torch.equal(weight, other.get_submodule(name).weight) for other in others)
    assert inspect(tmp_path / "q" / "dense")["bits_linears"] == 16
    assert inspect(tmp_path / "q" / "native")["linears"][0]["scheme"] == "W4A16G32"


def test_the_room_asked_for_is_what_is_written(tmp_path: Path, text: Path) -> None:
    """But for headers, small files, and the few bytes of static scales."""
    save_model(tmp_path / "m", tie_word_embeddings=True)
    asked = SMALL | {"tuner": "rtn", "overrides": {"*.o_proj": "W3A16_CHANNEL", "*.down_proj": "FP8_BLOCK"}}
    formats = ("native", "compressed-tensors", "dense")
    recipe = merge({"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **asked, "formats": formats})
    needed = prepare(recipe).bytes_needed()
    run(recipe, restart=False, listen=lambda event: None)
    assert needed == sum(inspect(tmp_path / "q" / format)["bytes"] for format in formats)
    # The codes to resume from are written whatever is asked for.
    others = recipe.model_copy(update={"formats": formats[1:], "out": tmp_path / "others"})
    assert prepare(others).bytes_needed() == needed


def listen_to(recipe: Any, kind: type[Event] | None = None) -> list[Any]:
    events: list[Event] = []
    run(recipe, restart=False, listen=events.append)
    return [event for event in events if kind is None or isinstance(event, kind)]


def test_what_is_told(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m")
    recipe = merge({"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **SMALL, "samples": 100})
    events = listen_to(recipe)
    assert "16 windows of 24 tokens, fewer than --samples 100" in next(e.text for e in events if isinstance(e, Note))
    assert [e.step for e in events if isinstance(e, Step)] == [4, 4]
    blocks = [e for e in events if isinstance(e, BlockReport)]
    assert [b.name for b in blocks] == ["model.layers.0", "model.layers.1", "head"]
    assert all(b.linears == 7 and b.loss_before and b.loss_after and b.loss_after <= b.loss_before for b in blocks[:2])
    told = [json.loads(line) for line in (tmp_path / "q" / "progress.jsonl").read_text().splitlines()]
    report = read_report(tmp_path / "q")
    assert told == report["blocks"] == [b.model_dump() for b in blocks]
    assert (report["quantized"], report["linears"]) == (14, 15)
    assert report["kept"] == {"lm_head": "the output head stays in 16 bits unless asked for"}
    sizes = inspect(tmp_path / "q")
    assert report["sizes"] == {key: sizes[key] for key in report["sizes"]}
    tensors = sum(file.stat().st_size for file in (tmp_path / "q").glob("*.safetensors"))
    assert sizes["bytes"] <= tensors < sizes["bytes"] + 20_000
    assert sizes["bits_quantized"] == 4.5  # W4 and a 16-bit scale for 32 inputs


# Journal


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from bitlathe.io import writer
from bitlathe.pipeline import run
from bitlathe.recipe import merge
import json
recipe, when, where = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
count = 0
def die(): os.kill(os.getpid(), signal.SIGKILL)
put, save = writer.Writer.put, writer.save
def counted_put(self, *args):
    global count
    put(self, *args)
    count += 1
    if where == "after" and count == when: die()
def torn_save(path, tensors):
    save(path, tensors)
    if where == "inside" and count == when:
        with open(path, "r+b") as file: file.truncate(os.path.getsize(path) // 2)
        die()
writer.Writer.put, writer.save = counted_put, torn_save
run(merge(recipe), restart=False, listen=lambda event: None)
"""


@pytest.mark.parametrize(("when", "where"), [(1, "after"), (2, "after"), (3, "after"), (0, "inside"), (1, "inside")])
def test_killed_and_continued_gives_the_same_bytes(
    tmp_path: Path, three_blocks: dict[str, Any], uninterrupted: dict[str, str], when: int, where: str
) -> None:
    recipe = three_blocks | {"out": str(tmp_path / "q")}
    died = subprocess.run([sys.executable, "-c", KILLED, json.dumps(recipe), str(when), where], check=False)
    assert died.returncode == -9
    assert not (tmp_path / "q" / "config.json").exists()
    blocks = listen_to(merge(recipe), BlockReport)
    assert sum(block.resumed for block in blocks) == when
    assert content(tmp_path / "q") == uninterrupted


@pytest.fixture(scope="module")
def three_blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe but for where its result goes."""
    folder = tmp_path_factory.mktemp("source")
    save_model(folder / "m", num_hidden_layers=3)
    return {"model": str(folder / "m"), "calib": str(write_text(folder / "text.txt", 400)), **SMALL}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, three_blocks: dict[str, Any]) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "q"
    run(merge(three_blocks | {"out": out}), restart=False, listen=lambda event: None)
    return content(out)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seed": 1}, r"calibration, recipe\.seed \(0 -> 1\)"),
        ({"scheme": "W3A16G32"}, r'recipe\.scheme \("W4A16G32" -> "W3A16G32"\)'),
        ({"samples": 5}, r"calibration, recipe\.samples \(6 -> 5\)"),
    ],
)
def test_another_recipe_is_noticed(tmp_path: Path, text: Path, change: dict[str, Any], part: str) -> None:
    save_model(tmp_path / "m")
    recipe = {"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **SMALL}
    interrupt_after(1, recipe)
    with pytest.raises(ResumeError, match=rf"differs from this one in: {part}\..*--restart"):
        run(merge(recipe | change), restart=False, listen=lambda event: None)
    run(merge(recipe | change), restart=True, listen=lambda event: None)
    assert read_report(tmp_path / "q")["recipe"]["scheme"] == (recipe | change)["scheme"]


def test_another_model_and_another_text_are_noticed(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m")
    recipe = {"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **SMALL}
    interrupt_after(1, recipe)
    text.write_text(text.read_text().replace("a", "b"))
    with pytest.raises(ResumeError, match="in: calibration"):
        run(merge(recipe), restart=False, listen=lambda event: None)
    write_text(text, 400)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    file = tmp_path / "m" / "model.safetensors"
    content_before = bytearray(file.read_bytes())
    content_before[-2:] = b"\x01\x02"
    file.write_bytes(content_before)
    assert tensors.keys() == load_file(file).keys()
    with pytest.raises(ResumeError, match="in: model"):
        run(merge(recipe), restart=False, listen=lambda event: None)


class _Stop(KeyboardInterrupt):
    pass


def interrupt_after(blocks: int, recipe: dict[str, Any]) -> None:
    """Ctrl-C after some blocks."""

    def listen(event: Event) -> None:
        if isinstance(event, BlockReport) and event.block + 1 == blocks:
            raise _Stop

    with pytest.raises(_Stop):
        run(merge(recipe), restart=False, listen=listen)


def test_a_second_run_into_the_folder_is_refused(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m")
    recipe = {"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **SMALL}

    def listen(event: Event) -> None:
        if isinstance(event, BlockReport) and event.block == 0:
            with pytest.raises(OutputError, match="Another run is writing"):
                run(merge(recipe), restart=False, listen=lambda event: None)

    run(merge(recipe), restart=False, listen=listen)
    notes = listen_to(merge(recipe), Note)
    assert "already holds this very result" in notes[-1].text


def test_a_source_that_vanishes_leaves_the_finished_blocks(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m", num_hidden_layers=4)
    recipe = {"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **SMALL}
    weights = tmp_path / "m" / "model.safetensors"

    def listen(event: Event) -> None:
        if isinstance(event, BlockReport) and event.block == 0:
            weights.rename(tmp_path / "hidden")

    with pytest.raises(
        bitlathe.errors.CheckpointError, match=r"model\.safetensors cannot be read.*still there.*1 of 5 .* safe"
    ):
        run(merge(recipe), restart=False, listen=listen)
    (tmp_path / "hidden").rename(weights)
    blocks = listen_to(merge(recipe), BlockReport)
    assert blocks[0].resumed
