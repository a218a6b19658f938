"""Checkpoints: what is refused on opening, what reading gives, and what it costs in memory."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from bitlathe.errors import CheckpointError
from bitlathe.io import checkpoint as module
from bitlathe.io.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint, read_header

A = {"a.weight": torch.arange(12.0).view(3, 4).bfloat16(), "a.bias": torch.arange(3).to(torch.float16)}
B = {"b.weight": torch.arange(6, dtype=torch.int32).view(2, 3), "b.flag": torch.tensor([True, False])}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def sharded(folder: Path, shards: Mapping[str, Mapping[str, Tensor]], *, index: Mapping[str, str] | None = None) -> Path:
    """A folder of shards and, where given, their index."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text('{"model_type": "llama"}')
    for name, tensors in shards.items():
        save_file(dict(tensors), folder / name)
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def single(folder: Path) -> Path:
    return sharded(folder, {SINGLE: A | B})


def raw(folder: Path, header: object, data: int) -> Path:
    """A folder whose only shard has a header of our own making and `data` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    sharded(folder, {})
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return folder


# Reading


def test_reads_what_was_asked_in_that_order(tmp_path: Path) -> None:
    both = A | B
    two = sharded(tmp_path / "two", {"model-1.safetensors": A, "model-2.safetensors": B}, index={
        **dict.fromkeys(A, "model-1.safetensors"), **dict.fromkeys(B, "model-2.safetensors")
    })  # fmt: skip
    for folder in (single(tmp_path / "one"), two):
        opened = Checkpoint(folder)
        assert opened.config == {"model_type": "llama"}
        assert opened.header.keys() == both.keys()
        names = ["b.flag", "a.weight", "b.weight", "a.bias", "a.weight"]
        found = opened.read(names)
        assert list(found) == names[:-1]
        for name, tensor in found.items():
            assert tensor.dtype == both[name].dtype
            assert torch.equal(tensor, both[name])


@pytest.mark.parametrize("dtype", module.DTYPES.values(), ids=module.DTYPES)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    # float8_e8m0fnu cannot be compared: compare bytes
    tensor = (
        torch.arange(64 * dtype.itemsize).to(torch.uint8).view(dtype) if dtype != torch.bool else torch.tensor([True, False])
    )
    found = Checkpoint(sharded(tmp_path / "m", {SINGLE: {"x": tensor}})).read(["x"])["x"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_large_small_empty_scalar_and_unaligned_tensors(tmp_path: Path) -> None:
    tensors = {
        "large": torch.randn(300, 301),
        "far": torch.randn(600, 1000),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "byte": torch.ones(3, dtype=torch.uint8),
    }
    opened = Checkpoint(sharded(tmp_path / "m", {SINGLE: tensors}))
    for names in (list(tensors), ["large"], ["empty"], ["scalar", "byte"]):
        for name, tensor in opened.read(names).items():
            assert tensor.shape == tensors[name].shape
            assert torch.equal(tensor, tensors[name])
    header = {"byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header["odd"] = {"dtype": "F32", "shape": [30000], "data_offsets": [1, 120001]}
    assert torch.equal(Checkpoint(raw(tmp_path / "odd", header, 120001)).read(["odd"])["odd"], torch.zeros(30000))


def test_changes_to_a_tensor_never_reach_the_file(tmp_path: Path) -> None:
    large = {"x": torch.zeros(256, 256)}
    opened = Checkpoint(sharded(tmp_path / "m", {SINGLE: large}))
    opened.read(["x"])["x"].add_(1)
    assert not opened.read(["x"])["x"].any()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_blocks_already_read(tmp_path: Path) -> None:
    blocks, columns = 24, 1024 * 1024  # 4 MiB in each of the 24 blocks, over six files
    shards = {
        f"model-{shard + 1:05d}-of-00006.safetensors": {
            f"layers.{shard * 4 + i}.{kind}": torch.ones(columns // 2) for i in range(4) for kind in ("up", "down")
        }
        for shard in range(6)
    }
    opened = Checkpoint(sharded(tmp_path / "m", shards))
    del shards

    def resident() -> int:
        """MiB of anonymous and of mapped memory in use."""
        rows = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return (int(rows["RssAnon"].split()[0]) + int(rows["RssFile"].split()[0])) // 1024

    kept, seen = [], []
    for block in range(blocks):
        tensors = opened.read([f"layers.{block}.{kind}" for kind in ("up", "down")])
        assert sum(float(tensor.sum()) for tensor in tensors.values()) == columns
        kept.append(tensors[f"layers.{block}.up"][:1].clone())
        seen.append(resident())
        del tensors
    assert max(seen[4:]) - seen[3] <= 4, seen  # 80 MiB were read since


def test_missing_names_are_refused(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"has no tensor x0, x1, x2, x3, x4 and 2 more.*holds 4 tensors") as caught:
        Checkpoint(folder).read(["a.bias", *(f"x{i}" for i in range(7))])
    assert str(folder) in str(caught.value)


def test_a_source_that_vanishes_or_shrinks_is_refused(tmp_path: Path) -> None:
    opened = Checkpoint(single(tmp_path / "m"))
    content = (tmp_path / "m" / SINGLE).read_bytes()
    (tmp_path / "m" / SINGLE).write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match="its last 20 bytes are missing"):
        opened.read(A | B)
    (tmp_path / "m" / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read: No such file.*disk still there"):
        opened.read(A)


# What is refused on opening; none of it may read a tensor


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)


@pytest.mark.usefixtures("unread")
class TestRefusals:
    def test_truncated(self, tmp_path: Path) -> None:
        folder = single(tmp_path / "m")
        content = (folder / SINGLE).read_bytes()
        for cut, missing in ((7, 7), (len(content) - 20, None), (len(content) - 3, None)):
            (folder / SINGLE).write_bytes(content[:-cut])
            with pytest.raises(
                CheckpointError, match=r"model\.safetensors is truncated: its last \d+ bytes are missing"
            ) as caught:
                Checkpoint(folder)
            assert missing is None or f"last {missing} bytes" in str(caught.value)
        for content in (b"", b"\0\0\0"):
            (folder / SINGLE).write_bytes(content)
            with pytest.raises(CheckpointError, match=f"its last {8 - len(content)} bytes"):
                Checkpoint(folder)

    @pytest.mark.parametrize(
        ("header", "complaint"),
        [
            (b"{not json", "is not JSON"),
            (b"[1]", "a JSON object was expected, not list"),
            (b"\xff\xfe{}", "is not JSON"),
            (b'{"x": {}, "x": {}}', "names x more than once"),
            ({"x": 5}, "does not say where tensor x lies"),
            ({"x": {"dtype": "F32", "shape": [1]}}, "does not say where tensor x lies"),
            ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "does not say where tensor x lies"),
            ({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, "x has dtype F4, which is not read; known are BOOL"),
            ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"shape \[2\] is given 4 bytes"),
            ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, "is given -4 bytes"),
            ({}, "hold no tensor"),
        ],
    )
    def test_damaged_header(self, tmp_path: Path, header: object, complaint: str) -> None:
        with pytest.raises(CheckpointError, match=complaint):
            Checkpoint(raw(tmp_path / "m", header, 8))

    def test_overlapping_tensors(self, tmp_path: Path) -> None:
        row = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        with pytest.raises(CheckpointError, match="tensor y overlaps the one before it"):
            Checkpoint(raw(tmp_path / "m", {"x": row, "y": {**row, "data_offsets": [2, 6]}}, 8))

    def test_another_kind_of_file(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path / "m", {})
        (folder / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
        with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
            Checkpoint(folder)
        (folder / SINGLE).write_bytes(b"PK\3\4PK\3\4 a zip")
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            Checkpoint(folder)

    def test_a_name_in_two_shards(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path / "m", {"x-1.safetensors": A, "x-2.safetensors": B | {"a.bias": torch.ones(1)}})
        with pytest.raises(CheckpointError, match=r"a\.bias is in both x-1\.safetensors and x-2\.safetensors"):
            Checkpoint(folder)

    def test_index_at_odds_with_the_files(self, tmp_path: Path) -> None:
        files = {"m-1.safetensors": A, "m-2.safetensors": B}
        right = {**dict.fromkeys(A, "m-1.safetensors"), **dict.fromkeys(B, "m-2.safetensors")}
        for wrong, complaint in (
            ({**right, "b.flag": "m-3.safetensors"}, r"lacks files that its index names: m-3\.safetensors"),
            ({**right, "b.flag": "m-1.safetensors"}, r"not in the file it gives for them: b\.flag"),
            ({**right, "c.weight": "m-1.safetensors"}, r"not in the file it gives for them: c\.weight"),
            ({**right, "c": "../other.safetensors"}, "points outside its folder"),
            ({}, "has no weight_map"),
        ):
            with pytest.raises(CheckpointError, match=complaint):
                Checkpoint(sharded(tmp_path / "m", files, index=wrong))
        (tmp_path / "m" / INDEX).write_text("{")
        with pytest.raises(CheckpointError, match=r"index\.json is damaged: it is not JSON"):
            Checkpoint(tmp_path / "m")

    def test_a_numbered_shard_is_missing(self, tmp_path: Path) -> None:
        folder = sharded(tmp_path / "m", {"model-00002-of-00003.safetensors": A})
        expected = r"lacks 2 of its 3 files: model-00001-of-00003\.safetensors, model-00003-of-00003\.safetensors"
        with pytest.raises(CheckpointError, match=expected):
            Checkpoint(folder)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "pytorch_model.bin.index.json"])
    def test_only_pickled_weights(self, tmp_path: Path, name: str) -> None:
        folder = sharded(tmp_path / "m", {})
        (folder / name).write_bytes(b"\x80\x04.")
        with pytest.raises(CheckpointError, match=r"only pickled weights.*unpickling can run any code.*safe_serialization"):
            Checkpoint(folder)

    def test_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
            Checkpoint(sharded(tmp_path / "m", {}))

    def test_config(self, tmp_path: Path) -> None:
        folder = single(tmp_path / "m")
        for content in ("{", "[]", '{"a": 1, "a": 2}'):
            (folder / CONFIG).write_text(content)
            with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
                Checkpoint(folder)
        (folder / CONFIG).unlink()
        with pytest.raises(CheckpointError, match=r"has no config\.json"):
            Checkpoint(folder)

    def test_shapes(self, tmp_path: Path) -> None:
        opened = Checkpoint(single(tmp_path / "m"))
        shapes = {"a.weight": (3, 4), "a.bias": (3,)}
        assert sorted(opened.expect(shapes)) == ["b.flag", "b.weight"]
        with pytest.raises(CheckpointError, match=r"lacks 1 of the 3 tensors that its config\.json calls for: c\.weight"):
            opened.expect({**shapes, "c.weight": (1,)})
        with pytest.raises(CheckpointError, match=r"a\.weight is \[3, 4\], expected \[4, 3\]"):
            opened.expect({**shapes, "a.weight": (4, 3)})

    def test_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "snapshot_download", None)
        for source in ("nothing", "./nothing", "~/nothing/here", "a/b/c", str(tmp_path / "nothing"), "org/name@a@b"):
            with pytest.raises(CheckpointError, match=r"There is no folder .*Hub id such as org/name, or builtin"):
                Checkpoint(source)
        folder = single(tmp_path / "m")
        with pytest.raises(CheckpointError, match="is a file; give the folder"):
            Checkpoint(folder / SINGLE)


# Where a checkpoint comes from


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = single(tmp_path / "m"), []

    def download(repo: str, **options: object) -> str:
        asked.append((repo, options["revision"]))
        return str(folder)

    monkeypatch.setattr(module, "snapshot_download", download)
    assert Checkpoint("org/some-name_1.5").path == folder
    assert Checkpoint("org/name@refs/pr/1").path == folder
    assert asked == [("org/some-name_1.5", None), ("org/name", "refs/pr/1")]


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no network\nlong story"), ConnectionError(), HFValidationError("bad")]
)
def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(module, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="Either give a local folder, or check the name, the network") as caught:
        Checkpoint("org/name")
    assert "\n" not in str(caught.value)


def test_builtin() -> None:
    opened = Checkpoint("builtin")
    assert opened.config["model_type"] == "llama"
    assert {path.name for path in opened.companions()} >= {"tokenizer.json"}


def test_companions(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "README.md"):
        (folder / name).write_text("{}")
    assert [path.name for path in Checkpoint(folder).companions()] == ["tokenizer.json", "chat_template.jinja"]


def test_fingerprint(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    save_file({"a.weight": torch.zeros(100, 100)}, folder / SINGLE)
    digest = Checkpoint(folder).fingerprint()
    assert Checkpoint(shutil.copytree(folder, tmp_path / "copy")).fingerprint() == digest

    seen = {digest}
    for place in (0, 5000, 9999):
        changed = torch.zeros(10000)
        changed[place] = 1
        save_file({"a.weight": changed.view(100, 100)}, tmp_path / "copy" / SINGLE)
        seen.add(Checkpoint(tmp_path / "copy").fingerprint())
    save_file({"b.weight": torch.zeros(100, 100)}, tmp_path / "copy" / SINGLE)
    seen.add(Checkpoint(tmp_path / "copy").fingerprint())
    (folder / CONFIG).write_text('{"model_type": "mistral"}')
    seen.add(Checkpoint(folder).fingerprint())
    assert len(seen) == 6


def test_fingerprint_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    two = sharded(tmp_path / "two", {"x-1.safetensors": A, "x-2.safetensors": B})
    assert Checkpoint(two).fingerprint() == Checkpoint(single(tmp_path / "one")).fingerprint()


def test_header_says_where_the_bytes_are(tmp_path: Path) -> None:
    info = read_header(single(tmp_path / "m") / SINGLE)["a.weight"]
    assert (info.dtype, info.shape, info.nbytes) == ("BF16", (3, 4), 24)
    content = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
    assert content == A["a.weight"].view(torch.uint8).numpy().tobytes()
