"""Text to windows: deterministic, without special tokens, and a text that cannot be had is refused by name."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bitlathe.errors import CalibrationError
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model import calib as module
from bitlathe.model.calib import characters_for, refuse_strange_tokens, text_of, tokenizer_of, windows_of
from families import save_model, write_text


@pytest.fixture(scope="module")
def builtin() -> PreTrainedTokenizerBase:
    return tokenizer_of(Checkpoint("builtin").path)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """One token a letter: a is 3, b is 4 and so on."""
    folder = tmp_path_factory.mktemp("letters")
    save_model(folder)
    return tokenizer_of(folder)


# Windows


def test_windows_are_the_text_s_tokens_in_a_row(letters: PreTrainedTokenizerBase) -> None:
    windows = windows_of(letters, ["abcdefg", "hijk"], seqlen=3)
    # documents follow each other, and what does not fill a window is left
    assert windows.tolist() == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert windows.dtype == torch.long
    assert windows_of(letters, ["abcdefg", "hijk"], seqlen=3, count=2).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert windows_of(letters, ["abcdefg", "hijk"], seqlen=3, count=9).tolist() == windows.tolist()


def test_no_special_tokens(letters: PreTrainedTokenizerBase) -> None:
    """Though the tokenizer would put one in front of every text."""
    begun = copy.deepcopy(letters)
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="a $A", special_tokens=[("a", 3)])
    assert begun("bc")["input_ids"] == [3, 4, 5]
    assert windows_of(begun, ["bc", "de"], seqlen=2).tolist() == [[4, 5], [6, 7]]


def test_a_seed_picks_windows_and_orders_them(letters: PreTrainedTokenizerBase) -> None:
    text = ["abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]

    def picked(seed: int | None, count: int | None = 6) -> list[tuple[int, ...]]:
        return [tuple(row) for row in windows_of(letters, text, seqlen=2, count=count, seed=seed).tolist()]

    everything = picked(None, None)
    assert len(set(everything)) == 26
    assert picked(7) == picked(7)
    assert picked(7) != picked(8)
    assert picked(7) == picked(7, None)[:6]  # more samples extend what fewer began with
    assert sorted(picked(7, None)) == everything
    assert picked(0) != everything[:6]


def test_the_choice_leaves_the_global_generator_alone(letters: PreTrainedTokenizerBase) -> None:
    state = torch.get_rng_state()
    windows_of(letters, ["abcdef"], seqlen=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_windows_hold_no_more_than_themselves(letters: PreTrainedTokenizerBase) -> None:
    """A view would keep the tokens of the whole text in memory."""
    windows = windows_of(letters, ["abcdefgh" * 50], seqlen=4, count=2)
    assert windows.untyped_storage().nbytes() == 2 * 4 * 8


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("abcd", 4)])
def test_too_short_a_text(letters: PreTrainedTokenizerBase, text: str, tokens: int) -> None:
    with pytest.raises(CalibrationError, match=rf"has {tokens} tokens, less than one window of 5\. Use a longer text"):
        windows_of(letters, [text], seqlen=5)


@pytest.mark.parametrize("strange", [96, 1000])
def test_tokens_beyond_the_vocabulary(strange: int) -> None:
    tokens: Tensor = torch.tensor([[3, 95], [4, 5]])
    refuse_strange_tokens(tokens, 96, Path("m"))
    tokens[1, 0] = strange
    with pytest.raises(CalibrationError, match=rf"in m makes the token {strange} .* ends at 95.*own tokenizer"):
        refuse_strange_tokens(tokens, 96, Path("m"))


def test_a_dataset_s_share_of_text_is_enough(builtin: PreTrainedTokenizerBase) -> None:
    """English takes four or five characters a token."""
    (text,) = text_of("builtin", "calibration", characters=1)
    wanted = characters_for(20, 128)
    assert len(windows_of(builtin, [text[:wanted]], seqlen=128)) >= 20


# Where text comes from


def test_the_bundled_texts() -> None:
    (calibration,), (evaluation,) = (text_of("builtin", purpose, characters=1) for purpose in ("calibration", "evaluation"))
    assert calibration == files("bitlathe").joinpath("data", "calib.txt").read_text(encoding="utf-8")
    assert min(len(calibration), len(evaluation)) > 100_000
    # What is measured on must not be what was tuned on.
    lines = {line for line in calibration.splitlines() if len(line) > 40}
    assert not any(line in lines for line in evaluation.splitlines())


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text", "builtin.md"])
def test_a_file_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever its suffix says: the markup of a .jsonl is part of the text."""
    content = '{"text": "naïve 漢字"}\r\n{"text": "b"}\n'
    (tmp_path / name).write_bytes(content.encode())
    expected = [content.replace("\r\n", "\n")]
    assert text_of(str(tmp_path / name), "calibration", characters=1) == expected
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text_of(name, "evaluation", characters=1) == expected
    assert text_of(f"~/{name}", "evaluation", characters=1) == expected


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"old\.txt is not UTF-8 text \(.*0xef.*\): convert it, or name another"):
        text_of(str(tmp_path / "old.txt"), "calibration", characters=1)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "./missing", "/missing", "~/missing", "a/b/c"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("bitlathe.model.dataset_text.load_dataset", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(CalibrationError, match=r"the evaluation text '.*' is not a file\. .*builtin"):
        text_of(name, "evaluation", characters=1)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is not a file"):
        text_of(str(tmp_path), "calibration", characters=1)


# Datasets of the Hub


class Hub:
    """Stands in for datasets.load_dataset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: Iterable[dict[str, Any]]) -> None:
        self.asked: dict[str, Any] = {}
        self.given = 0
        self._rows = rows
        monkeypatch.setattr("bitlathe.model.dataset_text.load_dataset", self.load)

    def load(self, name: str, **options: Any) -> Iterator[dict[str, Any]]:
        self.asked = {"name": name, **options}
        for row in self._rows:
            self.given += 1
            yield row


@pytest.mark.parametrize("name", ["NeelNanda/pile-10k", "wikitext", "org/texts-v1.5"])
def test_a_dataset_is_streamed_as_far_as_it_is_needed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hub = Hub(monkeypatch, ({"text": f"{number:04}", "other": 1} for number in range(100)))
    assert text_of(name, "calibration", characters=10) == ["0000", "0001", "0002"]
    assert hub.asked == {"name": name, "split": "train", "streaming": True}
    assert hub.given == 3


def test_a_small_dataset_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, [{"text": "a"}, {"text": "b"}])
    assert text_of("org/name", "calibration", characters=10) == ["a", "b"]


def test_a_dataset_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, [{"sentence": "a"}])
    with pytest.raises(CalibrationError, match=r"'org/name' has no column 'text'.*or a text file"):
        text_of("org/name", "calibration", characters=10)


@pytest.mark.parametrize("text", [None, 3, ["a"]])
def test_a_dataset_whose_text_is_none(monkeypatch: pytest.MonkeyPatch, text: object) -> None:
    Hub(monkeypatch, [{"text": text}])
    with pytest.raises(CalibrationError, match=r"'org/name'.*column 'text'.*or a file"):
        text_of("org/name", "calibration", characters=10)


@pytest.mark.parametrize(
    "failure",
    [
        FileNotFoundError("Dataset 'org/name' doesn't exist on the Hub or cannot be accessed."),
        ValueError("Config name is missing.\nExample of usage:\n\tload_dataset('org/name', 'en')"),
        ValueError("Bad split: train. Available splits: ['test']"),
        RuntimeError("Dataset scripts are no longer supported, but found name.py"),
    ],
)
def test_a_dataset_that_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("bitlathe.model.dataset_text.load_dataset", load)
    with pytest.raises(CalibrationError, match=r"'org/name' .*cannot be used.* a text file of your own, or builtin") as found:
        text_of("org/name", "calibration", characters=10)
    assert str(failure).partition("\n")[0].rstrip(".") in str(found.value)
    assert not {"reached", "load_dataset"} & set(re.findall(r"\w+", str(found.value)))


# Tokenizers


def test_a_tokenizer_s_own_program_is_not_run(tmp_path: Path) -> None:
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(CalibrationError, match=r"never run\. Put a tokenizer\.json") as found:
        tokenizer_of(tmp_path)
    assert "trust_remote_code" not in str(found.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"has no tokenizer .*beside the weights"):
        tokenizer_of(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0", "model": {"type": "none"}}'])
def test_a_tokenizer_that_is_damaged(tmp_path: Path, content: str) -> None:
    write_text(tmp_path / "text.txt", 3)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CalibrationError, match=rf"the tokenizer in {tmp_path} cannot be loaded: "):
        tokenizer_of(tmp_path)


@pytest.mark.parametrize("break_", ["\n", "\n\n", " "])
def test_a_long_document_has_the_tokens_that_it_has_at_once(break_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(Checkpoint("builtin").path)
    text = break_.join(f"Line {index}, of some words; {index * 7919 % 101} of them." for index in range(300))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    asked, encoded = list[int](), module._encoded

    def encode(known: PreTrainedTokenizerBase, piece: str) -> Tensor:
        asked.append(len(piece))
        return encoded(known, piece)

    monkeypatch.setattr(module, "_PIECE", 1000)
    monkeypatch.setattr(module, "_encoded", encode)
    (found,) = windows_of(tokenizer, [text], seqlen=len(whole))
    assert found.tolist() == whole
    assert (max(asked) < 1500) == (break_ == "\n")


def test_a_tokenizer_that_marks_beginnings_gets_a_document_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Marking:
        """One token a character, and one for where a text begins."""

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, *map(ord, text)]}

    monkeypatch.setattr(module, "_PIECE", 10)
    text = "\n".join(["abc"] * 50)
    (found,) = windows_of(Marking(), [text], seqlen=len(text) + 1)  # pyright: ignore[reportArgumentType]
    assert found.tolist() == [1, *map(ord, text)]
