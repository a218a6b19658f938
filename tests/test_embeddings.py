"""Embeddings of few bits, alone and with a head that shares their weight: what was measured is what is shipped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import bitlathe
import bitlathe.hf
from bitlathe.autoscheme.kept import Kept
from bitlathe.autoscheme.measure import measure
from bitlathe.autoscheme.score import score
from bitlathe.errors import PlanError
from bitlathe.model.edit import coded
from bitlathe.numerics.project import dequantize
from bitlathe.numerics.scheme import SCHEMES
from bitlathe.plan import KEEP
from bitlathe.plan_file import fields_of
from bitlathe.prepare import prepare_search
from bitlathe.recipe import merge
from bitlathe.report import BlockReport, Event
from bitlathe.searching import ground_of
from families import VOCABULARY, save_model, write_text
from frozen import Frozen
from searches import quiet, ready_for

TABLE = "model.embed_tokens"
TOKENS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {"samples": 6, "seqlen": 24, "batch_size": 2, "iters": 3, "scheme": "W8A16G32"}
# family, changes of its config, overrides, rotations, what has a row
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, str], str, set[str]]] = {
    "untied": ("llama", {}, {"*embed_tokens": "W4A16G32"}, "none", {TABLE}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"*embed_tokens": "W4A16G32"}, "none", {TABLE}),
    "tied, by the head": ("qwen2", {}, {"lm_head": "W4A16G32_ASYM"}, "none", {TABLE}),
    "tied and scaled": ("gemma2", {"tie_word_embeddings": True}, {"lm_head": "W4A16G32"}, "none", {TABLE}),
    "parted by R1": ("qwen2", {}, {"*embed_tokens": "W4A16G32", "lm_head": "W8A8"}, "R1,R2", {TABLE, "lm_head"}),
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 400)


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return bitlathe.load(folder, "cpu")(TOKENS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_in_memory_saved_and_loaded_are_one_model(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    family, changes, overrides, rotate, rows = KINDS[kind]
    save_model(tmp_path / "m", family, **changes)
    frozen = Frozen(monkeypatch)
    formats = "native" if "lm_head" in rows else "native,dense"
    fields = {**SMALL, "overrides": overrides, "rotate": rotate, "calib": str(text), "formats": formats}
    plan = bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", **fields)
    assert {name for name in (TABLE, "lm_head") if name in plan.quantized} == rows
    folder = tmp_path / "q" / "native" if formats != "native" else tmp_path / "q"
    loaded = logits(folder)
    if "lm_head" not in rows:  # a head's own codes are not among the blocks that `Frozen` collects
        with torch.no_grad():
            assert torch.equal(loaded, frozen.model()(TOKENS).logits)
        assert torch.equal(loaded, logits(tmp_path / "q" / "dense"))
    elsewhere = (
        "import sys, torch, bitlathe; tokens = torch.load(sys.argv[2]); "
        "torch.save(bitlathe.load(sys.argv[1], 'cpu')(tokens).logits, sys.argv[3])"
    )
    torch.save(TOKENS, tmp_path / "t")
    subprocess.run([sys.executable, "-c", elsewhere, str(folder), str(tmp_path / "t"), str(tmp_path / "l")], check=True)
    assert torch.equal(torch.load(tmp_path / "l"), loaded)
    found = {row["name"]: row for row in bitlathe.inspect(folder)["linears"]}
    assert found[TABLE]["scheme"] == ("W4A16G32_ASYM" if "ASYM" in str(overrides) else "W4A16G32")
    assert found[TABLE]["bits"] == (4.625 if "ASYM" in str(overrides) else 4.5)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] == (len(rows) == 1 and kind != "untied")


def test_the_table_is_its_codes(tmp_path: Path, text: Path) -> None:
    model = save_model(tmp_path / "m")
    bitlathe.quantize(
        str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), overrides={"*embed_tokens": "W4A16G32"}, **SMALL
    )
    original = model.get_input_embeddings().weight.detach()
    loaded = bitlathe.load(tmp_path / "q", "cpu").get_input_embeddings().weight
    assert torch.equal(loaded, dequantize(coded(original, SCHEMES["W4A16G32"]), torch.bfloat16))
    assert not torch.equal(loaded, original)


def test_targets_know_nothing_of_it(tmp_path: Path, text: Path) -> None:
    """A block is tuned to undo what the embeddings lost, as what it will be given has lost it."""
    save_model(tmp_path / "m")
    told: list[Event] = []
    fields = {**SMALL, "calib": str(text), "scheme": "W8A16G32"}
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "a", listen=told.append, **fields)
    bitlathe.quantize(
        str(tmp_path / "m"), out=tmp_path / "b", listen=told.append, overrides={"*embed_tokens": "W2A16G32"}, **fields
    )
    losses = [event.loss_before for event in told if isinstance(event, BlockReport) and event.block == 0]
    assert losses[0] is not None and losses[1] is not None
    assert losses[1] > 10 * losses[0]


@pytest.mark.parametrize("after", [0, 1])
def test_a_run_that_is_continued_writes_the_same_bytes(tmp_path: Path, text: Path, after: int) -> None:
    save_model(tmp_path / "m", tie_word_embeddings=True)
    fields = {**SMALL, "calib": str(text), "overrides": {"lm_head": "W4A16G32"}}
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "whole", **fields)

    def stop(event: Event) -> None:
        if isinstance(event, BlockReport) and event.block == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", listen=stop, **fields)
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", **fields)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "q" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_them_after_our_import(tmp_path: Path, text: Path, *, tied: bool) -> None:
    save_model(tmp_path / "m", tie_word_embeddings=tied)
    overrides = {"*embed_tokens": "W4A16G32_ASYM"}
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), overrides=overrides, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits(tmp_path / "q"))


def test_a_dense_folder_with_activations_has_ordinary_embeddings(tmp_path: Path, text: Path) -> None:
    save_model(tmp_path / "m")
    fields = {**SMALL, "scheme": "W8A8", "overrides": {"*embed_tokens": "W4A16G32"}, "formats": "native,dense"}
    bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), **fields)
    assert torch.equal(logits(tmp_path / "q" / "dense"), logits(tmp_path / "q" / "native"))


def test_what_overrides_say_of_a_shared_weight_takes_it_out_of_a_search() -> None:
    for overrides, include in (({"lm_head": "W8A16"}, ()), ({"*head": "keep"}, ("lm_head",)), ({"*embed_tokens": "W8A16"}, ())):
        space = ready_for(4.0, schemes="W3A16,W5A16,keep", overrides=overrides, include=include).space
        assert space is not None
        assert TABLE not in space.rows
        assert (TABLE in space.plan.quantized) == (KEEP not in overrides.values())


def test_a_plan_says_one_thing_of_a_shared_weight() -> None:
    plan = ready_for(4.0, schemes="W4A16,W3A16", include="lm_head").plan
    lines = fields_of(plan)["linears"]
    prepare_search(merge({"model": "builtin", "out": ".", "linears": lines, "calib": "builtin", "seqlen": 64}), [])
    with pytest.raises(
        PlanError, match=r"lm_head W8A16, and it can only have keep: it shares its weight with model\.embed_tokens"
    ):
        prepare_search(merge({"model": "builtin", "out": ".", "linears": {**lines, "lm_head": "W8A16"}}), [])


def test_embeddings_that_a_search_keeps_have_no_row(tmp_path: Path) -> None:
    text = {"calib": "builtin", "seqlen": 64, "batch_size": 4}
    fields = {**text, "schemes": "W4A16,keep", "include": "embed_tokens", "search": {"tokens": 1024, "held_out": 512}}
    plan = bitlathe.search("builtin", bits=15.9, scores=tmp_path / "scores", **fields)
    assert TABLE not in plan.linears
    assert bitlathe.quantize("builtin", plan=plan, out=tmp_path / "q", samples=8, tuner="rtn", **text) == plan


@pytest.mark.parametrize(
    ("include", "rotate", "joined"),
    [("lm_head", "none", [TABLE]), ("embed_tokens", "none", [TABLE]), ("lm_head,embed_tokens", "R1", ["lm_head", TABLE])],
)
@pytest.mark.usefixtures("one_thread")
def test_a_score_foretells_what_embeddings_lose(tmp_path: Path, include: str, rotate: str, joined: list[str]) -> None:
    """The bundled model is tied: its head and embeddings are one, until R1 parts them."""
    fields = {"schemes": "W3A16,W6A16,keep", "include": include, "rotate": rotate}
    ground = ground_of(ready_for(8.0, seqlen=128, search={"tokens": 4096, "held_out": 2048}, **fields))
    space = ground.space
    assert [name for name in space.rows if ".layers." not in name] == joined
    nothing = dict.fromkeys(space.groups, KEEP)
    pairs = [(name, option) for name in joined for option in ("W3A16", "W6A16")]
    with Kept(tmp_path, {}) as kept:
        score(ground, kept, quiet)
        plans = [space.planned({**nothing, name: option}) for name, option in pairs]
        base, *true = measure(ground, kept, [space.planned(nothing), *plans], quiet)
    for (name, option), found in zip(pairs, true, strict=True):
        assert 0.5 < (found.kl - base.kl) / kept.scores[name][option].loss < 2


def test_a_search_with_everything_is_carried_out_as_it_was_measured(tmp_path: Path) -> None:
    text = {"calib": "builtin", "seqlen": 64, "batch_size": 4}
    fields = {**text, "schemes": "INT4,INT8,keep", "include": "lm_head", "search": {"tokens": 2048, "held_out": 1024}}
    plan = bitlathe.search("builtin", bits=7.0, scores=tmp_path / "scores", **fields)
    assert plan.linears[TABLE].input is None
    bitlathe.quantize("builtin", plan=plan, out=tmp_path / "q", samples=32, tuner="rtn", **text)
    (scores,) = (path for path in (tmp_path / "scores").iterdir() if path.name != "smoothing")
    measured = [json.loads(line) for line in (scores / "measured.jsonl").read_text().splitlines()]
    true = bitlathe.evaluate(tmp_path / "q", against="builtin", seqlen=64, windows=64)["kl_mean"]["value"]
    assert any(0.75 < true / row["kl"] < 1.25 for row in measured if row["kl"])
    assert bitlathe.inspect(tmp_path / "q")["bits_linears"] <= 7.0
