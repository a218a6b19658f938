"""Law 7: what can be refused is refused before a weight is read and before a file is written, and says the way out.

Every run here has a reader of weights that fails, and leaves the disk as it found it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import bitlathe
from bitlathe import cli
from bitlathe.errors import (
    BitlatheError,
    CalibrationError,
    CheckpointError,
    FormatError,
    OutputError,
    PlanError,
    RecipeError,
    UnsupportedModel,
)
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.prepare import Prepared, prepare
from bitlathe.recipe import Recipe, merge
from families import save_model, write_text

RTN: dict[str, Any] = {"scheme": "W4A16G32", "tuner": "rtn", "samples": 4, "seqlen": 16, "batch_size": 2}
WEIGHTS = "model.safetensors"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    save_model(folder)
    write_text(folder / "text.txt", 200)
    return folder


@pytest.fixture
def model(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "m"))


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight can be read."""

    def read(self: Checkpoint, names: Iterable[str]) -> dict[str, torch.Tensor]:
        raise AssertionError(f"the weights {list(names)[:3]} were read")

    monkeypatch.setattr(Checkpoint, "read", read)


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def _said(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what is taken back by None."""
    return {name: value for name, value in fields.items() if value is not None}


def refused(error: type[BitlatheError], model: Path, words: Iterable[str], **changes: Any) -> str:
    """Ask for a run that is refused with all of `words`; the folder around the model must be as before."""
    before = everything(model.parent)
    asked = _said({"out": model.parent / "q", "calib": str(model / "text.txt"), **RTN, **changes})
    with pytest.raises(error) as found:
        bitlathe.quantize(str(model), **asked)
    assert type(found.value) is error
    missing = [word for word in words if word not in str(found.value)]
    assert not missing, f"{missing} not in: {found.value}"
    assert everything(model.parent) == before
    return str(found.value)


# What is asked for


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize(
    ("field", "thing", "way_out"),
    [
        ({"scheme": "W9A16"}, "unknown scheme 'W9A16'", "W4A16G32"),
        ({"overrides": {"*": "W4A17"}}, "unknown scheme 'W4A17'", "W4A16G32"),
        ({"formats": "gguff"}, "unknown format 'gguff'", "native, compressed-tensors, gptq, awq"),
        ({"formats": "native,native"}, "named twice", "native"),
        ({"tuner": "signroud"}, "unknown tuner 'signroud'", "Did you mean 'signround'?"),
        ({"itters": 3}, "unknown recipe field 'itters'", "Did you mean 'iters'?"),
        ({"memory": {"activation": 3}}, "unknown recipe field 'memory.activation'", "Did you mean 'memory.activations'?"),
        ({"signround": {"lrr": 1.0}}, "unknown recipe field 'signround.lrr'", "signround.check_every"),
        ({"device": "gpu"}, "'device'", "a device is auto, cpu, cuda"),
        ({"samples": 0}, "'samples'", "greater than 0"),
        ({"dtype": "fp8"}, "'dtype'", "'bf16'"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_what_is_not_understood(model: Path, field: dict[str, Any], thing: str, way_out: str) -> None:
    refused(RecipeError, model, [thing, way_out], **field)


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_where_there_is_none(model: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(RecipeError, model, [repr(device), "no CUDA device", "--device cpu"], device=device)


@pytest.mark.usefixtures("sealed")
def test_a_gpu_that_is_not_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(RecipeError, model, ["'cuda:2'", "2 CUDA device(s)", "--device auto"], device="cuda:2")


# What the linears allow


@pytest.mark.usefixtures("sealed")
def test_an_override_that_matches_nothing(model: Path) -> None:
    words = ["'q_proj' matches none of the 15 linears", "'model.layers.0.self_attn.q_proj'", "begin with *"]
    refused(PlanError, model, words, overrides={"*.k_proj": "keep", "q_proj": "W8A16G32"})


@pytest.mark.usefixtures("sealed")
def test_groups_that_do_not_divide_inputs(model: Path) -> None:
    message = refused(
        PlanError,
        model,
        [
            "W4A16 puts 128 inputs under one scale",
            "model.layers.0.self_attn.q_proj (64 inputs)",
            "and 8 more",
            "these fit: W4A16G32, W4A16G64, W4A16_CHANNEL. Choose one of them",
            "keep them in 16 bits",
        ],
        scheme="W4A16",
    )
    assert "down_proj" not in message  # its 128 inputs are divided


@pytest.mark.usefixtures("sealed")
def test_square_blocks_that_do_not_divide_inputs(tmp_path: Path) -> None:
    save_model(tmp_path / "m", hidden_size=96, intermediate_size=136)
    write_text(tmp_path / "m" / "text.txt", 200)
    # no group that there is divides both 96 and 136
    words = ["FP8_BLOCK", "model.layers.0.self_attn.q_proj (96 inputs)", "these fit: FP8_TENSOR, FP8_CHANNEL. Choose"]
    refused(PlanError, tmp_path / "m", words, scheme="FP8_BLOCK")


@pytest.mark.usefixtures("sealed")
def test_groups_of_which_no_other_size_is_known(tmp_path: Path) -> None:
    save_model(tmp_path / "m", hidden_size=96, intermediate_size=136)
    write_text(tmp_path / "m" / "text.txt", 200)
    words = ["MXFP8A16 puts 32 inputs", "model.layers.0.mlp.down_proj (136 inputs)", "these fit: FP8_TENSOR, FP8_CHANNEL"]
    message = refused(PlanError, tmp_path / "m", words, scheme="MXFP8A16")
    assert "q_proj" not in message
    words = ["NVFP4A16 puts 16 inputs", "No scheme of its kind fits. Choose one of another kind", "keep them in 16 bits"]
    refused(PlanError, tmp_path / "m", words, scheme="NVFP4A16")
    # Linears that another scheme does not fit are another message's.
    words = ["NVFP4A16 puts 16 inputs", "inputs of model.layers.0.mlp.down_proj (136 inputs). "]
    refused(
        PlanError,
        tmp_path / "m",
        words,
        scheme="W4A16",
        overrides={"*": "keep", "*.0.mlp.down_proj": "NVFP4A16", "*.1.mlp.down_proj": "W4A16"},
    )


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize(("family", "unties"), [("llama", True), ("gemma2", False)])
def test_a_head_that_is_the_embeddings(tmp_path: Path, family: str, *, unties: bool) -> None:
    save_model(tmp_path / "m", family, tie_word_embeddings=True)
    write_text(tmp_path / "m" / "text.txt", 200)
    words = ["W8A8 rounds activations", "model.embed_tokens has none to round", "W8A16_CHANNEL. lm_head shares its weight"]
    told = refused(PlanError, tmp_path / "m", words, overrides={"lm_head": "W8A8"})
    # R1 gives it a weight of its own, where R1 folds.
    assert ("or gets one of its own with --rotate R1" in told) == unties
    # One that is meant for every linear is not for what is no linear alone.
    words = ["lm_head shares its weight with the embeddings", "the override *=W8A16_CHANNEL", "--override lm_head=keep after"]
    told = refused(PlanError, tmp_path / "m", words, overrides={"*": "W8A16_CHANNEL"})
    assert ("or give it a weight of its own with --rotate R1" in told) == unties
    if unties:
        asked = {"out": tmp_path / "q", "overrides": {"lm_head": "W8A16_CHANNEL"}, "rotate": "R1", **RTN}
        assert (
            "lm_head"
            in prepare(merge({"model": str(tmp_path / "m"), "calib": str(tmp_path / "m/text.txt"), **asked})).plan.quantized
        )


@pytest.mark.usefixtures("sealed")
def test_nothing_left_to_quantize(model: Path) -> None:
    words = ["every linear is kept", "give a scheme, or fewer overrides"]
    refused(PlanError, model, words, overrides={"*": "keep"})


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"overrides": {"*.0.self_attn.k_proj": "W8A16G32"}},
            ["model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj", "one matrix", "native format"],
        ),
        (
            {"overrides": {"*.up_proj": "keep"}},
            ["model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj", "1 more such group", "native format"],
        ),
        (
            {"scheme": "MXFP4A16", "dtype": "fp16"},
            ["model.layers.0.self_attn.q_proj", "MXFP4A16", "the plan's dtype is fp16", "use --dtype bf16"],
        ),
        (
            {"overrides": {"*.down_proj": "W8A16G32_ASYM"}},
            ["zero points beside other schemes", "model.layers.0.mlp.down_proj", "one for all, or the native format"],
        ),
    ],
    ids=["qkv", "gate_up", "fp16", "zero points"],
)
@pytest.mark.parametrize("formats", ["compressed-tensors", "native,compressed-tensors"])
def test_a_format_that_cannot_hold_the_plan(model: Path, changes: dict[str, Any], words: list[str], formats: str) -> None:
    refused(FormatError, model, ["compressed-tensors cannot hold", *words], formats=formats, **changes)


# The text


@pytest.mark.usefixtures("sealed")
def test_a_text_shorter_than_one_window(model: Path) -> None:
    refused(CalibrationError, model, ["200 tokens", "one window of 512", "longer text", "--seqlen"], seqlen=512)


@pytest.mark.usefixtures("sealed")
def test_no_tokenizer(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    refused(CalibrationError, model, [str(model), "no tokenizer", "tokenizer.json", "beside the weights"])


@pytest.mark.usefixtures("sealed")
def test_another_model_s_tokenizer(tmp_path: Path) -> None:
    save_model(tmp_path / "m", vocab_size=40)
    write_text(tmp_path / "m" / "text.txt", 200)
    words = ["makes the token", "vocabulary ends at 39", "the model's own tokenizer"]
    refused(CalibrationError, tmp_path / "m", words)


@pytest.mark.usefixtures("sealed")
def test_a_tokenizer_that_cannot_be_loaded(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    refused(CalibrationError, model, [str(model), "tokenizer", "cannot be loaded"])


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize("failure", [ConnectionError("offline"), HTTPError("no route"), TimeoutError("slow")])
@pytest.mark.parametrize("when", ["at once", "midway"])
def test_a_hub_that_cannot_be_reached(model: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, when: str) -> None:
    def rows() -> Iterable[dict[str, str]]:
        yield {"text": "some words"}
        raise failure

    def load_dataset(name: str, **_: Any) -> Iterable[dict[str, str]]:
        assert name == "NeelNanda/pile-10k"  # the default
        if when == "midway":
            return rows()
        raise failure

    monkeypatch.setattr("bitlathe.model.dataset_text.load_dataset", load_dataset)
    words = ["'NeelNanda/pile-10k'", "the Hub cannot be reached", "a text file of your own", "builtin"]
    refused(CalibrationError, model, words, calib=bitlathe.Recipe.model_fields["calib"].default)


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize("name", ["missing.txt", "./missing", "a/b/c"])
def test_a_text_file_that_is_not_there(model: Path, name: str) -> None:
    refused(CalibrationError, model, [repr(name), "is not a file", "Name a text file", "builtin"], calib=name)


# The source


def damaged(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return apply


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def misshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)


def in_two_files(model: Path) -> None:
    """A stray shard beside the real one, as two half-finished conversions leave."""
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    save_file({"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}, model / "model-00002-of-00002.safetensors")


def twice_in_one_header(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    row = json.loads(content[8 : 8 + length])["model.norm.weight"]
    text = content[8 : 8 + length].rstrip()[:-1] + b',"model.norm.weight":' + json.dumps(row).encode() + b"}"
    (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def truncate(model: Path) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-100])


def pickle(model: Path) -> None:
    torch.save({}, model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


def empty(model: Path) -> None:
    (model / WEIGHTS).unlink()


def lose_a_shard(model: Path) -> None:
    in_two_files(model)
    (model / "model-00001-of-00002.safetensors").unlink()


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


SHARDS = "model-00001-of-00002.safetensors and model-00002-of-00002.safetensors"


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged(lose), ["lacks 1 of", "model.layers.1.mlp.up_proj.weight", "Download it again"]),
        (damaged(misshape), ["model.layers.1.mlp.up_proj.weight is [64, 128], expected [128, 64]", "Take the config.json"]),
        (in_two_files, ["model.norm.weight is in both", SHARDS, "remove the file"]),
        (twice_in_one_header, [WEIGHTS, "names model.norm.weight more than once"]),
        (truncate, [WEIGHTS, "truncated", "its last 100 bytes are missing", "Download it again"]),
        (lose_a_shard, ["lacks 1 of its 2 files", "model-00001-of-00002.safetensors", "Download it again"]),
        (pickle, ["only pickled weights (pytorch_model.bin)", "safetensors", "save_pretrained"]),
        (empty, ["no *.safetensors file", "config.json and its weights"]),
        (no_config, ["no config.json", "the folder of a model"]),
    ],
    ids=lambda part: part.__name__ if callable(part) else "",
)
def test_a_damaged_source(model: Path, damage: Callable[[Path], None], words: list[str]) -> None:
    damage(model)
    refused(CheckpointError, model, words)


@pytest.mark.usefixtures("sealed")
def test_an_unknown_family(model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"model_type": "mamba2"}
    (model / "config.json").write_text(json.dumps(config))
    refused(UnsupportedModel, model, ["'mamba2'", "llama, mistral, qwen2, qwen3, gemma2, gemma3_text, olmo2, phi3"])


@pytest.mark.usefixtures("sealed")
def test_a_source_that_is_not_there(model: Path) -> None:
    refused(CheckpointError, model.parent / "a" / "n" / "other", ["There is no folder", "Hub id", "builtin"])


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_a_source_that_is_quantized_already(model: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    made = model.parent / "made"
    bitlathe.quantize(str(model), out=made, calib=str(model / "text.txt"), formats=format, **RTN)
    shutil.copy(model / "text.txt", made)
    monkeypatch.setattr(Checkpoint, "read", None)
    refused(CheckpointError, made, [str(made), "quantized already", "Quantize the original model"])


@pytest.mark.usefixtures("sealed")
def test_a_source_quantized_by_something_else(model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "exl3"}}
    (model / "config.json").write_text(json.dumps(config))
    refused(CheckpointError, model, ["quantized already", "'exl3'", "Use the original model"])


# Where the result goes


@pytest.mark.usefixtures("sealed")
def test_a_folder_that_is_somebody_else_s(model: Path) -> None:
    (model.parent / "q").mkdir()
    (model.parent / "q" / "thesis.tex").write_text("my only copy")
    for restart in (False, True):
        refused(OutputError, model, ["holds files that are not a result of bitlathe", "choose a new"], restart=restart)


@pytest.mark.usefixtures("sealed")
def test_a_file_where_the_folder_should_be(model: Path) -> None:
    (model.parent / "q").write_text("a file")
    refused(OutputError, model, [str(model.parent / "q"), "is a file", "does not exist yet"])


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize("inside", [".", "q", "a/b"])
def test_the_model_s_own_folder(model: Path, inside: str) -> None:
    refused(OutputError, model, ["the model's own folder", "Choose another folder"], out=model / inside)


@pytest.mark.usefixtures("sealed")
def test_the_model_s_own_folder_by_another_name(model: Path) -> None:
    (model.parent / "link").symlink_to(model)
    for out in (model.parent / "link" / "q", model.parent / "x" / ".." / "m" / "q"):
        refused(OutputError, model, ["the model's own folder", "Choose another folder"], out=out)


def test_a_folder_around_the_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense result is a model like any other; quantized again into the folder it lies in, it would be replaced by itself."""
    asked: dict[str, Any] = {"out": model.parent / "q", "calib": str(model / "text.txt"), "formats": "native,dense", **RTN}
    bitlathe.quantize(str(model), **asked)
    source = model.parent / "q" / "dense"
    monkeypatch.setattr(Checkpoint, "read", None)
    before = everything(model.parent)
    with pytest.raises(OutputError, match=r"q/dense is inside of --out .*/q\. Choose another folder"):
        bitlathe.quantize(str(source), **asked, restart=True)
    assert everything(model.parent) == before


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize("formats", ["native", "native,dense"])
@pytest.mark.parametrize("out", ["new", "empty"])
def test_too_little_disk(model: Path, monkeypatch: pytest.MonkeyPatch, formats: str, out: str) -> None:
    if out == "empty":
        (model.parent / "q").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - 2**10, 2**10))
    words = ["needs", "KiB", str(model.parent / "q"), "has 1.0 KiB free", "Make room"]
    refused(OutputError, model, words, formats=formats)


@pytest.mark.usefixtures("sealed")
def test_too_little_disk_for_hidden_states(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams of 4 windows of 16 tokens, 64 numbers each: what memory does not hold lies on the disk."""
    changes: dict[str, Any] = {"tuner": "signround", "calib": str(model / "text.txt")}

    def ready(activations: int) -> Prepared:
        asked = {**RTN, **changes, "memory": {"activations": activations}}
        return prepare(Recipe(model=str(model), out=model.parent / "q", **asked))

    def needs(activations: int) -> int:
        return ready(activations).bytes_needed()

    stream = 4 * 16 * 64 * ready(1).weights.dtype.itemsize
    assert [needs(2 * stream - 1) - needs(2 * stream), needs(1) - needs(2 * stream)] == [stream, 2 * stream]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40, needs(2 * stream)))
    refused(OutputError, model, ["Make room"], memory={"activations": 1}, **changes)


def test_too_little_disk_leaves_an_earlier_result(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"out": model.parent / "q", "calib": str(model / "text.txt"), **RTN}
    bitlathe.quantize(str(model), **asked)
    monkeypatch.setattr(Checkpoint, "read", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40, 0))
    refused(OutputError, model, ["Make room"], formats="native,dense", restart=True)


# What only reading can tell


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ],
)
def test_weights_that_are_not_finite(model: Path, value: float, name: str) -> None:
    """Kept in 16 bits or not: every prediction of such a model is NaN."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    damaged(spoil)(model)
    asked: dict[str, Any] = {"out": model.parent / "q", "calib": str(model / "text.txt"), **RTN}
    for overrides in ({}, {"*.1.mlp.down_proj": "keep"}):
        with pytest.raises(CheckpointError) as found:
            bitlathe.quantize(str(model), **asked, overrides=overrides, restart=True)
        for word in (name, "infinite or NaN", "ownload it again, or mend it"):
            assert word in str(found.value)
        assert not (model.parent / "q" / "config.json").exists()


def test_an_output_head_that_is_not_finite(model: Path) -> None:
    damaged(lambda tensors: tensors["lm_head.weight"].view(-1)[7:8].fill_(torch.inf))(model)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has infinite or NaN values"):
        bitlathe.quantize(
            str(model), out=model.parent / "q", calib=str(model / "text.txt"), overrides={"lm_head": "W8A16G32"}, **RTN
        )


# The command line


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scheme", "W4A16"], ["W4A16 puts 128 inputs", "W4A16G64"]),
        (["--seqlen", "1000"], ["200 tokens", "--seqlen"]),
        (["--override", "nothing=keep"], ["'nothing' matches none", "begin with *"]),
        (["--format", "compressed-tensors", "--override", "*.q_proj=keep"], ["compressed-tensors cannot", "native format"]),
        (["--format", "gguff"], ["unknown format 'gguff'", "native"]),
    ],
)
def test_on_the_command_line(model: Path, options: list[str], words: list[str]) -> None:
    before = everything(model.parent)
    usual = ["--scheme", "W4A16G32", "--tuner", "rtn", "--seqlen", "16", "--calib", str(model / "text.txt")]
    done = CliRunner().invoke(cli.app, ["quantize", str(model), "--out", str(model.parent / "q"), *usual, *options])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert everything(model.parent) == before


# Searches

SEARCH: dict[str, Any] = {"scheme": None, "bits": 4.5, "schemes": "W3A16G32,W8A16G32", "search": {"tokens": 64, "held_out": 32}}


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize(
    ("error", "changes", "words"),
    [
        (PlanError, {"bits": 3.4}, ["3.4 bits a weight cannot be had", "W3A16G32, W8A16G32 take from 3.5000 to 8.5000"]),
        (PlanError, {"bits": 9.0}, ["9 bits a weight cannot be had", "from 3.5000 to 8.5000", "other --schemes"]),
        (PlanError, {"schemes": "keep"}, ["nothing but keep", "--schemes"]),
        (PlanError, {"schemes": "W4A16,W8A16"}, ["none of the schemes W4A16, W8A16 fits", "64 inputs", "_CHANNEL", "=keep"]),
        (PlanError, {"include": "lm_heed"}, ["--include lm_heed matches no linear", "lm_head"]),
        (PlanError, {"groups": [["*.o_proj", "*.oo_proj"]]}, ["'*.oo_proj' matches none", "begin with *"]),
        (PlanError, {"overrides": {"*": "W4A16G32"}}, ["every linear has an override", "--bits"]),
        (PlanError, {"overrides": {"*.q_proj": "W8A16G32"}}, ["'*.q_proj' takes", "q_proj out of the search", "as one matrix"]),
        (PlanError, {"act_clip": 0.9}, ["--act-clip is for quantized activations"]),
        (PlanError, {"schemes": "NVFP4,MXFP4", "act_asymmetric": True}, ["--act-asym is for integer activations"]),
        (PlanError, {"rotation_trials": 2, "rotate": "R1"}, ["--rotation-trials", "W4A4"]),
        (
            FormatError,
            {"formats": "compressed-tensors", "dtype": "fp16", "schemes": "MXFP4A16,MXFP8A16"},
            ["none of the schemes", "MXFP4A16: ", "--dtype bf16"],
        ),
        (
            FormatError,
            {"formats": "compressed-tensors", "schemes": "W4A16G32_ASYM,W8A16G32"},
            ["zero points beside other schemes", "symmetric"],
        ),
        (CalibrationError, {"seqlen": 190}, ["one window of 190 tokens", "another one to measure on", "--seqlen"]),
        (RecipeError, {"scheme": "W4A16"}, ["Leave one of the two out", "schemes"]),
    ],
    ids=lambda part: "",
)
def test_a_search_that_cannot_be_done(
    model: Path, error: type[BitlatheError], changes: dict[str, Any], words: list[str]
) -> None:
    asked = {**SEARCH, "scores": model.parent / "scores", **changes}
    refused(error, model, words, **asked)
    before = everything(model.parent)
    alone = _said({**RTN, **asked})
    with pytest.raises(error):
        bitlathe.search(str(model), calib=str(model / "text.txt"), **alone)
    assert everything(model.parent) == before


@pytest.mark.usefixtures("sealed")
def test_an_option_that_a_format_cannot_hold_is_left_out_and_told(model: Path) -> None:
    asked = {"out": model.parent / "q", "calib": model / "text.txt", **RTN, **SEARCH, "schemes": "MXFP4A16,W3A16G32,W8A16G32"}
    ready = prepare(merge(_said({"model": model, "formats": "compressed-tensors", "dtype": "fp16", **asked})))
    assert ready.space is not None and ready.space.options == ["W3A16G32", "W8A16G32"]
    assert any(note.startswith("MXFP4A16 is left out of the search: ") and "bf16" in note for note in ready.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "four"), "no number of bits"),
        (("--bits", "4.5", "--plot", "a.pdf"), "one of .png, .svg, .html"),
        (("--bits", "4.5", "--out", "none/plan.yaml"), "is not there"),
        (("--bits", "4.5,20", "--schemes", "W3A16G32,W8A16G32"), "20 bits a weight cannot be had"),
        ((), "--bits is what a search is for"),
        (("--bits", "4.5", "--set", "bits=5"), "not by --set too"),
        (("--bits", "4.5,nan"), "no number of bits"),
    ],
)
@pytest.mark.usefixtures("sealed")
def test_a_search_on_the_command_line(model: Path, options: tuple[str, ...], words: str) -> None:
    before = everything(model.parent)
    done = CliRunner().invoke(cli.app, ["search", str(model), "--calib", str(model / "text.txt"), "--seqlen", "16", *options])
    assert done.exit_code == 2 and words in done.stderr
    assert everything(model.parent) == before


# Embeddings


@pytest.mark.usefixtures("sealed")
@pytest.mark.parametrize(
    ("error", "changes", "words"),
    [
        (PlanError, {"overrides": {"*embed_tokens": "W8A8"}}, ["W8A8 rounds activations", "none to round", "W8A16_CHANNEL"]),
        (
            PlanError,
            {"overrides": {"*embed_tokens": "W4A16"}},
            ["128 inputs under one scale", "model.embed_tokens (64 inputs)"],
        ),
        (
            FormatError,
            {"overrides": {"*embed_tokens": "W8A16G32"}, "formats": "compressed-tensors"},
            ["quantized embeddings (model.embed_tokens)", "16 bits", "native"],
        ),
        (PlanError, {"overrides": {"*embed_token": "W8A16G32"}}, ["'*embed_token' matches none"]),
    ],
    ids=["activations", "blocks", "format", "name"],
)
def test_embeddings_that_cannot_be_quantized(
    model: Path, error: type[BitlatheError], changes: dict[str, Any], words: list[str]
) -> None:
    refused(error, model, words, **changes)
