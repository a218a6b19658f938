"""Smoothed models: the same function, other roundings, and nothing that a checkpoint would have to say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.outliers import Outliers, add_outliers
from safetensors.torch import load_file

import bitlathe
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.calib import text_of
from bitlathe.model.fold import edits_of
from bitlathe.model.smooth import junctions_of
from bitlathe.model.source import open_model
from bitlathe.pipeline import run
from bitlathe.plan import LayerPlan
from bitlathe.prepare import prepare
from bitlathe.recipe import merge
from bitlathe.report import Note, read_report
from families import FAMILIES, save_model, write_text
from test_pipeline import content, interrupt_after, listen_to
from test_rotated import through

pytestmark = pytest.mark.usefixtures("one_thread")

FEW: dict[str, Any] = {"samples": 6, "seqlen": 24, "batch_size": 2, "tuner": "rtn"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt", 400)


@pytest.mark.parametrize("rotate", ["none", "R2,R4", "R1,R2,R3,R4"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_smoothing_leaves_the_function_as_it_was(tmp_path: Path, text: Path, family: str, rotate: str) -> None:
    """Bit for bit in float32, where nothing is rotated after it: no float is rounded by a power of two."""
    save_model(tmp_path / "m", family, torch.float32)
    skeleton, weights = open_model(Checkpoint(tmp_path / "m"), device=torch.device("cpu"), dtype=torch.float32)
    asked = {"model": tmp_path / "m", "out": tmp_path / "q", "scheme": "W4A4", "rotate": rotate, "calib": text, "seqlen": 24}
    ready = prepare(merge(asked))
    unrounded = {name: LayerPlan(online=row.online) for name, row in ready.plan.linears.items()}
    plan = ready.plan.model_copy(update={"linears": unrounded})
    junctions = [junction for block in junctions_of(ready.skeleton, ready.plan).values() for junction in block]
    # The plan that is run quantizes nothing, and would leave no junction.
    every = ready.plan.model_copy(
        update={"linears": {name: row.model_copy(update={"input": None}) for name, row in ready.plan.linears.items()}}
    )
    generator = torch.Generator().manual_seed(0)
    factors = {
        junction.writer: torch.exp2(torch.randint(-2, 3, (junction.width,), generator=generator).float())
        for junction in junctions
    }
    smoothed = replace(weights, plan=plan, edits=edits_of(ready.skeleton, every, factors))
    read = {name: smoothed.read([name])[name] for name in ready.skeleton.shapes}
    plain = replace(weights, plan=plan, edits=edits_of(ready.skeleton, every))
    other = {name for name, tensor in read.items() if not torch.equal(tensor, plain.read([name])[name])}
    written = {name for junction in junctions for name in (f"{junction.writer}.weight", f"{junction.writer}.bias")}
    assert other == (written & read.keys()) | {f"{name}.weight" for junction in junctions for name in junction.readers}
    before, after = through(ready.skeleton, plain), through(ready.skeleton, smoothed)
    if rotate == "none":
        assert torch.equal(before, after)
    assert ((after - before).norm() / before.norm()) < 1e-5
    ends = {junction.writer.rpartition(".")[2].removesuffix("_proj") for junction in junctions}
    norms = skeleton.arch.folds("residual") and "R1" not in rotate
    assert ends & {"v", "qkv"}
    assert ends & {"up", "gate_up"}
    assert any("norm" in end for end in ends) is norms


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with outliers in its norms' channels and values."""
    folder = tmp_path_factory.mktemp("outliers")
    (folder / "text.txt").write_text(text_of("builtin", "calibration", characters=0)[0][:40_000], encoding="utf-8")
    add_outliers("builtin", folder / "m", Outliers(kinds=("norm", "value"), text=str(folder / "text.txt"), dtype="bfloat16"))
    return folder


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"scheme": "MXFP4"}, 0.2),
        ({"scheme": "NVFP4"}, 0.4),
        ({"scheme": "W4A4", "rotate": "R1,R2,R4"}, 0.4),
        ({"scheme": "W2A16G32"}, 0.9),
    ],
)
def test_outliers_cost_less(tmp_path: Path, outliers: Path, fields: dict[str, Any], part: float) -> None:
    recipe = {"model": str(outliers / "m"), "calib": str(outliers / "text.txt"), "samples": 8, "seqlen": 128, "tuner": "rtn"}
    found = {}
    for smooth in (True, False):
        out = tmp_path / str(smooth)
        notes = listen_to(merge(recipe | fields | {"out": out, "smooth": smooth}), Note)
        assert any("smoothed in" in note.text for note in notes) is smooth
        assert any("smoothed in" in note for note in read_report(out)["notes"]) is smooth
        found[smooth] = bitlathe.evaluate(out, against="builtin", seqlen=128, windows=16)["kl_mean"]["value"]
    assert found[True] < part * found[False]


def test_what_is_not_quantized_keeps_its_function(tmp_path: Path, outliers: Path) -> None:
    """Kept linears read what smoothed norms hand on: in 16 bits they are still the original's."""
    recipe = {"model": str(outliers / "m"), "calib": str(outliers / "text.txt"), "samples": 4, "seqlen": 64, "tuner": "rtn"}
    overrides = {"*": "keep", "*.0.self_attn.q_proj": "W8A8"}
    bitlathe.quantize(**recipe, out=tmp_path / "q", overrides=overrides)
    found = bitlathe.evaluate(tmp_path / "q", against=outliers / "m", seqlen=64, windows=4)
    assert found["kl_mean"]["value"] < 1e-3
    (was, now) = (load_all(folder) for folder in (outliers / "m", tmp_path / "q"))
    name = "model.layers.0.input_layernorm.weight"
    ratio = now[name].float() / was[name].float()
    assert not torch.equal(ratio, torch.ones_like(ratio))
    for reader in ("k_proj", "v_proj"):
        weight = f"model.layers.0.self_attn.{reader}.weight"
        assert torch.equal(now[weight].float() * ratio, was[weight].float())
    assert torch.equal(now["model.layers.1.input_layernorm.weight"], was["model.layers.1.input_layernorm.weight"])


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("fields", [{"smooth": False}, {"rtn": {"scale": "min-max"}}])
def test_nothing_is_measured_where_nobody_asks_or_no_text_is_read(
    tmp_path: Path, text: Path, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "m")
    refuse_to_measure(monkeypatch)
    run(
        merge({"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **FEW, "scheme": "W8A8", **fields}),
        restart=False,
        listen=lambda event: None,
    )


def refuse_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("bitlathe.starting.smoothing_of", measured)


def test_a_run_that_is_continued_keeps_its_factors(tmp_path: Path, outliers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"model": str(outliers / "m"), "calib": str(outliers / "text.txt"), "samples": 4, "seqlen": 64, "tuner": "rtn"}
    recipe |= {"scheme": "MXFP4"}
    run(merge(recipe | {"out": tmp_path / "whole"}), restart=False, listen=lambda event: None)
    interrupt_after(1, recipe | {"out": tmp_path / "q"})
    refuse_to_measure(monkeypatch)
    notes = listen_to(merge(recipe | {"out": tmp_path / "q"}), Note)
    assert any("smoothed in" in note.text for note in notes)
    assert content(tmp_path / "q") == content(tmp_path / "whole")


def test_text_that_is_not_finite_smooths_nothing(tmp_path: Path, text: Path) -> None:
    """A model whose values are all zero, and one whose numbers overflow, are left as they are."""
    model = save_model(tmp_path / "m", num_hidden_layers=1)
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.v_proj").get_parameter("weight").zero_()
        model.get_submodule("model.layers.0.mlp.up_proj").get_parameter("weight").fill_(1e38)
    model.save_pretrained(tmp_path / "m")
    recipe = {"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **FEW, "scheme": "W8A8"}
    notes = listen_to(merge(recipe), Note)
    assert any("smoothed" in note.text for note in notes)
    now = load_all(tmp_path / "q")
    assert all(torch.isfinite(tensor.float()).all() for tensor in now.values())
