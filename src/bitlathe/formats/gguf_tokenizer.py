"""A tokenizer.json in the keys of a GGUF file: byte-level BPE, and BPE that falls back to bytes as SentencePiece does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from bitlathe.errors import FormatError

# A part of the pattern that a byte-level tokenizer splits text by -> llama.cpp's name for it, the most particular first.
_SPLITS: dict[str, str] = {"\\p{N}{1,3}": "llama-bpe", "|\\p{N}|": "qwen2"}
_PLAIN = "gpt-2"  # of a ByteLevel with its own pattern


def add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Write the tokenizer of a model's folder; a folder without one gives a file without. size: of the vocabulary."""
    read = _read(folder, "tokenizer.json")
    if not read:
        writer.add_tokenizer_model("no_vocab")
        return
    said, model = _read(folder, "tokenizer_config.json"), read["model"]
    added = {token["id"]: token for token in read.get("added_tokens", [])}
    texts = {number: text for text, number in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    bytes_too = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if bytes_too else "gpt2")
    writer.add_tokenizer_pre("default" if bytes_too else _split(read))
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(size)])
    if bytes_too:
        # What is merged earlier scores higher.
        ranks = {merge.replace(" ", "", 1): -float(rank) for rank, merge in reversed(list(enumerate(merges, 1)))}
        writer.add_token_scores([ranks.get(texts.get(number, ""), 0.0) for number in range(size)])
    writer.add_token_types([_kind(number, texts, added, unknown=model.get("unk_token")) for number in range(size)])
    if not bytes_too:
        writer.add_token_merges(merges)
    numbers = {text: number for number, text in texts.items()}
    ends = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, add in ends.items():
        if (number := numbers.get(_content(said.get(f"{name}_token")))) is not None:
            add(number)
    writer.add_add_bos_token(_begins_with(read, _content(said.get("bos_token"))))
    writer.add_add_space_prefix(_prefixes(read))
    template = said.get("chat_template")
    if (beside := folder / "chat_template.jinja").is_file():
        template = beside.read_text(encoding="utf-8")
    if isinstance(template, str):
        writer.add_chat_template(template)


def refuse_tokenizer(folder: Path) -> None:
    """Raise FormatError for a tokenizer that llama.cpp has no name for, as far as that is known here."""
    read = _read(folder, "tokenizer.json")
    if not read:
        return
    kind = read.get("model", {}).get("type")
    if kind != "BPE" or (not read["model"].get("byte_fallback") and _split(read) is None):
        raise FormatError(
            f"gguf: the tokenizer of {folder} ({kind}) is none that this program can write for llama.cpp: it knows byte-level "
            "BPE as of Llama 3, Qwen 2 and GPT-2, and BPE with bytes to fall back to. Write the native format, or dense, which "
            "llama.cpp's own converter reads"
        )


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _split(read: dict[str, Any]) -> Any:
    """llama.cpp's name for how a byte-level tokenizer splits text; None for one it is not known to have."""
    split = read.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    patterns = [str(step["pattern"]) for step in steps if "pattern" in step]
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    if not patterns:
        return _PLAIN
    plain = patterns[0].replace("\\\\", "\\")
    return next((name for part, name in _SPLITS.items() if part in plain), None) if len(patterns) == 1 else None


def _kind(number: int, texts: dict[int, str], added: dict[int, dict[str, Any]], *, unknown: str | None) -> TokenType:
    text = texts.get(number)
    if text is None:
        return TokenType.UNUSED
    if text == unknown:
        return TokenType.UNKNOWN
    if number in added:
        return TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED
    return TokenType.BYTE if text.startswith("<0x") and text.endswith(">") and len(text) == len("<0x00>") else TokenType.NORMAL


def _content(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _begins_with(read: dict[str, Any], bos: str) -> bool:
    """Whether every text is given the token `bos` in front."""
    after = read.get("post_processor") or {}
    for step in after.get("processors", [after]):
        single = step.get("single") or []
        if single and single[0].get("SpecialToken", {}).get("id") == bos:
            return True
    return False


def _prefixes(read: dict[str, Any]) -> bool:
    """Whether a space is put in front of every text."""
    parts = [read.get("normalizer") or {}, read.get("pre_tokenizer") or {}]
    steps = [step for part in parts for step in part.get("normalizers", part.get("pretokenizers", [part]))]
    first = ("always", "first")
    return any(
        step.get("type") == "Prepend" or bool(step.get("add_prefix_space")) or step.get("prepend_scheme") in first
        for step in steps
    )
