"""The command line: its options are frozen here, and what it passes on, prints and refuses is checked without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

import bitlathe
from bitlathe import cli, progress
from bitlathe.errors import PlanError
from bitlathe.numerics.scheme import PRESETS
from bitlathe.report import BlockReport, Note, Step
from bitlathe.version import VERSION

# The command line grows only together with this table.
FROZEN = {
    "quantize": [
        "MODEL",
        "--scheme",
        "--bits|--target-bits",
        "--schemes|--options",
        "--include",
        "--group",
        "--plan",
        "--out|--output-dir",
        "--format",
        "--tuner",
        "--effort",
        "--iters",
        "--enable-alg-ext",
        "--calib|--dataset",
        "--samples|--nsamples",
        "--seqlen",
        "--batch-size",
        "--override",
        "--rotate|--rotation-type",
        "--rotation-block",
        "--rotation-seed",
        "--rotation-trials",
        "--smooth/--no-smooth",
        "--act-asym/--act-sym",
        "--act-clip",
        "--kv",
        "--recipe",
        "--set",
        "--device",
        "--dtype",
        "--seed",
        "--scores",
        "--model",
        "--tasks",
        "--limit",
        "--num-fewshot",
        "--verify",
        "--restart",
    ],
    "search": [
        "MODEL",
        "--bits|--target-bits",
        "--schemes|--options",
        "--out",
        "--plot",
        "--include",
        "--group",
        "--override",
        "--format",
        "--calib|--dataset",
        "--samples|--nsamples",
        "--seqlen",
        "--batch-size",
        "--rotate|--rotation-type",
        "--rotation-block",
        "--rotation-seed",
        "--rotation-trials",
        "--act-asym/--act-sym",
        "--act-clip",
        "--kv",
        "--recipe",
        "--set",
        "--device",
        "--dtype",
        "--seed",
        "--scores",
        "--model",
        "--json",
    ],
    "eval": ["DIR", "--against", "--text", "--seqlen", "--windows", "--tasks", "--limit", "--num-fewshot", "--json"],
    "convert": ["DIR", "--format", "--out", "--restart"],
    "verify": ["DIR", "--native", "--json"],
    "inspect": ["DIR", "--json"],
    "list": ["WHAT"],
    "demo": ["--out"],
}

INSPECTED = {
    "model": "out",
    "format": "native",
    "dtype": "bf16",
    "linears": [
        {"name": "a.q_proj", "scheme": "W4A16", "shape": [8, 128], "bits": 4.125, "bytes": 528, "kept": None}
        | {"activations": None},
        {"name": "lm_head", "scheme": None, "shape": [8, 128], "bits": 16.0, "bytes": 2048, "kept": "the output head"}
        | {"activations": None},
    ],
    "rotations": [],
    "untied": False,
    "kv": None,
    "quantized": 1,
    "bytes": 2576,
    "bits_quantized": 4.125,
    "bits_linears": 10.0625,
    "bits_checkpoint": 10.0625,
}
FOLDED = {"name": "R1", "space": "residual", "kind": "random", "block": 128, "seed": 77, "online": False} | dict.fromkeys(
    ["linears", "operations", "bytes"], 0
)
ONLINE = {"name": "R4", "space": "mid", "kind": "hadamard", "block": 256, "seed": 77, "online": True} | {
    "linears": 8,
    "operations": 16384,
    "bytes": 65536,
}
FIGURE = {"value": 0.25, "error": 0.03125}
VERIFIED = {
    "folder": "q",
    "format": "native",
    "codes": "q",
    "readers": [{"reader": "bitlathe", "version": "0", "linears": 28, "unequal": 0, "largest": 0.0, "kl": 0.0, "same": True}],
    "missing": ["gptqmodel"],
    "same": True,
}
EVALUATED = {"model": "out", "against": "builtin", "text": "builtin", "windows": 3, "seqlen": 64} | dict.fromkeys(
    ["perplexity", "perplexity_against", "kl_mean", "kl_median", "kl_99", "kl_max", "top1_agreement"], FIGURE
)


def invoke(*arguments: str) -> Any:
    """Run the command line in this process."""
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Public functions that only note what they were called with."""
    calls: dict[str, dict[str, Any]] = {}

    def stub(name: str, result: Any) -> None:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls[name] = {"args": args} | kwargs
            return result

        monkeypatch.setitem(vars(bitlathe), name, called)

    stub("quantize", None)
    stub("evaluate", EVALUATED)
    stub("inspect", INSPECTED)
    return calls


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder holds the report of a finished run."""
    monkeypatch.setattr("bitlathe.report.read_report", lambda folder: {"seconds": 75.0})


def test_the_options_are_frozen() -> None:
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    found = {
        name: [
            parameter.metavar or parameter.name.upper()
            if parameter.param_type_name == "argument"
            else "/".join(["|".join(parameter.opts), *parameter.secondary_opts])
            for parameter in command.params
        ]
        for name, command in commands.items()
    }
    assert found == FROZEN


@pytest.mark.parametrize("command", FROZEN)
def test_every_option_says_what_it_is_and_its_default(command: str) -> None:
    for parameter in get_command(cli.app).commands[command].params:  # type: ignore[attr-defined]
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name
            assert parameter.show_default or parameter.default is not None, parameter.name
    shown = invoke(command, "--help")
    assert shown.exit_code == 0
    assert shown.output.count("[default:") == sum(name.startswith("--") for name in FROZEN[command])


@pytest.mark.parametrize("code", ["import bitlathe", "from bitlathe.cli import app; app(['--help'], standalone_mode=False)"])
def test_torch_is_not_needed_to_begin(code: str) -> None:
    heavy = "[name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules]"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; assert not {heavy}, {heavy}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves_and_keeps_resolving() -> None:
    for _ in range(2):
        for name in ("quantize", "load", "evaluate", "inspect"):
            assert callable(getattr(bitlathe, name))
        for name in ("Recipe", "Plan", "Scheme", "Rotation"):
            assert isinstance(getattr(bitlathe, name), type)
    assert set(bitlathe.__all__) == set(dir(bitlathe))
    with pytest.raises(AttributeError, match="nothing"):
        _ = bitlathe.nothing


def test_version() -> None:
    assert invoke("--version").output == f"bitlathe {VERSION}\n"


@pytest.mark.usefixtures("finished")
def test_quantize_passes_everything_on(asked: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: W3A16\nseqlen: 512\noverrides: {'*.v_proj': W8A16}\nmemory: {activations: 1GiB}\n")
    done = invoke(
        *("quantize", "builtin", "--out", "out", "--recipe", str(recipe), "--format", "native,fake", "--tuner", "rtn"),
        *("--seqlen", "256", "--override", "*.q_proj=keep", "--override", "*.k_proj=w8", "--set", "samples=16"),
        *("--override", "*.k_proj=w8a16", "--set", "signround.lr=0.5", "--device", "cpu", "--restart"),
        *("--rotate", "r1,R4:random", "--rotation-block", "32", "--rotation-seed", "5", "--rotation-trials", "4"),
        *("--no-smooth", "--act-asym", "--act-clip", "0.9", "--kv", "kv4"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    call = asked["quantize"]
    assert callable(call.pop("listen"))
    assert call.pop("args") == ("builtin",)
    expected = bitlathe.Recipe(
        model="builtin",
        out=Path("out"),
        scheme="W3A16",
        overrides={"*.v_proj": "W8A16", "*.q_proj": "keep", "*.k_proj": "W8A16"},
        rotate=("R1", "R4:random"),
        rotation_block=32,
        rotation_seed=5,
        rotation_trials=4,
        smooth=False,
        act_asymmetric=True,
        act_clip=0.9,
        kv="KV4",
        formats=("native", "dense"),
        tuner="rtn",
        seqlen=256,
        samples=16,
        device="cpu",
        memory={"activations": 2**30},
        signround={"lr": 0.5},
    ).model_dump(exclude={"model"}, exclude_unset=True)
    # What is not said is not passed on, so that what says it otherwise is not contradicted.
    assert call == expected | {"restart": True}


@pytest.mark.usefixtures("finished")
def test_what_people_type_who_come_from_another_tool(asked: dict[str, dict[str, Any]]) -> None:
    done = invoke(
        *("quantize", "builtin", "--options", "INT4,INT8", "--target_bits", "5", "--rotation_type", "hadamard", "--iters", "1"),
        *("--format", "fake", "--enable_alg_ext", "--output_dir", "out_dir", "--batch_size", "4", "--nsamples", "16"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    call = asked["quantize"]
    given = {name: value for name, value in call.items() if name not in ("args", "listen", "restart")}
    assert given == {
        "schemes": ("W4A4", "W8A8"),
        "bits": 5.0,
        "rotate": ("R1", "R2"),
        "iters": 1,
        "tuner": "signround",
        "formats": ("dense",),
        "signround": {"start": "searched"},
        "out": Path("out_dir"),
        "batch_size": 4,
        "samples": 16,
    }


@pytest.mark.parametrize("command", FROZEN)
def test_every_option_may_be_written_with_underscores(command: str) -> None:
    for parameter in get_command(cli.app).commands[command].params:  # type: ignore[attr-defined]
        for name in [name for name in (*parameter.opts, *parameter.secondary_opts) if "-" in name.removeprefix("--")]:
            typed = f"--{name.removeprefix('--').replace('-', '_')}"
            done = invoke(command, typed, *([] if parameter.is_flag else ["1"]), "--help")
            assert done.exit_code == 0, done.output
    assert "No such option" in invoke(command, "--no_such_option").stderr


@pytest.mark.usefixtures("finished")
def test_values_keep_their_underscores(asked: dict[str, dict[str, Any]]) -> None:
    done = invoke(
        *("quantize", "some_org/a_model", "--output_dir=a_b", "--dataset", "c_d-e.txt", "--set", "signround.check_every=4"),
        *("--override", "*.q_proj=W8A16_CHANNEL"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    call = asked["quantize"]
    assert (call["args"], call["out"], call["calib"]) == (("some_org/a_model",), Path("a_b"), "c_d-e.txt")
    assert (call["signround"]["check_every"], call["overrides"]) == (4, {"*.q_proj": "W8A16_CHANNEL"})


@pytest.mark.usefixtures("finished")
def test_the_model_may_be_named_by_an_option(asked: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: another\n")
    assert invoke("quantize", "--model", "builtin", "--out", "o", "--recipe", str(file)).exit_code == 0
    assert asked.pop("quantize")["args"] == ("builtin",)
    for command in ("quantize", "search"):
        done = invoke(command, "here", "--model", "there", "--bits", "4.5")
        assert done.exit_code == 2
        assert "the model is given twice, as 'here' and as --model 'there'" in done.stderr and "leave one" in done.stderr
    assert "quantize" not in asked


@pytest.mark.parametrize("command", [("quantize", "nowhere", "--out", "o"), ("eval", "nowhere")])
def test_tasks_without_the_extra_are_refused_before_any_work_starts(
    asked: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr("bitlathe.options.find_spec", lambda name: None)
    done = invoke(*command, "--tasks", "piqa")
    assert (done.exit_code, asked) == (2, {})
    assert "pip install 'bitlathe[tasks]'" in done.stderr and "leave --tasks out" in done.stderr
    for option in ("--limit", "--num-fewshot"):
        done = invoke(*command, option, "3")
        assert (done.exit_code, asked) == (2, {})
        assert "no task is named: add --tasks" in done.stderr


def test_an_extension_of_another_tuner_is_refused(asked: dict[str, dict[str, Any]]) -> None:
    done = invoke("quantize", "builtin", "--out", "o", "--tuner", "rtn", "--enable-alg-ext")
    assert done.exit_code == 2 and "the tuner is rtn" in done.stderr
    assert "quantize" not in asked


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize(("option", "meant"), [([], "asym"), (["--act-sym"], "sym"), (["--act-asym"], "asym")])
def test_symmetric_activations_win_over_a_file(
    asked: dict[str, dict[str, Any]], tmp_path: Path, option: list[str], meant: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: W4A4\nact_asymmetric: true\n")
    done = invoke("quantize", "builtin", "--out", "out", "--recipe", str(recipe), *option)
    assert done.exit_code == 0, done.output
    assert asked["quantize"]["act_asymmetric"] is (meant == "asym")


@pytest.mark.usefixtures("finished")
def test_the_summary_says_what_was_made_and_where(asked: dict[str, dict[str, Any]]) -> None:
    output = invoke("quantize", "my models/[tiny]", "--out", "out").output
    measure = "bitlathe eval out --against 'my models/[tiny]'"
    assert measure in output.splitlines()[-1]
    for words in (
        "1 of 2 linears are quantized, which took 1 min 15 s in all",
        "lm_head (the output head)",
        "4.125 bits",
        "10.062",
        "bitlathe.load('out')",
    ):
        assert words in output, output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "builtin"], "'out' is missing"),
        (["quantize", "--out", "x"], "'model' is missing"),
        (["quantize", "builtin", "--out", "x", "--scheme", "W9"], "unknown scheme 'W9'"),
        (["quantize", "builtin", "--out", "x", "--set", "itters=3"], "Did you mean 'iters'?"),
        (["quantize", "builtin", "--out", "x", "--set", "iters"], "is not key=value"),
        (["quantize", "builtin", "--out", "x", "--override", "q_proj"], "is not GLOB=SCHEME"),
        (["quantize", "builtin", "--out", "x", "--device", "gpu"], "cuda"),
        (["quantize", "builtin", "--out", "x", "--rotate", "R7"], "R4 turns"),
        (["quantize", "builtin", "--out", "x", "--rotation-block", "32"], "nothing is rotated"),
        (["quantize", "builtin", "--out", "x", "--kv", "KV3"], "KV8, KV4"),
    ],
)
def test_refusals(asked: dict[str, dict[str, Any]], arguments: list[str], words: str) -> None:
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout, asked) == (2, "", {})
    assert done.stderr.startswith("Error: ")
    assert words in done.stderr


def test_an_error_is_a_message_and_with_traceback_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: str) -> None:
        raise PlanError(f"[{folder}] cannot be done")

    monkeypatch.setitem(vars(bitlathe), "inspect", refuse)
    done = invoke("inspect", "x")
    assert (done.exit_code, done.stderr, done.stdout) == (2, "Error: [x] cannot be done\n", "")
    assert isinstance(invoke("--traceback", "inspect", "x").exception, PlanError)


def test_an_interruption_says_how_to_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(bitlathe), "quantize", interrupt)
    done = invoke("quantize", "builtin", "--out", "x")
    assert done.exit_code == 130
    assert "the same command continues" in done.stderr
    monkeypatch.setitem(vars(bitlathe), "evaluate", interrupt)
    done = invoke("eval", "x")
    assert (done.exit_code, done.stderr) == (130, "Interrupted.\n")


def test_eval_passes_everything_on_and_prints_figures(asked: dict[str, dict[str, Any]]) -> None:
    done = invoke("eval", "out", "--against", "builtin", "--text", "t.txt", "--seqlen", "64", "--windows", "3")
    assert asked["evaluate"] == {"args": ("out",), "against": "builtin", "text": "t.txt", "seqlen": 64, "windows": 3}
    for words in ("3 windows of 64 tokens", "perplexity of the original", "0.25", "0.031", "top-1 agreement"):
        assert words in done.stdout, done.stdout


@pytest.mark.parametrize(("command", "result"), [("eval", EVALUATED), ("inspect", INSPECTED)])
def test_json_is_one_object_and_nothing_else(asked: dict[str, dict[str, Any]], command: str, result: Any) -> None:
    done = invoke(command, "out", "--json")
    assert json.loads(done.stdout) == result
    assert len(done.stdout.splitlines()) == 1


def test_inspect_shows_every_linear(asked: dict[str, dict[str, Any]]) -> None:
    output = invoke("inspect", "out").stdout
    for words in ("a.q_proj", "W4A16", "8x128", "4.125", "528", "lm_head", "kept", "the output head", "2.5 KiB"):
        assert words in output, output


def test_inspect_without_rotations_does_not_speak_of_them(asked: dict[str, dict[str, Any]]) -> None:
    output = invoke("inspect", "out").stdout
    assert all(word not in output for word in ("otation", "activations", "online", "of its own", "Cached"))


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize("typed", [("--rotate", "R1", "--rotate", "r4:random,R2"), ("--rotate", "R1,R2,R4:random")])
def test_rotations_may_be_given_one_by_one(asked: dict[str, dict[str, Any]], tmp_path: Path, typed: tuple[str, ...]) -> None:
    assert invoke("quantize", "builtin", "--out", str(tmp_path / "q"), *typed).exit_code == 0
    assert asked["quantize"]["rotate"] == ("R1", "R2", "R4:random")


def test_help_says_what_a_rotation_turns_by_default() -> None:
    words = " ".join(invoke("quantize", "--help").stdout.replace("│", " ").split())
    assert "whole spaces; of R4 the largest power of two in it" in words


@pytest.mark.parametrize(
    ("rotations", "words", "absent"),
    [
        ([FOLDED], ["R1", "residual", "random", "128", "77", "folded", "costs nothing"], ["online", "Online"]),
        (
            [FOLDED, ONLINE],
            ["folded", "R4", "mid", "256", "online", "8", "cost 16,384 operations and 64.0 KiB a token"],
            ["costs nothing"],
        ),
    ],
)
def test_inspect_shows_rotations_and_what_they_cost(
    monkeypatch: pytest.MonkeyPatch, rotations: list[dict[str, Any]], words: list[str], absent: list[str]
) -> None:
    linears = [INSPECTED["linears"][0] | {"activations": "INT4 per token"}]
    result = INSPECTED | {"linears": linears, "rotations": rotations, "untied": True, "kv": "KV4"}
    monkeypatch.setitem(vars(bitlathe), "inspect", lambda folder: result)
    output = invoke("inspect", "out").stdout
    for word in (*words, "INT4 per token", "The output head has a weight of its own", "Cached keys and values: KV4"):
        assert word in output, output
    assert all(word not in output for word in absent), output
    assert output.count("77") == 1  # a Hadamard matrix has no seed


@pytest.mark.parametrize(
    ("what", "names"),
    [
        (
            "schemes",
            [*PRESETS, "INT4 per token", "INT8 per tensor, static", "groups of 16, with a static scale"],
        ),
        ("rotations", ["R1", "R2", "R3", "R4", "residual stream", "folded", "online", "down_proj"]),
        ("models", ["llama", "phi3"]),
        ("formats", ["native", "dense"]),
        ("tuners", ["rtn", "signround"]),
    ],
)
def test_list(what: str, names: list[str]) -> None:
    done = invoke("list", what)
    assert done.exit_code == 0, done.output
    assert all(name in done.stdout for name in names)


def test_demo_compares_original_and_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(out: Path | None, *, listen: Any) -> dict[str, Any]:
        sides = {"original": {"bytes": 2048, "text": "once upon"}, "quantized": {"bytes": 1024, "text": "a time"}}
        return {"scheme": "W4A16", "evaluation": EVALUATED, "verified": VERIFIED, **sides}

    monkeypatch.setattr(cli, "load", lambda target: ran if target.endswith(":demo") else quiet)
    output = invoke("demo").stdout
    for words in ("W4A16", "2.0 KiB", "1.0 KiB", "0.25", "once upon", "a time", "top-1", "gptqmodel", "same"):
        assert words in output, output


@contextmanager
def quiet() -> Iterator[Any]:
    """A display that shows nothing."""
    yield lambda event: None


def test_the_display_prints_a_line_for_every_block() -> None:
    out = StringIO()
    block = BlockReport(
        block=0,
        blocks=2,
        name="b",
        linears=7,
        loss_before=0.5,
        loss_after=0.25,
        seconds=75.0,
        elapsed=80.0,
        peak_ram=2**30,
        peak_vram=0,
    )
    with progress.Display(Console(file=out, width=200)) as listen:
        listen(Note("noted [so]"))
        listen(Step(block=0, blocks=2, step=1, steps=10, loss=0.5))
        listen(block)
        listen(block.model_copy(update={"block": 1, "resumed": True}))
        listen(block.model_copy(update={"block": 2, "name": "head", "linears": 0, "loss_before": None, "loss_after": None}))
    assert out.getvalue().splitlines() == [
        "noted [so]",
        "block 1/2: 7 linears, loss 0.5 -> 0.25, 1 min 15 s, peak 1.0 GiB RAM",
        "block 2/2: 7 linears, from the interrupted run",
        "head: kept, 1 min 15 s, peak 1.0 GiB RAM",
    ]
