"""Smoothed models: the same function, other roundings, and nothing that a checkpoint would have to say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.outliers import Outliers, add_outliers
from safetensors.torch import load_file, save_file

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
from bitlathe.starting import best_smoothing, smooths
from bitlathe.tune.smoothing import _Seen
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
    junctions = [junction for block in junctions_of(ready.skeleton, plan).values() for junction in block]
    generator = torch.Generator().manual_seed(0)
    factors = {
        junction.writer: torch.exp2(torch.randint(-2, 3, (junction.width,), generator=generator).float())
        for junction in junctions
    }
    smoothed = replace(weights, plan=plan, edits=edits_of(ready.skeleton, plan, factors))
    read = {name: smoothed.read([name])[name] for name in ready.skeleton.shapes}
    plain = replace(weights, plan=plan, edits=edits_of(ready.skeleton, plan))
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


def test_numbers_that_are_not_finite_smooth_nothing(tmp_path: Path, text: Path) -> None:
    """Values that are all zero, and channels that overflow, are left as they are."""
    model = save_model(tmp_path / "m", num_hidden_layers=1)
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.v_proj").get_parameter("weight").zero_()
        model.get_submodule("model.layers.0.mlp.up_proj").get_parameter("weight").fill_(1e38)
    model.save_pretrained(tmp_path / "m")
    recipe = {"model": str(tmp_path / "m"), "out": tmp_path / "q", "calib": str(text), **FEW, "scheme": "W8A8", "seqlen": 48}
    overrides = {"*": "keep", "*.o_proj": "W8A8", "*.down_proj": "W8A8"}
    notes = listen_to(merge(recipe | {"overrides": overrides}), Note)
    assert any("nothing is smoothed" in note.text for note in notes)
    was, now = load_all(tmp_path / "m"), load_all(tmp_path / "q")
    kept = [name for name in was.keys() & now.keys() if not name.endswith(("o_proj.weight", "down_proj.weight"))]
    assert len(kept) >= 9
    assert all(torch.equal(was[name], now[name]) for name in kept)


def best(model: Path, text: Path, folder: Path, **fields: Any) -> dict[str, torch.Tensor]:
    """The factors of a run with 4 windows."""
    recipe = {"model": str(model), "out": folder / "q", "calib": str(text), **FEW, "seqlen": 48, "scheme": "MXFP4", **fields}
    ready = prepare(merge(recipe))
    assert smooths(ready)
    return best_smoothing(ready, folder, lambda event: None)[0]


def stretched(folder: Path) -> None:
    """A random model with a channel that sticks out in every place inside of blocks, and is made up for behind it."""
    model = save_model(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("v_proj.weight", "mlp.up_proj.weight")):
                weight[5] *= 32
            if name.endswith("mlp.down_proj.weight"):
                weight[:, 5] /= 32
            if name.endswith("o_proj.weight"):
                weight[:, [5, 21]] /= 32  # of the two heads that read the first head's values
    model.save_pretrained(folder)


def stretch(folder: Path, mlp: str, channel: int, by: float) -> None:
    """In a saved model, a channel behind the gate of the MLPs whose names have `mlp` in them, likewise."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if f"{mlp}.up_proj" in name:
            weight[channel] *= by
        if f"{mlp}.down_proj" in name:
            weight[:, channel] /= by
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_channel_that_sticks_out_is_found(tmp_path: Path, text: Path) -> None:
    stretched(tmp_path / "m")
    found = best(tmp_path / "m", text, tmp_path)
    for block in range(2):
        for writer in ("self_attn.v_proj", "mlp.up_proj"):
            factors = found[f"model.layers.{block}.{writer}"]
            assert factors.argmax() == 5
            assert factors[5] >= 8 * factors.median()


def test_the_cache_keeps_its_values(tmp_path: Path, text: Path) -> None:
    stretched(tmp_path / "m")
    found = best(tmp_path / "m", text, tmp_path, kv="KV4")
    assert found
    assert not any("v_proj" in name for name in found)


def test_few_tokens_choose_nothing(tmp_path: Path, text: Path) -> None:
    stretched(tmp_path / "m")
    assert best(tmp_path / "m", text, tmp_path, seqlen=24) == {}


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4", "W8A8_STATIC"])
def test_experts(tmp_path: Path, scheme: str) -> None:
    """Each has channels of its own, but where one scale serves all of them."""
    save_model(tmp_path / "m", "qwen2_moe", moe_intermediate_size=32)
    stretch(tmp_path / "m", ".experts.1", 7, 64)
    text = write_text(tmp_path / "text.txt", 4000)
    found = best(tmp_path / "m", text, tmp_path, scheme=scheme, seqlen=512, smooth=True)
    own = {name for name in found if ".experts." in name}
    if scheme == "W8A8_STATIC":
        assert not own
    else:
        assert found["model.layers.0.mlp.experts.1.up_proj"].argmax() == 7


def test_a_token_of_extreme_norm_has_no_say() -> None:
    """Neither in factors nor in errors; but its largest numbers count for what fp16 can hold."""
    seen = _Seen({"a": 1})
    x = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    x[0, 1, 3] = 1e4
    seen.see("a", x)
    assert seen.count("a") == 31
    assert seen.sample("a").abs().max() < 10
    assert seen.largest["a"][3] == 1e4


@pytest.mark.parametrize("tokens", [0, 1])
def test_an_expert_with_one_token_or_none_has_no_say(tokens: int) -> None:
    seen = _Seen({"a": 1})
    seen.see("a", torch.ones(tokens, 8))
    assert seen.count("a") == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_dtype_bounds_the_factors(tmp_path: Path, text: Path, dtype: str) -> None:
    save_model(tmp_path / "m")
    stretch(tmp_path / "m", ".mlp", 5, 1024)
    largest = max(factors.log2().abs().max().item() for factors in best(tmp_path / "m", text, tmp_path, dtype=dtype).values())
    assert 4 < largest <= 8 if dtype == "bf16" else largest <= 4


def test_other_signs_and_other_plans_are_smoothed_too(tmp_path: Path, text: Path) -> None:
    stretched(tmp_path / "m")
    asked = {"model": tmp_path / "m", "out": tmp_path / "q", "scheme": "W4A4", "rotate": "R2", "calib": text, "seqlen": 24}
    ready = prepare(merge(asked))
    factors = {"model.layers.0.self_attn.v_proj": torch.exp2(torch.arange(32) % 5 - 2.0)}
    name = "model.layers.0.self_attn.o_proj.weight"
    plain, smoothed = (each.weights.read([name])[name] for each in (ready.reseeded(3), ready.smoothed(factors).reseeded(3)))
    assert not torch.equal(plain, smoothed)
    again = ready.reseeded(3).smoothed(factors).weights.read([name])[name]
    assert torch.equal(smoothed, again)


def test_a_search_measures_the_smoothed_model(tmp_path: Path, outliers: Path) -> None:
    """What it says is what the result has, up to the other text that it says it of."""
    fields = {"calib": str(outliers / "text.txt"), "samples": 8, "seqlen": 128, "tuner": "rtn", "scores": tmp_path / "scores"}
    fields |= {"schemes": "MXFP4,MXFP8", "bits": 5}
    out = tmp_path / "q"
    notes = listen_to(merge({"model": str(outliers / "m"), "out": out, **fields}), Note)
    assert any("smoothed in" in note.text for note in notes)
    predicted = read_report(out)["search"]["kl"]
    measured = bitlathe.evaluate(out, against=outliers / "m", seqlen=128, windows=16)["kl_mean"]["value"]
    assert 0.5 < measured / predicted < 2
