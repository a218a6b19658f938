"""A tokenizer.json in the keys of a GGUF file: byte-level BPE, and BPE that falls back to bytes as SentencePiece does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from bitlathe.errors import FormatError

# How a byte-level tokenizer splits text -> llama.cpp's name for it, and whether with that it looks for whole words before it
# merges. The first two differ in how many digits stay together.
_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS: dict[str | None, tuple[str, bool]] = {
    _PATTERN % "{1,3}": ("llama-bpe", True),
    _PATTERN % "": ("qwen2", False),
    None: ("gpt-2", False),  # ByteLevel's own
}
_SPACE = "\u2581"  # what stands for a space where bytes are fallen back to


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
    writer.add_tokenizer_pre("default" if bytes_too else _split(read) or "default")
    kinds = [_kind(number, texts, added, unknown=model.get("unk_token")) for number in range(size)]
    # What is merged earlier scores higher, and what no merge makes lowest: llama.cpp would merge that too.
    ranks = {merge.replace(" ", "", 1): -float(rank) for rank, merge in reversed(list(enumerate(merges, 1)))}
    # llama.cpp looks for tokens of a user in text whose spaces are still there: of such tokens, runs that merges make too.
    runs = {number for number, text in texts.items() if bytes_too and text in ranks and not text.strip(_SPACE)}
    shown = {i: " " * len(texts[i]) for i in runs if i < size and kinds[i] == TokenType.USER_DEFINED}
    writer.add_token_list([(texts | shown).get(number, f"[PAD{number}]") for number in range(size)])
    if bytes_too:
        writer.add_token_scores([ranks.get(texts.get(number, ""), -1.0 - len(merges)) for number in range(size)])
    writer.add_token_types(kinds)
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
    if kind != "BPE" or not (_spaced(read) if read["model"].get("byte_fallback") else _split(read)):
        raise FormatError(
            f"gguf: the tokenizer of {folder} ({kind}) is none that this program can write for llama.cpp: it knows byte-level "
            "BPE as of Llama 3, Qwen 2 and GPT-2, and BPE with bytes to fall back to. Write the native format, or dense, which "
            "llama.cpp's own converter reads"
        )


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _split(read: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer splits text; None for one it is not known to have."""
    steps = _steps(read, "pre_tokenizer")
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    normal = [step["type"] for step in _steps(read, "normalizer")]
    if len(levels) != 1 or len(steps) != 1 + len(patterns) or len(patterns) > 1 or normal not in ([], ["NFC"]):
        return None
    name, whole = _SPLITS.get(patterns[0] if patterns else None, (None, False))
    twice = bool(patterns) == levels[0].get("use_regex", True)
    return None if twice or whole != bool(read["model"].get("ignore_merges")) else name


def _spaced(read: dict[str, Any]) -> bool:
    """Whether a tokenizer with bytes to fall back to does nothing to text but to replace spaces, as SentencePiece does."""
    done = [*_steps(read, "normalizer"), *_steps(read, "pre_tokenizer")]
    replaced = [step for step in done if step.get("content") == _SPACE or step.get("replacement") == _SPACE]
    # Gemma splits at spaces when there are none left.
    idle = [step for step in done if step.get("type") == "Split" and step["pattern"] == {"String": " "}]
    return len([step for step in done if step not in idle and step.get("type") != "Prepend"]) == len(replaced) == 1


def _steps(read: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, one after the other."""
    said = read.get(part) or {}
    inner = said.get("normalizers", said.get("pretokenizers"))
    return ([said] if said else []) if inner is None else inner


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
    steps = [*_steps(read, "normalizer"), *_steps(read, "pre_tokenizer")]
    first = ("always", "first")
    return any(
        step.get("type") == "Prepend" or bool(step.get("add_prefix_space")) or step.get("prepend_scheme") in first
        for step in steps
    )
