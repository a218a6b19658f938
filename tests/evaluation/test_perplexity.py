"""What is measured equals what transformers computes from the whole model, and is recorded beside it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import bitlathe
from bitlathe import cli
from bitlathe.errors import BitlatheError, CalibrationError, CheckpointError, RecipeError
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.calib import tokenizer_of
from bitlathe.pipeline import run
from bitlathe.recipe import merge
from bitlathe.report import Note, inspect, record_evaluation
from families import save_model, write_text

SEQLEN = 24
COMPARED = {"perplexity", "perplexity_against", "kl_mean", "kl_median", "kl_99", "kl_max", "top1_agreement"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model "m", two quantizations "native" and "compressed-tensors" in "q", and a text."""
    folder = tmp_path_factory.mktemp("made")
    # Weights as large as these make predictions that are far from uniform, and errors that can be seen.
    model = save_model(folder / "m", initializer_range=0.3)
    assert model.lm_head.weight.std() > 0.2
    bitlathe.quantize(
        str(folder / "m"),
        out=folder / "q",
        calib=str(write_text(folder / "calib.txt", 400)),
        scheme="W3A16G32",
        tuner="rtn",
        seqlen=SEQLEN,
        formats="native,compressed-tensors",
    )
    write_text(folder / "text.txt", 500)
    return folder


def tokens_of(made: Path) -> Tensor:
    text = (made / "text.txt").read_text()
    row = tokenizer_of(made / "m")(text, add_special_tokens=False)["input_ids"]
    assert len(row) == len(text)
    return torch.tensor(row[: len(row) // SEQLEN * SEQLEN]).view(-1, SEQLEN)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """In float64, from the logits of the model in float32."""
    return torch.cat([model.float()(row[None]).logits.double().log_softmax(-1) for row in tokens])


def nll_of(log_q: Tensor, tokens: Tensor) -> Tensor:
    return -log_q[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


def measured(made: Path, folder: str, **changes: Any) -> dict[str, Any]:
    return bitlathe.evaluate(made / folder, **{"text": str(made / "text.txt"), "seqlen": SEQLEN} | changes)


def test_perplexity_is_that_of_transformers(made: Path) -> None:
    tokens = tokens_of(made)
    model = AutoModelForCausalLM.from_pretrained(made / "m", dtype=torch.float32).eval()
    expected = nll_of(log_probabilities(model, tokens), tokens).mean().exp().item()
    found = measured(made, "m")
    assert found["perplexity"]["value"] == pytest.approx(expected, rel=1e-6)
    assert {key: found[key] for key in ("model", "text", "windows", "seqlen")} == {
        "model": str(made / "m"),
        "text": str(made / "text.txt"),
        "windows": 20,
        "seqlen": SEQLEN,
    }
    assert "against" not in found


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_a_quantized_folder_is_measured_as_it_loads(made: Path, format: str) -> None:
    tokens = tokens_of(made)[:12]
    loaded = bitlathe.load(made / "q" / format, "cpu")
    assert loaded.dtype == torch.bfloat16
    log_q = log_probabilities(loaded, tokens)
    log_p = log_probabilities(AutoModelForCausalLM.from_pretrained(made / "m").eval(), tokens)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    ranked = kl.flatten().sort().values
    expected = {
        "perplexity": nll_of(log_q, tokens).mean().exp(),
        "perplexity_against": nll_of(log_p, tokens).mean().exp(),
        "kl_mean": kl.mean(),
        "kl_median": kl.quantile(0.5),
        "kl_99": kl.quantile(0.99),
        "kl_max": kl.max(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(),
    }
    found = measured(made, f"q/{format}", against=made / "m", windows=12)
    assert expected.keys() == COMPARED == {name for name, figure in found.items() if isinstance(figure, dict)}
    # A quantile is a value that occurs: at most half a rank from the interpolated one.
    near = {"kl_median": (ranked[143] + ranked[144]) / 2, "kl_99": ranked[round(0.99 * 287)]}
    for name, value in expected.items():
        slack = 1e-6 + (ranked[145] - ranked[142]).item() * (name == "kl_median")
        assert found[name]["value"] == pytest.approx(near.get(name, value).item(), rel=1e-6, abs=slack), name
    assert found["against"] == str(made / "m")
    # The numbers say something: the model is neither the original nor noise.
    assert 0.001 < found["kl_mean"]["value"] < found["kl_max"]["value"]
    assert 0.3 < found["top1_agreement"]["value"] < 1


def test_an_original_is_itself(made: Path) -> None:
    found = measured(made, "m", against=made / "m")
    for name in ("kl_mean", "kl_median", "kl_99", "kl_max"):
        assert abs(found[name]["value"]) < 1e-9
        assert found[name]["error"] < 1e-9
    assert found["top1_agreement"] == {"value": 1.0, "error": 0.0}
    assert found["perplexity"] == found["perplexity_against"]


# Standard errors


def test_standard_errors_are_those_of_resampled_windows(made: Path) -> None:
    tokens = tokens_of(made)
    model = AutoModelForCausalLM.from_pretrained(made / "m").eval()
    nll = nll_of(log_probabilities(model, tokens), tokens).mean(1)
    draws = torch.randint(len(nll), (20_000, len(nll)), generator=torch.Generator().manual_seed(5))
    expected = nll[draws].mean(1).exp().std().item()
    error = measured(made, "m")["perplexity"]["error"]
    # Two hundred resamplings know a standard deviation to a twentieth of it.
    assert error == pytest.approx(expected, rel=0.2)
    closed_form = nll.mean().exp().item() * nll.std(correction=0).item() / math.sqrt(len(nll))
    assert error == pytest.approx(closed_form, rel=0.25)


def test_figures_and_errors_are_the_same_every_time(made: Path) -> None:
    first, second = (measured(made, "q/native", against=made / "m", windows=5) for _ in range(2))
    assert first == second
    assert all(first[name]["error"] > 0 for name in COMPARED)
    state = torch.get_rng_state()
    measured(made, "m", windows=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_window_has_no_standard_error(made: Path) -> None:
    found = measured(made, "q/native", against=made / "m", windows=1)
    assert [found[name]["error"] for name in COMPARED] == [None] * len(COMPARED)
    assert found["windows"] == 1


def test_more_windows_than_the_text_has(made: Path) -> None:
    assert measured(made, "m", windows=1000)["windows"] == 20


def test_windows_longer_than_what_is_computed_at_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are made a few tokens at a time; where they are cut must not matter, the last token included."""
    whole = measured(made, "q/native", against=made / "m", windows=4)
    for tokens in (1, 7, SEQLEN - 1):
        monkeypatch.setattr("bitlathe.evaluation.perplexity._TOKENS", tokens)
        cut = measured(made, "q/native", against=made / "m", windows=4)
        for name in COMPARED:
            assert cut[name]["value"] == pytest.approx(whole[name]["value"], rel=1e-5), (tokens, name)


# Refusals


def refused(error: type[BitlatheError], made: Path, *words: str, folder: str = "m", **changes: Any) -> None:
    with pytest.raises(error) as found:
        measured(made, folder, **changes)
    missing = [word for word in words if word not in str(found.value)]
    assert not missing, f"{missing} not in: {found.value}"


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", read)


@pytest.mark.usefixtures("unread")
def test_what_cannot_be_measured_is_refused(made: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", vocab_size=128)
    refused(CalibrationError, made, "vocabulary of 96", "one of 128", "made from", against=tmp_path / "other")
    refused(CalibrationError, made, "500 tokens", "one window of 501", "longer text", seqlen=501)
    refused(CalibrationError, made, "'missing.txt' is not a file", "builtin", text="missing.txt")
    refused(CheckpointError, made, "There is no folder", folder="a/b/c")
    refused(RecipeError, made, "at least 2 tokens", seqlen=1)
    refused(RecipeError, made, "at least 2 tokens", seqlen=0)
    refused(RecipeError, made, "at least 1 window", windows=0)
    refused(RecipeError, made, "no CUDA device", device="cuda:99") if not torch.cuda.is_available() else None
    (made / "q" / "native" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (made / "q" / "native" / "tokenizer_config.json").rename(tmp_path / "tokenizer_config.json")
    refused(CalibrationError, made, "no tokenizer", "beside the weights", folder="q/native")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).rename(made / "q" / "native" / name)


def test_predictions_that_are_no_numbers(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "m", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    for folder, against in ((tmp_path / "m", None), (tmp_path / "m", made / "m"), (made / "m", tmp_path / "m")):
        with pytest.raises(
            CheckpointError, match=rf"{tmp_path}/m makes infinite or NaN predictions in 20 of 20 windows.*again"
        ):
            bitlathe.evaluate(folder, against=against, text=str(made / "text.txt"), seqlen=SEQLEN)


# Recording


@pytest.fixture
def result(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "q" / "native", tmp_path / "native"))


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


def test_what_is_recorded_leaves_the_rest_of_the_report(made: Path, result: Path) -> None:
    before = report_of(result)
    assert before["evaluation"] is None
    assert "Nothing yet" in (result / "README.md").read_text()
    found = measured(made, "q/native", against=made / "m", windows=4)
    assert record_evaluation(result, found)
    assert report_of(result) == before | {"evaluation": found}
    assert {"tool", "fingerprint", "folders", "files"} <= before.keys()
    card = (result / "README.md").read_text()
    assert f"On 4 windows of {SEQLEN} tokens of {made / 'text.txt'}, against {made / 'm'}, both in float32:" in card
    for name in COMPARED:
        assert f"| {name} | {found[name]['value']:.5g} | {found[name]['error']:.2g} |" in card
    assert sorted(path.name for path in result.iterdir()) == sorted(before["files"])


def test_a_recorded_folder_is_still_ours(made: Path, tmp_path: Path) -> None:
    recipe = {"model": str(made / "m"), "out": tmp_path / "q", "scheme": "W3A16G32", "tuner": "rtn"}
    recipe |= {"rtn": {"scale": "min-max"}}
    run(merge(recipe), restart=False, listen=lambda event: None)
    assert record_evaluation(tmp_path / "q", bitlathe.evaluate(tmp_path / "q", text=str(made / "text.txt"), seqlen=SEQLEN))
    told: list[Any] = []
    run(merge(recipe), restart=False, listen=told.append)
    assert [type(event) for event in told] == [Note]
    run(merge(recipe | {"scheme": "W4A16G32"}), restart=True, listen=lambda event: None)
    assert report_of(tmp_path / "q")["evaluation"] is None
    assert inspect(tmp_path / "q")["linears"][0]["scheme"] == "W4A16G32"


def test_a_comparison_is_not_lost_to_a_later_look_at_perplexity(made: Path, result: Path) -> None:
    alone = measured(made, "q/native", windows=3)
    compared = measured(made, "q/native", against=made / "m", windows=4)
    newer = measured(made, "q/native", against=made / "m", windows=5)
    assert record_evaluation(result, alone)
    assert report_of(result)["evaluation"] == alone
    assert f"On 3 windows of {SEQLEN} tokens of {made / 'text.txt'} in float32:" in (result / "README.md").read_text()
    assert record_evaluation(result, compared)
    assert not record_evaluation(result, alone)
    assert report_of(result)["evaluation"] == compared
    assert record_evaluation(result, newer)
    assert report_of(result)["evaluation"] == newer


def test_nothing_is_recorded_where_it_cannot_be(made: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(made, "m", windows=2)
    assert not record_evaluation(made / "m", found)
    assert not record_evaluation("org/name", found)

    def read_only(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bitlathe.report.replace_file", read_only)
    assert not record_evaluation(result, found)
    for foreign in ('{"tool": "another"}', "[1, 2]", "{"):
        (result / "report.json").write_text(foreign)
        assert not record_evaluation(result, found)
        assert (result / "report.json").read_text() == foreign
        assert inspect(result)["quantized"] == 14  # its config.json says all that is needed


def test_json_is_one_object_on_standard_output(made: Path, result: Path) -> None:
    options = ["--against", str(made / "m"), "--text", str(made / "text.txt"), "--seqlen", str(SEQLEN), "--windows", "3"]
    done = CliRunner().invoke(cli.app, ["eval", str(result), *options, "--json"])
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 1
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert found == report_of(result)["evaluation"]
    assert found == bitlathe.evaluate(result, against=made / "m", text=str(made / "text.txt"), seqlen=SEQLEN, windows=3) | {
        "against": str(made / "m"),
        "model": str(result),
    }
    assert f"Recorded in {result}/report.json." in done.stderr
    again = CliRunner().invoke(cli.app, ["eval", str(result), *options[2:], "--json"])
    assert (again.exit_code, "Recorded" in again.stderr) == (0, False)
