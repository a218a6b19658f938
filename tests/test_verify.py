"""verify: other processes' readings of a folder, compared with the codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import bitlathe
from bitlathe.cli import app
from bitlathe.errors import CheckpointError
from bitlathe.formats import FORMATS
from bitlathe.readers import READERS
from families import save_model, write_text
from test_convert import CT, quantized


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("both") / "q", formats=("native", CT))


def found(result: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {row["reader"]: (row["linears"], row["unequal"], row["kl"], row["same"]) for row in result["readers"]}


def test_every_reader_reads_the_codes_beside_the_folder(both: Path) -> None:
    result = bitlathe.verify(both / CT)
    assert result["codes"] == str(both / "native") and result["same"] and result["missing"] == []
    assert found(result) == {"bitlathe": (28, 0, 0.0, True), "transformers": (28, 0, 0.0, True)}


def test_a_native_folder_is_read_by_transformers_that_was_taught(both: Path) -> None:
    assert found(bitlathe.verify(both / "native")) == {
        "bitlathe": (28, 0, 0.0, True),
        "transformers with bitlathe.hf": (28, 0, 0.0, True),
    }


def test_weights_that_are_not_the_codes_are_found_and_told(both: Path, tmp_path: Path) -> None:
    shutil.copytree(both, tmp_path / "q")
    file = sorted((tmp_path / "q" / CT).glob("*.safetensors"))[1]
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight_scale"))
    tensors[name][0, 0] = tensors[name][0, 0] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "q" / CT), "--json"])
    result = json.loads(done.stdout)
    assert done.exit_code == 1 and not result["same"]
    for row in result["readers"]:
        assert 0 < row["unequal"] <= 128 and row["largest"] > 1 and not row["same"]
    report = json.loads((tmp_path / "q" / CT / "report.json").read_bytes())
    assert report["verified"] == result
    assert "## Verified" in (tmp_path / "q" / CT / "README.md").read_text()


def test_a_reader_that_fails_is_a_difference_with_its_words(both: Path, tmp_path: Path) -> None:
    shutil.copytree(both / CT, tmp_path / CT)
    for file in (tmp_path / CT).glob("model-00001*"):
        file.unlink()
    shown = CliRunner().invoke(app, ["verify", str(tmp_path / CT), "--native", str(both / "native")])
    assert shown.exit_code == 1
    assert "failed" in shown.output and "lacks" in shown.output


@pytest.mark.parametrize(("format", "scheme"), [(CT, "FP8_CHANNEL"), ("fp8", "FP8_BLOCK_DYNAMIC")])
def test_experts_that_a_reader_fuses(tmp_path: Path, format: str, scheme: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "moe_intermediate_size": 128}
    save_model(tmp_path / "m", "qwen3_moe", **sizes)
    asked: dict[str, Any] = {"scheme": scheme, "tuner": "rtn", "samples": 2, "seqlen": 24}
    text = write_text(tmp_path / "text.txt", 400)
    plan = bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", calib=str(text), formats=format, **asked)
    result = bitlathe.verify(tmp_path / "q")
    assert sum(".experts." in name for name in plan.quantized) == 12
    assert [(row["linears"], row["unequal"], row["same"]) for row in result["readers"]] == [(len(plan.quantized), 0, True)] * 2


def test_an_original_has_nothing_to_verify() -> None:
    with pytest.raises(CheckpointError, match="not quantized"):
        bitlathe.verify("builtin")


def test_quantize_verifies_at_the_end(tmp_path: Path) -> None:
    asked = ["--scheme", "W8A16", "--tuner", "rtn", "--calib", "builtin", "--seqlen", "64", "--samples", "2", "--verify"]
    words = ["quantize", "builtin", *asked, "--out"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "q")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "q" / "report.json").read_bytes())["verified"]["same"] is True


def test_every_format_has_a_reader_and_every_reader_a_format() -> None:
    assert set(FORMATS) == {format for name, reader in READERS.items() if name != "bitlathe" for format in reader.formats}
    assert all(reader.formats and reader.target.startswith("bitlathe.readers.") for reader in READERS.values())
