"""Calibration and evaluation text: a name or a file in, windows of tokens out, the same ones every time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bitlathe.errors import CalibrationError
from bitlathe.registry import load

# Text the package brings along (public-domain English), by what it is for.
BUILTIN: dict[str, str] = {"calibration": "calib.txt", "evaluation": "eval.txt"}

# What reads data sets is large, and is imported when one is named.
_DATASET = "bitlathe.model.dataset_text:dataset_text"

# Characters of a document that are turned into tokens at a time, which takes hundreds of bytes a token; where a piece may end,
# and how far around such a place tokens are compared.
_PIECE, _END, _AROUND = 1 << 16, re.compile(r"(?<=\S)\n(?=\S)"), 200

# A document is worth this many characters a token at the least; more of a dataset than that is not fetched.
_CHARACTERS_A_TOKEN = 8


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
    return load(_DATASET)(source, purpose, characters)


def windows_of(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], *, seqlen: int, count: int | None = None, seed: int | None = None
) -> Tensor:
    """Windows of `seqlen` tokens [windows, seqlen]: the documents' tokens in a row, without special tokens, cut up.

    count: at most so many; the first ones, or with a seed a random choice in a random order. Raises CalibrationError when
    the text is shorter than one window.
    """
    rows = [_encoded(tokenizer, piece) for document in documents for piece in _pieces(tokenizer, document)]
    row = torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)
    whole = len(row) // seqlen
    if whole == 0:
        raise CalibrationError(
            f"the text has {len(row)} tokens, less than one window of {seqlen}. Use a longer text or a shorter --seqlen"
        )
    windows = row[: whole * seqlen].view(whole, seqlen)
    if seed is not None:
        windows = windows[torch.randperm(whole, generator=torch.Generator().manual_seed(seed))]
    return windows[:count].clone()


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def _pieces(tokenizer: PreTrainedTokenizerBase, document: str) -> Iterator[str]:
    """A document in pieces whose tokens, in a row, are its own; in one, where no line's end is such a place."""
    start = 0
    for end in _END.finditer(document, _PIECE):
        at = end.end()
        if at - start >= _PIECE:
            before, after = document[max(at - _AROUND, start) : at], document[at : at + _AROUND]
            apart = torch.cat([_encoded(tokenizer, before), _encoded(tokenizer, after)])
            if torch.equal(apart, _encoded(tokenizer, before + after)):
                yield document[start:at]
                start = at
            elif start == 0:
                break  # a tokenizer that marks the beginning of a text does so everywhere
    yield document[start:]


def refuse_strange_tokens(tokens_NT: Tensor, vocabulary: int, folder: Path) -> None:
    """Raise CalibrationError for tokens beyond the `vocabulary` of the model in `folder`."""
    highest = int(tokens_NT.max())
    if highest >= vocabulary:
        raise CalibrationError(
            f"the tokenizer in {folder} makes the token {highest} of the text, and the model's vocabulary ends at "
            f"{vocabulary - 1}: it is another model's. Put the model's own tokenizer beside the weights"
        )


def characters_for(samples: int, seqlen: int) -> int:
    """How many characters of text surely hold `samples` windows of `seqlen` tokens."""
    return samples * seqlen * _CHARACTERS_A_TOKEN
