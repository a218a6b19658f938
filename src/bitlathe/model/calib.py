"""Calibration and evaluation text: a name or a file in, windows of tokens out, the same ones every time."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from datasets import load_dataset
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # see io/checkpoint.py
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bitlathe.errors import CalibrationError

# Text the package brings along (public-domain English), by what it is for.
BUILTIN: dict[str, str] = {"calibration": "calib.txt", "evaluation": "eval.txt"}

# A document is worth this many characters a token at the least; more of a dataset than that is not fetched.
_CHARACTERS_A_TOKEN = 8

_WAYS_OUT = "Two ways out: name a text file of your own, or builtin for the text that comes with the package"


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the model. Raises CalibrationError if there is none."""
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise CalibrationError(
            f"{folder} has no tokenizer (tokenizer.json or tokenizer.model), which turning text into tokens takes. "
            "Put the tokenizer's files beside the weights"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise CalibrationError(
                f"the tokenizer in {folder} is a program that came with the weights, and such programs are never run. Put a "
                "tokenizer.json, and a tokenizer_config.json without 'auto_map', beside the weights"
            ) from error
        raise CalibrationError(f"the tokenizer in {folder} cannot be loaded: {error}") from error


def text_of(source: str, purpose: str, *, characters: int) -> list[str]:
    """The documents that `source` names: "builtin", a text file, or a Hub dataset with a "text" column.

    purpose: "calibration" or "evaluation", which decides the built-in text. characters: how much of a dataset is wanted.
    Raises CalibrationError if it cannot be had.
    """
    if source == "builtin":
        return [files("bitlathe").joinpath("data", BUILTIN[purpose]).read_text(encoding="utf-8")]
    path = Path(source).expanduser()
    if path.is_file():
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} is not UTF-8 text ({error}): convert it, or name another file") from error
    # ".txt" is a file's; the ".5" of a dataset called v1.5 is not.
    if path.suffix[1:].isalpha() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise CalibrationError(
            f"the {purpose} text {source!r} is not a file. Name a text file, a dataset of the Hub, or builtin"
        )
    return _dataset_text(source, purpose, characters)


def windows_of(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], *, seqlen: int, count: int | None = None, seed: int | None = None
) -> Tensor:
    """Windows of `seqlen` tokens [windows, seqlen]: the documents' tokens in a row, without special tokens, cut up.

    count: at most so many; the first ones, or with a seed a random choice in a random order. Raises CalibrationError when
    the text is shorter than one window.
    """
    tokens = [tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] for document in documents]
    row = torch.tensor([token for document in tokens for token in document], dtype=torch.long)
    whole = len(row) // seqlen
    if whole == 0:
        raise CalibrationError(
            f"the text has {len(row)} tokens, less than one window of {seqlen}. Use a longer text or a shorter --seqlen"
        )
    windows = row[: whole * seqlen].view(whole, seqlen)
    if seed is not None:
        windows = windows[torch.randperm(whole, generator=torch.Generator().manual_seed(seed))]
    return windows[:count].clone()


def refuse_strange_tokens(tokens_NT: Tensor, vocabulary: int, folder: Path) -> None:
    """Raise CalibrationError for tokens beyond the `vocabulary` of the model in `folder`."""
    highest = int(tokens_NT.max())
    if highest >= vocabulary:
        raise CalibrationError(
            f"the tokenizer in {folder} makes the token {highest} of the text, and the model's vocabulary ends at "
            f"{vocabulary - 1}: it is another model's. Put the model's own tokenizer beside the weights"
        )


def _dataset_text(name: str, purpose: str, characters: int) -> list[str]:
    try:
        rows = load_dataset(name, split="train", streaming=True)
        documents, length = [], 0
        for row in rows:
            text = row["text"]
            if not isinstance(text, str):
                raise CalibrationError(
                    f"the dataset {name!r} holds a {type(text).__name__} in its column 'text': name one of texts, or a file"
                )
            documents.append(text)
            length += len(text)
            if length >= characters:
                break
    except KeyError as error:
        raise CalibrationError(
            f"the dataset {name!r} has no column {error}: name one with a text column, or a text file"
        ) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise CalibrationError(
            f"the {purpose} text {name!r} is not a local file, and the Hub cannot be reached for it ({type(error).__name__}). "
            f"{_WAYS_OUT}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        # What it says beyond the first line is how to call a library that our users do not call.
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise CalibrationError(
            f"the {purpose} text {name!r} is not a local file, and as a dataset of the Hub it cannot be used: it must be open "
            f"to you and have texts in a split 'train' without naming a configuration ({reason}). {_WAYS_OUT}"
        ) from error
    return documents


def characters_for(samples: int, seqlen: int) -> int:
    """How many characters of text surely hold `samples` windows of `seqlen` tokens."""
    return samples * seqlen * _CHARACTERS_A_TOKEN
