"""A source checkpoint: its header, known before any weight is read, and its tensors, mapped and never copied aside.

The format is safetensors (https://github.com/huggingface/safetensors#format): eight bytes, little endian, give the length of
a JSON header; the header gives each tensor's dtype, shape and place; the tensors' bytes follow. Opening a checkpoint reads
the headers of all its files and checks them against the files' lengths, so that a damaged download is found at once rather
than after hours. `Checkpoint.read` is the only function that reads tensors.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever HTTP library the client is built on
)
from torch import Tensor

from bitlathe.errors import CheckpointError
from bitlathe.io.gguf import FILE, read_gguf
from bitlathe.io.tensor_info import TensorInfo, from_pairs

BUILTIN = "builtin"
CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}

# The safetensors library refuses longer headers; a larger number means that the file is something else.
LONGEST_HEADER = 100_000_000
SAMPLE = 4096
# Shorter tensors are copied out, so that keeping a norm's gain does not keep its whole block mapped.
COPIED = 64 * 1024
# Tensors of one read that lie closer together than this share a mapping: each mapping costs an open file.
GAP = 1024 * 1024

HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^@]+))?")
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


class Checkpoint:
    """A safetensors checkpoint in a folder, checked but not read.

    source: a folder, "builtin" (the tiny model that comes with the package), or a Hub id, "org/name" or "org/name@revision".

    path: the folder. from_hub: whether `source` is a Hub id. header: every tensor by name. config: config.json. Raises
    CheckpointError when the folder, its files or their headers are missing, damaged or at odds with each other.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        self.path = find_folder(self.source)
        self.from_hub = self.source != BUILTIN and not Path(self.source).expanduser().is_dir()
        self.config: dict[str, Any] = _read_json(self.path, CONFIG)
        self.header: dict[str, TensorInfo] = _read_headers(self.path)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, in the order asked for.

        They lie over a private memory map: bytes come from disk when touched, changes never reach the file, and the memory
        goes back when the last tensor of the call dies. Nothing is cached. Raises CheckpointError for names that are not
        there, and when a file has vanished or changed its length since the checkpoint was opened.
        """
        wanted = list(dict.fromkeys(names))
        missing = [name for name in wanted if name not in self.header]
        if missing:
            raise CheckpointError(
                f"{self.path} has no tensor {_some(missing)}; it holds {len(self.header)} tensors. "
                f"Is it the model that {CONFIG} describes?"
            )
        found: dict[str, Tensor] = {}
        for run in _runs((name, self.header[name]) for name in wanted):
            found |= _map(run)
        return {name: found[name] for name in wanted}

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Compare the header with the tensors a model needs; the names it does not need are returned.

        Raises CheckpointError when a tensor is missing or has another shape.
        """
        missing = [name for name in shapes if name not in self.header]
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {len(missing)} of the {len(shapes)} tensors that its {CONFIG} calls for: {_some(missing)}. "
                f"Download it again, or take the {CONFIG} that belongs to these weights"
            )
        wrong = [name for name, shape in shapes.items() if self.header[name].shape != tuple(shape)]
        if wrong:
            told = [f"{name} is {list(self.header[name].shape)}, expected {list(shapes[name])}" for name in wrong[:5]]
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise CheckpointError(
                f"{self.path} holds tensors of other shapes than its {CONFIG} calls for: {'; '.join(told)}{more}. "
                f"Take the {CONFIG} that belongs to these weights"
            )
        return [name for name in self.header if name not in shapes]

    def companions(self) -> list[Path]:
        """The tokenizer, generation settings and chat template, as far as they are there."""
        return [self.path / name for name in COMPANIONS if (self.path / name).is_file()]

    def fingerprint(self) -> str:
        """A hash of config.json, of the header, and of 4 KiB at the start, middle and end of every tensor.

        It does not depend on where the folder is or how the tensors are spread over files. A change between the samples is
        not seen: reading every byte of a large model would take minutes.
        """
        digest = hashlib.sha256((self.path / CONFIG).read_bytes())
        for name, info in sorted(self.header.items()):
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            last = max(info.nbytes - SAMPLE, 0)
            with _open(info.file) as file:
                for start in sorted({0, last // 2, last}):
                    file.seek(info.offset + start)
                    digest.update(file.read(min(SAMPLE, info.nbytes)))
        return digest.hexdigest()


def find_folder(source: str) -> Path:
    """The folder of a checkpoint: `source` itself, the bundled model, or a download from the Hub."""
    if source == BUILTIN:
        return Path(str(files("bitlathe").joinpath("data", "tiny")))
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{source} is a file; give the folder that holds {CONFIG} and the *.safetensors files")
    hub = HUB_ID.fullmatch(source)
    if hub is None:
        raise CheckpointError(
            f"There is no folder {source}. Give a folder that exists, a Hub id such as org/name, or {BUILTIN} for the bundled "
            f"model"
        )
    try:
        folder = snapshot_download(
            hub["repo"],
            revision=hub["revision"],
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"],
            # subfolders hold conversions to other formats, consolidated* a second copy of the weights
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (HTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"There is no folder {source} here, and the Hub did not give a model of that name ({_first_line(error)}). Either "
            f"give a local folder, or check the name, the network and, for a gated model, the login (hf auth login)"
        ) from error
    return Path(folder)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The header of one safetensors file, checked against the file's length.

    Raises CheckpointError when the file is missing, truncated, or no safetensors file, and when two tensors overlap.
    """
    with _open(file) as opened:
        size = opened.seek(0, 2)
        opened.seek(0)
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version"):
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        if size >= 8 and length > LONGEST_HEADER:
            raise CheckpointError(f"{file} is not a safetensors file: its header would be {length} bytes long")
        if size < 8 + length:
            raise _truncated(file, 8 + length - size if size >= 8 else 8 - size)
        text = opened.read(length)
    rows = _parse(text, file)
    rows.pop("__metadata__", None)
    header = {name: _tensor_info(name, row, file, 8 + length) for name, row in rows.items()}
    end = 8 + length
    for name, info in sorted(header.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset < end and info.nbytes:
            raise CheckpointError(f"{file} is damaged: tensor {name} overlaps the one before it. Download the file again")
        end = max(end, info.offset + info.nbytes)
    if size < end:
        raise _truncated(file, end - size)
    return header


def _tensor_info(name: str, row: Any, file: Path, base: int) -> TensorInfo:
    try:
        dtype, shape, (first, last) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        elements = prod(shape)
        sound = min((*shape, first, last - first)) >= 0
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: its header does not say where tensor {name} lies") from error
    if dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name} has dtype {dtype}, which is not read; known are {', '.join(DTYPES)}")
    if not sound or last - first != elements * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{file} is damaged: tensor {name} of dtype {dtype} and shape {list(shape)} is given {last - first} bytes"
        )
    return TensorInfo(dtype, shape, file, base + first, last - first)


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    """The headers of all files of a folder, checked against its index."""
    index = _read_index(folder)
    if (folder / FILE).is_file() and not index and not any(folder.glob("*.safetensors")):
        return read_gguf(folder / FILE)
    header: dict[str, TensorInfo] = {}
    for file in _weight_files(folder, index):
        for name, info in read_header(file).items():
            if name in header:
                raise CheckpointError(
                    f"{folder}: tensor {name} is in both {header[name].file.name} and {file.name}; remove the file that does "
                    f"not belong to this model"
                )
            header[name] = info
    astray = [name for name, file in index.items() if name not in header or header[name].file.name != file]
    if astray:
        raise CheckpointError(
            f"{folder / INDEX} names tensors that are not in the file it gives for them: {_some(astray)}. "
            f"Download the folder again"
        )
    if not header:
        raise CheckpointError(f"{folder}: the safetensors files hold no tensor")
    return header


def _read_index(folder: Path) -> dict[str, str]:
    """The index's map from tensor to file; empty where there is no index or, as in transformers, a single file goes first."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return {}
    table = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{folder / INDEX} has no weight_map; download it again")
    strange = [str(file) for file in table.values() if not isinstance(file, str) or Path(file).name != file]
    if strange:
        raise CheckpointError(f"{folder / INDEX} points outside its folder: {_some(strange)}")
    absent = sorted({file for file in table.values() if not (folder / file).is_file()})
    if absent:
        raise CheckpointError(f"{folder} lacks files that its index names: {_some(absent)}. Download the folder again")
    return table


def _weight_files(folder: Path, index: Mapping[str, str]) -> list[Path]:
    if index:
        return [folder / name for name in sorted(set(index.values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    names = {path.name for path in found}
    for stem, _, count in (match.groups() for match in map(NUMBERED.fullmatch, sorted(names)) if match):
        absent = [name for i in range(int(count)) if (name := f"{stem}-{i + 1:05d}-of-{count}.safetensors") not in names]
        if absent:
            raise CheckpointError(f"{folder} lacks {len(absent)} of its {int(count)} files: {_some(absent)}. Download it again")
    if found:
        return found
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles or (folder / "pytorch_model.bin.index.json").is_file():
        raise CheckpointError(
            f"{folder} holds only pickled weights ({_some(pickles or ['pytorch_model.bin'])}), which are not read: unpickling "
            f"can run any code. Take a revision of the model that has safetensors, or, if you trust it, load it with "
            f"transformers and save it again: save_pretrained(folder, safe_serialization=True)"
        )
    raise CheckpointError(f"{folder} holds no *.safetensors file; a model needs {CONFIG} and its weights as safetensors")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return _parse((folder / name).read_bytes(), folder / name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {name}; give the folder of a model as transformers saves it") from error
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from error


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object without repeated keys (json alone would silently keep the last)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise CheckpointError(f"{file} is damaged: it names {_some(twice)} more than once")
        return table

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON where it should be ({_first_line(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: a JSON object was expected, not {type(value).__name__}")
    return value


def _runs(wanted: Iterable[tuple[str, TensorInfo]]) -> Iterator[list[tuple[str, TensorInfo]]]:
    """Tensors that lie close together in one file, a list for each mapping."""
    run: list[tuple[str, TensorInfo]] = []
    for name, info in sorted(wanted, key=lambda item: (item[1].file, item[1].offset)):
        if run and (info.file != run[-1][1].file or info.offset > run[-1][1].offset + run[-1][1].nbytes + GAP):
            yield run
            run = []
        run.append((name, info))
    if run:
        yield run


def _map(run: list[tuple[str, TensorInfo]]) -> dict[str, Tensor]:
    """The tensors of one run, over one mapping that lives as long as they do."""
    file = run[0][1].file
    first = run[0][1].offset - run[0][1].offset % mmap.ALLOCATIONGRANULARITY
    last = max(info.offset + info.nbytes for _, info in run)
    with _open(file) as opened:
        size = opened.seek(0, 2)
        if size < last:
            raise _truncated(file, last - size)
        # copy on write: torch wants writable memory, the file must never be written
        mapping = mmap.mmap(opened.fileno(), last - first, access=mmap.ACCESS_COPY, offset=first) if last > first else b""
    tensors = {}
    for name, info in run:
        if not info.nbytes:
            tensors[name] = torch.empty(info.shape, dtype=DTYPES[info.dtype])
            continue
        flat = torch.frombuffer(mapping, dtype=torch.uint8, count=info.nbytes, offset=info.offset - first)
        aligned = info.offset % DTYPES[info.dtype].itemsize == 0
        if info.nbytes < COPIED or not aligned:
            flat = flat.clone()
        tensor = flat.view(DTYPES[info.dtype]).view(info.shape)
        tensor = from_pairs(tensor, info.heads) if info.heads else tensor
        tensors[name] = tensor - info.added if info.added else tensor
    return tensors


def _open(file: Path) -> BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}. Is the checkpoint's disk still there?") from error


def _truncated(file: Path, missing: int) -> CheckpointError:
    return CheckpointError(f"{file} is truncated: its last {missing} bytes are missing. Download it again")


def _some(names: list[str]) -> str:
    """Up to five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
