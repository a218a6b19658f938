"""The comparison with other programs: everybody gets the same tokens, one judge for all, and a table that says why a row is
empty; and what a large model takes, told by a few blocks."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import scale, versus
from benchmarks.others.bare import work as bare
from benchmarks.others.job import Answer, Job
from benchmarks.others.judge import by_logits, refuse_other
from benchmarks.others.ours import recipe_of
from benchmarks.others.tools import OTHERS, OURS, Tool, ToolFailed, done
from safetensors.torch import save_file

import bitlathe
from bitlathe.io.checkpoint import find_folder
from bitlathe.prepare import prepare
from bitlathe.report import inspect

MODEL = str(find_folder("builtin"))
SMALL = {"model_type": "qwen3", "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 9}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def settings(tmp_path: Path) -> versus.Settings:
    return versus.Settings(
        model=MODEL,
        calib="builtin",
        text="builtin",
        device="cpu",
        samples=3,
        seqlen=32,
        windows=2,
        steps=1,
        batch=2,
        fields={"rtn": {"scale": "min-max"}},
        environments=tmp_path / "nowhere",
        record=tmp_path / "record.jsonl",
    )


def job_of(model: str, windows: dict[str, torch.Tensor], folder: Path, **fields: object) -> Job:
    save_file(windows, folder / "tokens")
    return Job(
        model=model,
        out=str(folder / "out"),
        scheme="W4A16",
        tokens=str(folder / "tokens"),
        calib="builtin",
        seed=5,
        steps=2,
        batch=2,
        device="cpu",
        fields=fields,
    )


def test_a_tool_is_another_program_or_a_tuner_with_an_effort() -> None:
    assert versus.tool_named("auto-round") == (OTHERS["auto-round"], {})
    assert versus.tool_named("rtn") == (OURS, {"tuner": "rtn"})
    assert versus.tool_named("signround:best") == (OURS, {"tuner": "signround", "effort": "best"})
    with pytest.raises(ValueError, match=r"'sign-round' is not known. Did you mean 'signround'"):
        versus.tool_named("sign-round")


def test_others_get_the_very_tokens_that_ours_tunes_on(settings: versus.Settings, tmp_path: Path) -> None:
    windows = versus.windows_for(settings, 5)
    ready = prepare(recipe_of(job_of(MODEL, windows, tmp_path, tuner="signround")))
    assert ready.tokens is not None and torch.equal(ready.tokens, windows["calibration"])
    assert not torch.equal(windows["calibration"], versus.windows_for(settings, 6)["calibration"])


def test_logits_are_judged_as_folders_are(settings: versus.Settings, tmp_path: Path) -> None:
    out, windows = tmp_path / "q", versus.windows_for(settings, 0)["evaluation"]
    bitlathe.quantize("builtin", out=out, scheme="W3A16G32", tuner="rtn", rtn={"scale": "min-max"})
    with torch.no_grad():
        save_file({"logits": bitlathe.load(out, "cpu", dtype="fp32")(windows).logits}, tmp_path / "logits")
    found = by_logits(str(tmp_path / "logits"), MODEL, windows, "cpu")
    wanted = bitlathe.evaluate(out, against=MODEL, seqlen=32, windows=2, device="cpu")
    names = {"kl": "kl_mean", "kl_99": "kl_99", "perplexity": "perplexity", "top1": "top1_agreement"}
    assert found == pytest.approx({name: wanted[long]["value"] for name, long in names.items()}, rel=1e-3)
    assert refuse_other(out, "W3A16G32") == pytest.approx(inspect(out)["bits_quantized"])
    with pytest.raises(ToolFailed, match="28 linears have W3A16G32 with activations None, not MXFP4 with E2M1"):
        refuse_other(out, "MXFP4")


def test_what_was_measured_is_not_measured_again(settings: versus.Settings) -> None:
    first = versus.compared(settings, "W4A16", ["rtn"], 1)
    (found,) = first["rtn"]
    assert found["kl"] > 0 and found["seconds"] > 0 and found["peak"] > found["imports"] > 0
    assert first[versus.PASS][0]["seconds"] > 0
    assert versus.compared(settings, "W4A16", ["rtn"], 1) == first
    assert settings.record is not None and len(settings.record.read_text().splitlines()) == 2
    assert "error" in versus.measure(replace(settings, fields={"rotate": "R9"}), "W4A16", "rtn", 0)


def test_rows_are_medians_and_ratios_and_say_why_there_are_none() -> None:
    def told(kl: float, peak: int) -> dict[str, float]:
        return {"bits": 4, "kl": kl, "kl_99": 1, "perplexity": 9, "top1": 0.5, "seconds": 30, "peak": peak, "imports": 2**20}

    found = {
        versus.PASS: [{"seconds": 10, "peak": 2**21, "imports": 2**20}],
        "auto-round": [told(0.2, 2**22), told(0.4, 2**22), told(9.0, 2**22)],
        "gptq": [{"error": "cannot be installed here: a|b"}],
        "rtn": [told(0.1, 2**21), {"error": "once"}, told(0.3, 2**21)],
    }
    plain, others, missing, ours = versus.rows("W4A16", found, on_gpu=False)
    assert others.count("|") == versus.header(on_gpu=False)[0].count("|") == plain.count("|")
    assert missing == "| W4A16 | gptq | cannot be installed here: a/b |"
    assert (
        ours == "| W4A16 | rtn | 4.000 | 0.20000 | 1.0000 | 9.000 | 0.5000 | 30.0 | 3.0 | 2.0 MiB | 1.0 MiB | 0.500 | 0.500 |"
    )


def test_a_process_that_fails_is_told_by_its_last_words(tmp_path: Path) -> None:
    job = job_of(MODEL, {"calibration": torch.zeros(1, 8, dtype=torch.long)}, tmp_path)
    with pytest.raises(ToolFailed, match=r"ended with 1: .*No module named benchmarks.others.nothing"):
        done(Tool("benchmarks.others.nothing"), versus.python_of(OURS, tmp_path), job)


@pytest.mark.parametrize(("tuner", "passes"), [("rtn", 1), ("signround", 2)])
def test_a_floor_is_the_passes_of_a_tuner(settings: versus.Settings, tmp_path: Path, tuner: str, passes: int) -> None:
    (tmp_path / "model").mkdir()
    scale.generate(tmp_path / "model", SMALL | HEADS, 2)
    assert inspect(tmp_path / "model")["dtype"] == "bf16" and len(inspect(tmp_path / "model")["linears"]) == 2 * 7 + 1
    job = job_of(str(tmp_path / "model"), versus.windows_for(settings, 5), tmp_path, tuner=tuner)
    told = json.loads(Path(bare(replace(job, scheme="W4A16G32")).folder or "").read_text())
    assert told["floor"] >= told["pass"] > 0
    assert (told["floor"] == told["pass"]) == (passes == 1)


def test_a_model_is_told_by_what_a_block_more_takes() -> None:
    ours = Answer("0", seconds=50.0, peak=9 * 2**20, imports=2**20, vram=0, folder="", logits=None, bits=None)
    peaks = ((12.0, 6), (22.0, 8), (32.0, 9), (40.0, 9))
    blocks = [{"elapsed": elapsed, "peak_ram": peak * 2**20} for elapsed, peak in peaks]
    line = scale.row("shape", "rtn", 9, {"answer": ours, "blocks": blocks, "bare": {"pass": 2.0, "floor": 4.0}})
    # Six blocks more of 10 seconds and 1 MiB.
    assert line == "| shape | rtn | 2.00 | 4.00 | 10.00 | 5.0 | 110 | 36 | 9.0 MiB | 8.0 MiB | 15.0 MiB |  |"
    assert scale.row("shape", "rtn", 9, {"answer": ours, "blocks": blocks, "bare": None}).count("|") == line.count("|")


def test_what_cannot_be_compared_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    given = versus.parsed(["--tools", "", "--tuners", "rtn", "--schemes", "W4A4", "--set", "seed=1"])
    assert isinstance(given, Namespace) and given.tools == ["rtn"] and given.fields == {"seed": "1"}
    for arguments in (["--schemes", "W9"], ["--tuners", "none"], ["--set", "x"]):
        with pytest.raises(SystemExit):
            versus.parsed(arguments)
    for arguments in (["qwen3-32b", "--blocks", "1"], ["qwen3-32b", "--tuners", "gptq"]):
        with pytest.raises(SystemExit):
            scale.parsed(arguments)
    told = capsys.readouterr().err
    assert "'W9' is not compared" in told and "'none' is not known" in told and "gptq is another program's" in told
