"""The writer: what it leaves behind, what it refuses, and that no kill, full disk or Ctrl-C costs more than a shard."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor

from bitlathe.errors import OutputError, ResumeError
from bitlathe.io import files
from bitlathe.io import writer as module
from bitlathe.io.checkpoint import DTYPES, Checkpoint
from bitlathe.io.writer import STATE, Writer, require_room, save

KILLED = Path(__file__).with_name("killed.py")
NAMES = [f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
FILES = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: the killed runs write thousands of small files."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared)) if shared.is_dir() and os.access(shared, os.W_OK) else tmp_path
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def tensors(shard: int) -> dict[str, Tensor]:
    return {f"layers.{shard}.weight": torch.full((3, 4), shard, dtype=torch.bfloat16), f"layers.{shard}.bias": torch.ones(3)}


def writer(out: Path, *, recipe: str = "a", restart: bool = False, shards: int = 3) -> Writer:
    return Writer(out, streams=("native",), shards=shards, fingerprint={"recipe": recipe, "model": "m"}, restart=restart)


def put(open_writer: Writer, *shards: int) -> None:
    for shard in shards:
        open_writer.put(shard, {"native": tensors(shard)}, {"loss": shard / 2})


def whole_run(out: Path, *, recipe: str = "a", restart: bool = False) -> None:
    with writer(out, recipe=recipe, restart=restart) as opened:
        put(opened, *(shard for shard in range(3) if shard not in opened.done))
        opened.finish({"native": (out, FILES)})


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# What is written


def test_a_whole_run(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with writer(out) as opened:
        assert (opened.done, opened.finished) == ({}, False)
        assert list(opened.work.iterdir()) == []
        put(opened, 0, 1, 2)
        assert opened.done == {0: {"loss": 0.0}, 1: {"loss": 0.5}, 2: {"loss": 1.0}}
        assert torch.equal(opened.read("native", 1)["layers.1.weight"], tensors(1)["layers.1.weight"])
        opened.finish({"native": (out, FILES | {"report.json": b'{"blocks": 3}'})})
        assert opened.finished
    assert sorted(content(out)) == [
        "config.json",
        *NAMES,
        "model.safetensors.index.json",
        "progress.jsonl",
        "report.json",
        "tokenizer.json",
    ]
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == 3 * (24 + 12)
    assert index["weight_map"]["layers.2.bias"] == NAMES[2]
    report = json.loads((out / "report.json").read_bytes())
    assert (report["blocks"], report["tool"], report["fingerprint"]) == (3, "bitlathe", {"recipe": "a", "model": "m"})
    assert report["files"] == sorted(set(content(out)) - {"progress.jsonl"})  # which lies in `out` wherever the rest goes

    found = Checkpoint(out)
    assert found.config == {"model_type": "llama"}
    for shard in range(3):
        assert all(torch.equal(found.read([name])[name], tensor) for name, tensor in tensors(shard).items())


def test_streams_go_to_their_folders_or_nowhere(tmp_path: Path) -> None:
    out = tmp_path / "out"
    streams = ("native", "dense", "dropped")
    arguments = {"streams": streams, "shards": 1, "fingerprint": {"recipe": "a"}}
    with Writer(out, **arguments) as opened:
        opened.put(0, {stream: {f"{stream}.x": torch.ones(2)} for stream in streams}, {})
        opened.finish({"native": (out / "native", FILES), "dense": (out / "dense", FILES), "dropped": (None, {})})
    assert sorted(path.name for path in out.iterdir()) == ["dense", "native", "progress.jsonl"]
    for stream in ("dense", "native"):
        assert list(Checkpoint(out / stream).header) == [f"{stream}.x"]
        assert (out / stream / "model.safetensors.index.json").exists()
    with Writer(out, **arguments) as opened:
        assert opened.finished
    shutil.rmtree(out / "dense")
    with pytest.raises(ResumeError, match=r"lacks .*dense"):
        Writer(out, **arguments).__enter__()


def test_saved_files_are_what_the_library_reads(tmp_path: Path) -> None:
    several = {name: torch.arange(6 * d.itemsize).to(torch.uint8).view(d) for name, d in DTYPES.items() if d != torch.bool}
    several |= {
        "BOOL": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "part": torch.arange(10.0)[2:5],
        "learned": torch.nn.Parameter(torch.ones(2)),
        "naïve \"name\"": torch.ones(1),
    }  # fmt: skip
    save(tmp_path / "a", several)
    save(tmp_path / "b", dict(reversed(several.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = load_file(tmp_path / "a")
    assert found.keys() == several.keys()
    for name, tensor in several.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].reshape(-1).view(torch.uint8).tolist() == tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
        assert found[name].data_ptr() % tensor.dtype.itemsize == 0
    with safe_open(tmp_path / "a", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_misuse_is_an_error_of_the_caller(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer(out) as opened:
        for index, stream in ((3, "native"), (-1, "native"), (0, "other")):
            with pytest.raises(ValueError, match=f"shard {index}"):
                opened.put(index, {stream: {}}, {})
        put(opened, 0, 1)
        with pytest.raises(ValueError, match=r"shards \[2\]"):
            opened.finish({"native": (out, FILES)})
        opened.put(2, {"native": tensors(0)}, {})
        for destination, files in ((tmp_path, FILES), (out / "a" / "b", FILES), (out, {"a/b": b""})):
            with pytest.raises(ValueError, match="cannot finish"):
                opened.finish({"native": (destination, files)})
        with pytest.raises(ValueError, match="are in two shards"):
            opened.finish({"native": (out, FILES)})


# Resuming


def test_a_run_continues_after_what_is_finished(tmp_path: Path) -> None:
    whole_run(tmp_path / "whole")
    out = tmp_path / "out"
    with writer(out) as opened:
        put(opened, 0, 2)
        (opened.work / "spill").write_bytes(b"much")
        told = (out / "progress.jsonl").read_bytes()
        assert told == b'{"loss": 0.0}\n{"loss": 1.0}\n'
    (out / "progress.jsonl").write_bytes(told[:-3])
    with writer(out) as opened:
        assert (out / "progress.jsonl").read_bytes() == told
        assert opened.done == {0: {"loss": 0.0}, 2: {"loss": 1.0}}
        assert torch.equal(opened.read("native", 2)["layers.2.bias"], torch.ones(3))
        assert list(opened.work.iterdir()) == []
    before = (out / STATE / "native" / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    with writer(out) as opened:
        put(opened, 1)
        opened.finish({"native": (out, FILES)})
    assert (out / "model-00001-of-00003.safetensors").stat().st_mtime_ns == before
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "tail", [b'{"sha', b'{"shard": 1, "loss": 0.5}', b"\0\0\0\0\n", b"\xff\n", b"3\n", b'{"shard": 1\n{"shard": 2}\n']
)
def test_a_torn_journal_line_is_ignored(tmp_path: Path, tail: bytes) -> None:
    whole_run(tmp_path / "whole")
    out = tmp_path / "out"
    with writer(out) as opened:
        put(opened, 0)
    with (out / STATE / "journal.jsonl").open("ab") as journal:
        journal.write(tail)
    (out / STATE / "native" / "model-00002-of-00003.safetensors.tmp").write_bytes(b"half")
    with writer(out) as opened:
        assert list(opened.done) == [0]
        assert not list((out / STATE).rglob("*.tmp"))
        put(opened, 1)
    with writer(out) as opened:
        assert list(opened.done) == [0, 1]
    whole_run(out)
    assert content(out) == content(tmp_path / "whole")


def test_a_shard_whose_file_is_gone_is_not_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer(out) as opened:
        put(opened, 0, 1)
    (out / STATE / "native" / "model-00001-of-00003.safetensors").unlink()
    with writer(out) as opened:
        assert list(opened.done) == [1]


def test_a_finished_result_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole_run(out)
    (out / "notes.txt").write_text("mine")
    before = content(out)
    with writer(out) as opened:
        assert opened.finished
    assert content(out) == before


def test_finishing_that_was_cut_short_repeats_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_run(tmp_path / "whole")
    out = tmp_path / "out"
    write = Writer._write

    def stop_at_config(self: Writer, path: Path, what: bytes) -> None:
        if path.name == "config.json":
            raise KeyboardInterrupt
        write(self, path, what)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_write", stop_at_config)
        with pytest.raises(KeyboardInterrupt):
            whole_run(out)
    assert (out / "report.json").exists()
    with writer(out) as opened:
        assert not opened.finished
        assert list(opened.done) == [0, 1, 2]
        assert torch.equal(opened.read("native", 1)["layers.1.bias"], torch.ones(3))
    whole_run(out)
    assert content(out) == content(tmp_path / "whole")


def test_a_restart_that_was_cut_short_goes_on_deleting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_run(tmp_path / "whole", recipe="b")
    out = tmp_path / "out"
    whole_run(out)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_clear", interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer(out, recipe="b", restart=True).__enter__()
    assert [path.name for path in out.iterdir()] == [STATE]
    whole_run(out, recipe="b")
    assert content(out) == content(tmp_path / "whole")


def test_one_file_that_is_there_already_is_made_anew(tmp_path: Path) -> None:
    """Another run's, or half of one: its name does not say whose it is."""
    out = tmp_path / "out"

    def joined(path: Path, shards: Sequence[Path]) -> None:
        path.write_bytes(b"".join(shard.read_bytes() for shard in shards))

    with writer(out) as opened:
        put(opened, 0, 1, 2)
        expected = b"".join((out / STATE / "native" / name).read_bytes() for name in NAMES)
        (out / "model.one").write_bytes(b"of another run")
        opened.finish({"native": (out, FILES)}, {"native": ("model.one", joined)})
    assert (out / "model.one").read_bytes() == expected
    assert sorted(content(out)) == ["config.json", "model.one", "progress.jsonl", "report.json", "tokenizer.json"]


@pytest.mark.parametrize("scenario", ["several", "one file", "one file, restart", "restart"])
def test_killed_anywhere_and_run_again_gives_the_same_bytes(scenario: str, memory_folder: Path) -> None:
    source = Path(module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(KILLED), scenario, str(memory_folder)],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["deaths"] == told["calls"] > 50
    assert told["torn"] >= 3
    assert told["different"] == []
    assert told["half shown"] == []


# Refusals


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer(out) as first:
        put(first, 0)
        before = content(out / STATE / "native")
        for restart in (False, True):
            with pytest.raises(OutputError, match="Another run is writing to"):
                writer(out, restart=restart).__enter__()
        assert content(out / STATE / "native") == before
        put(first, 1)
    with writer(out) as second:
        assert list(second.done) == [0, 1]


def test_a_killed_process_frees_the_lock(tmp_path: Path) -> None:
    source = Path(module.__file__).parents[2]
    program = (
        "import sys, time; from pathlib import Path; from bitlathe.io.writer import Writer\n"
        "with Writer(Path(sys.argv[1]), streams=('native',), shards=3, fingerprint={'recipe': 'a', 'model': 'm'}):\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, str(out)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(source)}, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="Another run"):
            writer(out).__enter__()
        child.send_signal(signal.SIGKILL)
    whole_run(out)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "report.json", "sub/report.json", "sub/config.json", ".hidden"])
def test_a_folder_that_is_not_ours_is_never_touched(tmp_path: Path, name: str, restart: bool) -> None:  # noqa: FBT001
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"tool": "another"}')
    before = content(out)
    with pytest.raises(OutputError, match="not a result of bitlathe; choose a new or an empty folder"):
        writer(out, restart=restart).__enter__()
    assert content(out) == before


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="out is a file"):
        writer(tmp_path / "out").__enter__()
    with pytest.raises(OutputError, match="cannot be written"):
        writer(tmp_path / "out" / "below").__enter__()


def test_an_unfinished_run_of_another_kind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer(out) as opened:
        put(opened, 0, 1)
    before = content(out)
    other = {"recipe": "b", "version": "2", "model": "m"}
    with pytest.raises(
        ResumeError, match=r"run \(finished shards: 2 of 3\) that differs.* in: recipe \(a -> b\), version\. .*--restart"
    ):
        Writer(out, streams=("native",), shards=3, fingerprint=other).__enter__()
    with pytest.raises(ResumeError, match=r"in: formats \(native -> native, dense\), shards \(3 -> 4\)\."):
        Writer(out, streams=("native", "dense"), shards=4, fingerprint={"recipe": "a", "model": "m"}).__enter__()
    assert content(out) == before
    with writer(out, recipe="b", restart=True) as opened:
        assert opened.done == {}
    with pytest.raises(ResumeError, match=r"in: recipe \(b -> a\)\."):
        writer(out).__enter__()


def test_hashes_and_long_values_are_named_and_not_shown(tmp_path: Path) -> None:
    parts = {"seed": "0", "model": "a" * 64, "scheme": "W4A16", "overrides": "x" * 61}
    with Writer(tmp_path / "out", streams=("native",), shards=3, fingerprint=parts) as opened:
        put(opened, 0)
    other = {"seed": "1", "model": "b" * 64, "scheme": "W4A16", "overrides": "{}"}
    with pytest.raises(ResumeError, match=r"shards: 1 of 3\) .* in: model, overrides, seed \(0 -> 1\)\."):
        Writer(tmp_path / "out", streams=("native",), shards=3, fingerprint=other).__enter__()


def test_a_finished_result_of_another_kind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole_run(out)
    (out / "notes.txt").write_text("mine")
    before = content(out)
    with pytest.raises(ResumeError, match=r"a finished result that differs from .* in: recipe \(a -> b\)\..*--restart"):
        writer(out, recipe="b").__enter__()
    assert content(out) == before
    with writer(out, recipe="b", restart=True) as opened:
        assert not opened.finished
        assert sorted(path.name for path in out.iterdir()) == [STATE, "notes.txt", "progress.jsonl"]
        assert (out / "progress.jsonl").read_bytes() == b""
    whole_run(out, recipe="b")
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "report.json").read_bytes())["fingerprint"]["recipe"] == "b"


def test_a_finished_result_that_lacks_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole_run(out)
    before = content(out)
    (out / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ResumeError, match=r"lacks .*model-00002-of-00003\.safetensors; make it anew with --restart"):
        writer(out).__enter__()
    whole_run(out, restart=True)
    assert content(out) == before


def test_a_list_of_files_that_was_tampered_with_reaches_nothing_outside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole_run(out)
    (tmp_path / "precious").write_text("mine")
    report = json.loads((out / "report.json").read_bytes())
    (out / "report.json").write_text(
        json.dumps({**report, "files": [*report["files"], "../precious", str(tmp_path / "precious")]})
    )
    whole_run(out, restart=True)
    assert (tmp_path / "precious").read_text() == "mine"


# Trouble on the way


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    whole_run(tmp_path / "whole")
    out = tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with writer(out) as opened:
        put(opened, 0)
        for of, name in ((module, "save"), (files, "sync")):  # before a byte is written, and when all are
            with monkeypatch.context() as patch:
                patch.setattr(of, name, full)
                with pytest.raises(
                    OutputError, match=r"is full\. 1 of 3 shards are finished and safe\. Make room and give the same"
                ):
                    put(opened, 1)
            assert not list(out.rglob("*.tmp"))
    with writer(out) as opened:
        assert list(opened.done) == [0]
        put(opened, 1, 2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OutputError, match="3 of 3 shards"):
                opened.finish({"native": (out, FILES)})
    whole_run(out)
    assert content(out) == content(tmp_path / "whole")


def test_a_journal_line_that_did_not_fit_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    out = tmp_path / "out"
    with writer(out) as opened:
        put(opened, 0)
        with monkeypatch.context() as patch:
            patch.setattr(files, "sync", lambda path: None)
            patch.setattr(os, "fsync", full)  # the line is there, but nobody knows whether it is safe
            with pytest.raises(OutputError, match="is full"):
                put(opened, 1)
        put(opened, 2)
    assert [json.loads(line)["shard"] for line in (out / STATE / "journal.jsonl").read_text().splitlines()] == [0, 2]


def test_other_errors_of_the_disk_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer(out) as opened:
        put(opened, 0)
        shutil.rmtree(out / STATE / "native")
        with pytest.raises(OutputError, match=r"cannot be written \(No such file or directory\)\. 1 of 3 shards"):
            put(opened, 1)
        with pytest.raises(OutputError, match=r"model-00001-of-00003\.safetensors was written by this run but cannot be read"):
            opened.read("native", 0)


def test_an_interrupt_leaves_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_run(tmp_path / "whole")
    out = tmp_path / "out"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), writer(out) as opened:
        put(opened, 0)
        monkeypatch.setattr(files, "sync", interrupt)
        put(opened, 1)
    monkeypatch.undo()
    with writer(out) as opened:
        assert list(opened.done) == [0]
    whole_run(out)
    assert content(out) == content(tmp_path / "whole")


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, asked = namedtuple("usage", "total used free"), []

    def disk_usage(folder: Path) -> tuple[int, int, int]:
        asked.append(folder)
        return usage(10, 5, 3 * 1024**3)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    out = tmp_path / "not" / "there"
    require_room(out, 3 * 1024**3)
    with pytest.raises(OutputError, match=r"The result needs 4\.0 GiB, but the disk of .*there has 3\.0 GiB free"):
        require_room(out, 4 * 1024**3)
    assert asked == [tmp_path, tmp_path]
    assert not out.exists()


def test_what_is_kept_lasts_until_the_run_ends(tmp_path: Path) -> None:
    found = {"a.scale": torch.tensor([1.5, 2.0], dtype=torch.bfloat16)}
    with writer(tmp_path / "out") as first:
        put(first, 0)
        first.keep("scales", found)
    with writer(tmp_path / "out") as again:
        assert torch.equal(again.kept("scales")["a.scale"], found["a.scale"])
        # A shard that is written again is the later one.
        again.put(0, {"native": tensors(3)}, {"loss": 9.0})
        put(again, 1, 2)
        again.finish({"native": (tmp_path / "out", FILES)})
    with pytest.raises(OutputError, match="cannot be read"):
        again.kept("scales")
    assert again.done[0] == {"loss": 9.0}
    assert torch.equal(load_file(tmp_path / "out" / NAMES[0])["layers.3.weight"], tensors(3)["layers.3.weight"])
