"""convert: codes from one format into another, and back, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bitlathe
from bitlathe.errors import BitlatheError, CheckpointError, FormatError, OutputError, RecipeError
from bitlathe.formats.compressed_tensors import CompressedTensors
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.numerics.scheme import SCHEMES
from quantized_folder import LLAMA, make, plan_for, random_model

CT = "compressed-tensors"
SCHEMES_HERE = {"o_proj": SCHEMES["W8A16_CHANNEL"], "down_proj": None, "proj": SCHEMES["W4A16G32"]}


def quantized(out: Path, **fields: Any) -> Path:
    asked = {"scheme": "W4A16", "tuner": "rtn", "calib": "builtin", "seqlen": 64, "samples": 4} | fields
    bitlathe.quantize("builtin", out=out, **asked)
    return out


def tensors(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {
            name: str((tensor.dtype, tensor.shape)).encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
            for name, tensor in load_file(file).items()
        }
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("both") / "q", formats=("native", CT), rotate="R1,R2", scheme="W4A4")


@pytest.mark.parametrize(("source", "format"), [("native", CT), (CT, "native"), ("native", "native")])
def test_what_is_converted_is_what_would_have_been_written(both: Path, tmp_path: Path, source: str, format: str) -> None:
    plan = bitlathe.convert(both / source, out=tmp_path / "to", formats=format)
    assert tensors(tmp_path / "to") == tensors(both / format)
    for name in ("config.json", "plan.json", "tokenizer.json"):
        assert (tmp_path / "to" / name).read_bytes() == (both / format / name).read_bytes(), name
    report = json.loads((tmp_path / "to" / "report.json").read_bytes())
    assert report["converted"]["format"] == source
    assert report["recipe"]["scheme"] == "W4A4" and report["plan"] == plan.model_dump(mode="json")
    x = torch.tensor([[5, 9, 4]])
    assert torch.equal(bitlathe.load(tmp_path / "to")(x).logits, bitlathe.load(both / source)(x).logits)


def test_several_formats_at_once_and_the_same_command_again(both: Path, tmp_path: Path) -> None:
    told: list[Any] = []
    for _ in range(2):
        bitlathe.convert(both / "native", out=tmp_path / "to", formats=f"{CT},native", listen=told.append)
    assert tensors(tmp_path / "to" / CT) == tensors(both / CT)
    assert tensors(tmp_path / "to" / "native") == tensors(both / "native")
    assert "nothing was done" in told[-1].text


def test_a_folder_of_another_program_is_imported_code_for_code(tmp_path: Path) -> None:
    model = random_model(LLAMA)
    made = make(tmp_path / "theirs", CompressedTensors(), model, plan_for(model, SCHEMES_HERE))
    bitlathe.convert(made.folder, out=tmp_path / "ours")
    assert torch.equal(bitlathe.load(tmp_path / "ours")(torch.arange(2, 50).view(2, 24)).logits, made.logits)
    report = json.loads((tmp_path / "ours" / "report.json").read_bytes())
    assert report["recipe"] is None and report["plan"] == made.plan.model_dump(mode="json")
    assert any("keeps it" in reason for reason in report["kept"].values())
    assert "another program" in (tmp_path / "ours" / "README.md").read_text()
    bitlathe.convert(tmp_path / "ours", out=tmp_path / "back", formats=CT)
    assert tensors(tmp_path / "back") == tensors(made.folder)


@pytest.mark.parametrize(
    ("folder", "formats", "error", "words"),
    [
        ("builtin", "native", CheckpointError, "is not quantized"),
        ("dense", "native", CheckpointError, "no codes"),
        ("kv", CT, FormatError, "--kv"),
        ("kv", "nativ", RecipeError, "Did you mean 'native'"),
        ("inside", "native", OutputError, "own folder"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, formats: str, error: type[BitlatheError], words: str
) -> None:
    source, out = folder, tmp_path / "to"
    if folder != "builtin":
        source = str(
            quantized(
                tmp_path / "q",
                formats="dense" if folder == "dense" else "native",
                kv="KV4" if folder == "kv" else None,
                scheme="W4A4",
            )
        )
    if folder == "inside":
        out = tmp_path / "q" / "to"

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    with pytest.raises(error, match=words):
        bitlathe.convert(source, out=out, formats=formats)
    assert not out.exists()
