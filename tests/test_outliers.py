"""A model with outliers added is the same function, and has them where they were asked for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.outliers import KINDS, Outliers, add_outliers, spread
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bitlathe
from bitlathe.errors import OutputError, RecipeError, UnsupportedModel
from bitlathe.io.checkpoint import find_folder
from bitlathe.model.calib import text_of
from families import FAMILIES, VOCABULARY, save_model, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

# Norms write their residual stream, or experts have spaces of their own.
REFUSED = ("gemma2", "gemma3_text", "olmo2", "qwen2_moe", "qwen3_moe", "olmoe")
# Which inputs each kind reaches.
REACHED = {"norm": {"q_proj", "gate_proj"}, "value": {"o_proj", "down_proj"}, "residual": {"q_proj", "gate_proj"}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_of("builtin", "calibration", characters=0)[0][:20_000], encoding="utf-8")
    return str(path)


def moved(model: str | Path, out: Path, vocabulary: int) -> float:
    """By how much the logits that transformers computes in float32 differ, relative to their size."""
    tokens = torch.randint(3, vocabulary, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits for folder in (model, out)
        )
    return ((after - before).norm() / before.norm()).item()


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_all_kinds_together(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    add_outliers("builtin", out, Outliers(text=text))
    source = find_folder("builtin")
    assert moved(source, out, 4096) < 1e-4
    found = bitlathe.evaluate(out, against="builtin", text=text, seqlen=64, windows=8)
    assert abs(found["kl_mean"]["value"]) < 1e-6
    before, after = spread("builtin", text), spread(out, text)
    assert before.keys() == after.keys() == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    assert all(after[name] > 20 and after[name] > 5 * before[name] for name in before)
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("float32", False)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_in_sixteen_bits_it_is_nearly_the_same(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    add_outliers("builtin", out, Outliers(text=text, dtype="bfloat16"))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert abs(bitlathe.evaluate(out, against="builtin", text=text, seqlen=64, windows=8)["kl_mean"]["value"]) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_alone(kind: str, tmp_path: Path, text: str) -> None:
    add_outliers("builtin", tmp_path, Outliers(kinds=(kind,), text=text))
    assert moved(find_folder("builtin"), tmp_path, 4096) < 1e-4
    before, after = spread("builtin", text), spread(tmp_path, text)
    for name, ratio in before.items():
        if name in REACHED[kind]:
            assert after[name] > (3 if kind == "residual" else 8) * ratio
        else:
            assert after[name] == pytest.approx(ratio, rel=1e-3)
    # Only a residual stream that is turned takes a head of its own.
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] == (kind != "residual")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_every_family_that_can_be_turned(family: str, tmp_path: Path) -> None:
    model, letters = tmp_path / "model", write_text(tmp_path / "text.txt", 1000)
    save_model(model, family)
    add_outliers(model, tmp_path / "out", Outliers(channels=4, text=str(letters)))
    assert moved(model, tmp_path / "out", VOCABULARY) < 1e-4
    # Random weights have outliers of their own behind the gate, so this is not in proportion to what was there.
    assert all(ratio > 20 for ratio in spread(tmp_path / "out", str(letters)).values())


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_turned_is_refused(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", family)
    with pytest.raises(UnsupportedModel, match=f"(?s){family}.*such as llama"):
        add_outliers(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_channels(tmp_path: Path, text: str) -> None:
    wanted = Outliers(text=text)
    for name, each in {"first": wanted, "second": wanted, "other": replace(wanted, seed=1)}.items():
        add_outliers("builtin", tmp_path / name, each)
    first, second, other = (content(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Outliers(kinds=("norm", "head")), "norm, head are not known. Known: norm, value, residual"),
        (Outliers(kinds=()), "none"),
        (Outliers(channels=65), "65 channels .* narrowest space has 64"),
        (Outliers(channels=0), "0 channels"),
        (Outliers(factor=0.0), "factor above 0"),
    ],
)
def test_what_cannot_be_made_is_refused(wanted: Outliers, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        add_outliers("builtin", tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists()


def test_nobody_s_files_are_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="new or an empty folder"):
        add_outliers("builtin", tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
