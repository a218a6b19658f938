"""Tokenizers in the keys of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from bitlathe.errors import FormatError
from bitlathe.formats.gguf_tokenizer import add_tokenizer, refuse_tokenizer

SIZE = 600  # of the vocabularies, of which the last ten are in no tokenizer
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def saved(folder: Path, tokenizer: Tokenizer, **named: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


def trained(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> Tokenizer:
    text = files("bitlathe").joinpath("data", "calib.txt").read_text(encoding="utf-8")[:100_000]
    trainer = BpeTrainer(vocab_size=SIZE - 10, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def sentencepiece(folder: Path, *, like: str) -> Path:
    """As Llama 2 has it, with a space in front of every text, in its older form and in that of transformers 5; or as Gemma,
    without one, and with runs of spaces among the tokens of a user."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    said = json.loads(trained(tokenizer, ["<unk>", "<s>", "</s>", *BYTES], []).to_str())
    said["added_tokens"] = said["added_tokens"][:3]  # bytes are ordinary tokens
    said["model"]["vocab"]["▁▁"] = len(said["model"]["vocab"])
    said["model"]["merges"].insert(0, ["▁", "▁"])
    said["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(said))
    if like == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("▁▁", "▁▁▁")])
    elif like == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    begin = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    return saved(folder, tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level(folder: Path, pattern: str | None, *, whole: bool = False) -> Path:
    tokenizer = Tokenizer(BPE(ignore_merges=whole))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    trained(tokenizer, ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet())
    return saved(folder, tokenizer, bos_token="<s>", eos_token="</s>")


def written(folder: Path) -> dict[str, Any]:
    """What the file says of the tokenizer of a folder."""
    refuse_tokenizer(folder)
    writer = GGUFWriter(folder / "model.gguf", "llama")
    add_tokenizer(writer, folder, SIZE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = GGUFReader(folder / "model.gguf").fields
    return {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items() if name.startswith("tok")}


@pytest.mark.parametrize("like", ["llama", "llama 5", "gemma"])
def test_one_that_falls_back_to_bytes_is_written_as_sentencepiece(like: str, tmp_path: Path) -> None:
    said = written(sentencepiece(tmp_path, like=like))
    read = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (said["model"], said["pre"]) == ("llama", "default")
    assert said["add_bos_token"] is True
    assert said["add_space_prefix"] is (like != "gemma")
    assert [said[f"{name}_token_id"] for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert "merges" not in said
    tokens, kinds, scores = said["tokens"], said["token_type"], said["scores"]
    assert len(tokens) == len(kinds) == len(scores) == SIZE
    assert tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert kinds[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert (tokens[3:259], set(kinds[3:259])) == (BYTES, {TokenType.BYTE})
    end = SIZE - 9
    # llama.cpp finds the first in spaces, as the merges do; the second is none of theirs.
    assert (tokens[end - 1], kinds[end - 1]) == (
        ("  ", TokenType.USER_DEFINED) if like == "gemma" else ("▁▁", TokenType.NORMAL)
    )
    if like == "gemma":
        assert (tokens[end], kinds[end]) == ("▁▁▁", TokenType.USER_DEFINED)
        end += 1
    assert {(text.startswith("[PAD"), kind) for text, kind in zip(tokens[end:], kinds[end:], strict=True)} == {
        (True, TokenType.UNUSED)
    }
    merged = ["".join(pair) for pair in read["model"]["merges"]]
    first = list(dict.fromkeys(merged))
    numbers = read["model"]["vocab"]
    assert sorted(first, key=lambda text: -scores[numbers[text]]) == first
    assert scores[0] < scores[numbers[first[-1]]]


@pytest.mark.parametrize(
    ("pattern", "whole", "name"),
    [(None, False, "gpt-2"), (QWEN2, False, "qwen2"), (LLAMA3, True, "llama-bpe")],
    ids=["gpt-2", "qwen2", "llama 3"],
)
def test_a_byte_level_one_has_llama_cpps_name(pattern: str | None, whole: bool, name: str, tmp_path: Path) -> None:  # noqa: FBT001
    said = written(byte_level(tmp_path, pattern, whole=whole))
    read = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (said["model"], said["pre"]) == ("gpt2", name)
    assert said["merges"] == [" ".join(pair) for pair in read["model"]["merges"]]
    assert said["tokens"][: SIZE - 10] == sorted(read["model"]["vocab"], key=read["model"]["vocab"].__getitem__)
    assert (said["add_bos_token"], said["bos_token_id"], said["eos_token_id"]) == (False, 0, 1)
    assert said["token_type"][:3] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]


def _normal(read: dict[str, Any]) -> None:
    read["normalizer"] = {"type": "Lowercase"}


def _other(read: dict[str, Any]) -> None:
    read["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": LLAMA3.replace("{1,3}", "{1,4}")}


def _whole(read: dict[str, Any]) -> None:
    read["model"]["ignore_merges"] = True


def _twice(read: dict[str, Any]) -> None:
    read["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = True


def _unigram(read: dict[str, Any]) -> None:
    read["model"]["type"] = "Unigram"


def _unspaced(read: dict[str, Any]) -> None:
    read["model"]["byte_fallback"] = True


@pytest.mark.parametrize("change", [_normal, _other, _whole, _twice, _unigram, _unspaced])
def test_one_that_llama_cpp_would_run_otherwise_is_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    file = byte_level(tmp_path, QWEN2) / "tokenizer.json"
    read = json.loads(file.read_text(encoding="utf-8"))
    refuse_tokenizer(tmp_path)
    change(read)
    file.write_text(json.dumps(read), encoding="utf-8")
    with pytest.raises(FormatError, match=r"is none that this program can write for llama\.cpp"):
        refuse_tokenizer(tmp_path)
