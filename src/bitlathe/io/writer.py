"""The result's folder: shards and a journal while running, whole checkpoints at the end.

    OUT/progress.jsonl             the records of the finished shards, a line each, for people and programs that watch
    OUT/.bitlathe/lock             held by the run that writes here; the system frees it when the process dies
    OUT/.bitlathe/fingerprint      what this run is: a run of another recipe, model, text or version must not continue it
    OUT/.bitlathe/decided.json     what the run chose for itself and must not choose anew when it is continued
    OUT/.bitlathe/NAME.safetensors tensors that it found out and keeps until it ends
    OUT/.bitlathe/journal.jsonl    one line for each finished shard, appended after the shard's files are safe on disk
    OUT/.bitlathe/STREAM/          the finished shards of one output, such as a format
    OUT/.bitlathe/finish.json      written when all shards are done: which stream goes where, and the names of its files
    OUT/.bitlathe/discard.json     written by a restart: the files of the earlier result that are to go
    OUT/.bitlathe/work/            for the run's temporary files; emptied on entry

Every step is a rename or an append, and each is ordered so that a kill between any two leaves a state from which the same
command goes on to the same bytes. `finish` moves the shards into place and writes config.json last, so that no reader takes
half a checkpoint for a whole one; report.json lists the files, so that a later restart deletes those and nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitlathe.errors import OutputError, ResumeError
from bitlathe.io.checkpoint import CONFIG, DTYPES, INDEX, read_header
from bitlathe.io.files import sync, write_aside
from bitlathe.io.lines import line, whole_lines
from bitlathe.io.sizes import human
from bitlathe.io.tensor_info import TensorInfo

STATE = ".bitlathe"
REPORT = "report.json"
PROGRESS = "progress.jsonl"
TOOL = "bitlathe"

# What differs is shown up to this length; of hashes, only that they differ.
_READABLE = 60
_HASH = re.compile(r"[0-9a-f]{32,}")

Results = Mapping[str, tuple[Path | None, Mapping[str, bytes]]]
# Makes one file (at the first path) of shards.
MakeFile = Callable[[Path, Sequence[Path]], None]


class Writer:
    """One run's hold on the folder `out`; used in a `with` statement.

    streams: the outputs that are written side by side. shards: how many parts each has (the blocks and what is outside them).
    fingerprint: named parts, each a setting, a hash or a version, that must be equal for a run to be continued. room: bytes
    that the run will take on the disk. restart: throw away what an earlier run left in `out`.

    Entering raises OutputError when `out` holds files that are not ours, is in use by another run, cannot be written or, for a
    run from the beginning, has too little room (then nothing in it has been changed), and ResumeError when it holds a run with
    another fingerprint. Afterwards:

    done: the records of the finished shards. decided: what `decide` was given, by this run or by the one that it continues.
    finished: the result is already there and whole; nothing is left to do.
    work: a folder for temporary files, which goes when the run ends.
    """

    def __init__(
        self,
        out: Path,
        *,
        streams: Sequence[str],
        shards: int,
        fingerprint: Mapping[str, str],
        room: int = 0,
        restart: bool = False,
    ) -> None:
        self.out = Path(out)
        self.streams = tuple(streams)
        self.shards = shards
        self.fingerprint = dict(fingerprint)
        self.done: dict[int, dict[str, Any]] = {}
        self.decided: dict[str, Any] = {}
        self.finished = False
        self.work = self.out / STATE / "work"
        self._state = self.out / STATE
        self._room, self._restart = room, restart
        self._lock = FileLock(self._state / "lock", timeout=0, thread_local=False)
        self._journal_end = 0
        self._moved: dict[str, Path] = {}  # where an interrupted `finish` was taking each stream

    def __enter__(self) -> Self:
        with self._disk():
            refuse_foreign(self.out)
            self._refuse_crowded()
            self._state.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise OutputError(f"Another run is writing to {self.out}; wait for it, or choose another folder") from error
            except NotImplementedError as error:
                raise OutputError(f"The file system of {self.out} cannot lock files; choose a folder on another") from error
        try:
            with self._disk():
                self._open()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def put(self, index: int, tensors: Mapping[str, Mapping[str, Tensor]], record: Mapping[str, Any]) -> None:
        """Make shard `index` of every stream safe on disk, then note it in the journal.

        tensors: stream -> name -> tensor. record: what `done` shall say of the shard, as JSON. Raises OutputError when the
        disk is full or fails; the shards finished before stay finished.
        """
        if set(tensors) != set(self.streams) or not 0 <= index < self.shards:
            raise ValueError(f"shard {index} of {sorted(tensors)}: expected one of {self.shards} shards of {self.streams}")
        entry = line({"shard": index, **record})
        with self._disk():
            for stream, named in tensors.items():
                with write_aside(self._state / stream / self._name(index)) as aside:
                    save(aside, named)
            with (self._state / "journal.jsonl").open("r+b") as journal:
                # an append that failed half way (a full disk) is written over
                journal.truncate(self._journal_end)
                journal.seek(self._journal_end)
                journal.write(entry)
                journal.flush()
                os.fsync(journal.fileno())
                self._journal_end = journal.tell()
            with (self.out / PROGRESS).open("ab") as progress:
                progress.write(line(record))
        self.done |= _records(entry)

    def decide(self, name: str, choice: Any) -> None:
        """Make a choice of the run, as JSON, safe on disk: whoever continues the run finds it in `decided`.

        For what is chosen by measuring, where another machine, or another number of threads, might choose otherwise.
        """
        self.decided[name] = choice
        with self._disk():
            self._write(self._state / "decided.json", _json(self.decided))

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Make tensors that the run has found out safe on disk until it ends; `kept` gives them back."""
        with self._disk(), write_aside(self._state / f"{name}.safetensors") as aside:
            save(aside, tensors)

    def kept(self, name: str) -> dict[str, Tensor]:
        """What `keep` was given, by this run or by the one that it continues."""
        return _loaded(self._state / f"{name}.safetensors")

    def read(self, stream: str, index: int) -> dict[str, Tensor]:
        """The tensors of a finished shard."""
        return _loaded(self._file(stream, index))

    def header(self, stream: str) -> dict[str, TensorInfo]:
        """Every tensor of a stream's finished shards, without its data."""
        return {name: info for index in self.done for name, info in read_header(self._file(stream, index)).items()}

    def finish(self, results: Results, files: Mapping[str, tuple[str, MakeFile]] | None = None) -> None:
        """Turn the finished shards into checkpoints; then the folder of the unfinished run goes.

        results: stream -> (its destination, `out` or a folder in it; the files to put beside the shards). A stream whose
        destination is None is dropped. files: stream -> the name of the one file that takes the place of its shards, and what
        makes that of them. The index is written here, and report.json (given or not) is completed with what a
        later run needs to know. May be called again by a run that was killed in it.
        """
        kept = {stream: (to, extra) for stream, (to, extra) in results.items() if to is not None}
        missing = [index for index in range(self.shards) if index not in self.done]
        astray = [str(to) for to, _ in kept.values() if to not in (self.out, self.out / to.name)]
        nested = [name for _, extra in kept.values() for name in extra if Path(name).name != name]
        if missing or astray or nested or set(results) != set(self.streams):
            raise ValueError(f"cannot finish {sorted(results)}: shards {missing}, destinations {astray}, files {nested}")
        made = {} if files is None else dict(files)
        shards = [*(self._name(index) for index in range(self.shards)), INDEX]
        weights = {stream: [made[stream][0]] if stream in made else shards for stream in kept}
        names = {stream: sorted({*weights[stream], REPORT, *extra}) for stream, (_, extra) in kept.items()}
        folders = {stream: to.relative_to(self.out).as_posix() for stream, (to, _) in kept.items()}
        with self._disk():
            plan = {stream: {"folder": folders[stream], "files": names[stream]} for stream in kept}
            self._write(self._state / "finish.json", _json(plan))
            self._moved |= {stream: to for stream, (to, _) in kept.items()}
            for stream, (to, extra) in kept.items():
                facts = {
                    "tool": TOOL,
                    "fingerprint": self.fingerprint,
                    "folders": sorted(set(folders.values())),
                    "files": names[stream],
                }
                report = _json({**json.loads(extra.get(REPORT, b"{}")), **facts})
                to.mkdir(exist_ok=True)
                if stream in made:
                    self._place_file(stream, to, *made[stream])
                    beside = dict(extra)
                else:
                    beside = {**extra, INDEX: self._place(stream, to)}
                # config.json last: a reader that finds it finds all the rest
                for name, content in sorted({**beside, REPORT: report}.items(), key=lambda item: (item[0] == CONFIG, item[0])):
                    self._write(to / name, content)
                sync(to)
            self._tell()
            # from here on the result is whole; without a fingerprint the rest is rubbish
            (self._state / "fingerprint").unlink()
            self._clear()
        self.finished = True

    def _place_file(self, stream: str, to: Path, name: str, make: MakeFile) -> None:
        """Make the one file of a stream and put it in its place; its shards stay until the end.

        A file that is there is made again: whether it is whole, and of these shards, its name does not say.
        """
        with write_aside(to / name, self._state) as aside:
            make(aside, [self._file(stream, index) for index in range(self.shards)])

    def _place(self, stream: str, to: Path) -> bytes:
        """Put the shards of a stream in their place, and give their index."""
        where: dict[str, str] = {}
        total = 0
        for index in range(self.shards):
            header = read_header(self._file(stream, index))
            twice = where.keys() & header.keys()
            if twice:
                raise ValueError(f"{stream}: {sorted(twice)} are in two shards")
            where |= dict.fromkeys(header, self._name(index))
            total += sum(info.nbytes for info in header.values())
        for index in range(self.shards):
            if (self._state / stream / self._name(index)).exists():
                os.replace(self._state / stream / self._name(index), to / self._name(index))
        return _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})

    def _tell(self) -> None:
        """Bring what is said to those who watch to what is so: a kill may have come between the two."""
        self._write(self.out / PROGRESS, b"".join(line(record) for _, record in sorted(self.done.items())))

    def _refuse_crowded(self) -> None:
        """Raise OutputError where the disk has no room for a run from the beginning. A run that is there had its answer."""
        if self._restart:
            earlier = [self.out / name for name in self._earlier_files()] + list(self._state.rglob("*"))
            require_room(self.out, self._room - sum(path.stat().st_size for path in earlier if path.is_file()))
        elif not (self._state / "fingerprint").exists() and not _reports(self.out):
            require_room(self.out, self._room)

    def _open(self) -> None:
        """Find out what is in the folder, under the lock."""
        if self._restart and not (self._state / "discard.json").exists():
            self._write(self._state / "discard.json", _json({"files": self._earlier_files()}))
        if (self._state / "discard.json").exists():
            self._discard()
        if (self._state / "fingerprint").exists():
            self._resume()
        elif reports := _reports(self.out):
            self._check_finished(reports)
            self.finished = True
            return
        else:
            self._clear()
            for stream in self.streams:
                (self._state / stream).mkdir()
            (self._state / "journal.jsonl").touch()
            self._write(self._state / "fingerprint", _json(self._identity()))
        self._tell()
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def _resume(self) -> None:
        found = json.loads((self._state / "fingerprint").read_bytes())
        content = (self._state / "journal.jsonl").read_bytes()
        good = b"".join(whole_lines(content))
        records = _records(good)
        other = _differences(found, self._identity())
        if other:
            raise ResumeError(
                f"{self.out} holds an unfinished run (finished shards: {len(records)} of {found['shards']}) that differs from "
                f"this one in: {other}. Finish it with the command that began it, choose another folder, or throw it away "
                "with --restart"
            )
        os.truncate(self._state / "journal.jsonl", len(good))
        self._journal_end = len(good)
        if (self._state / "finish.json").exists():
            plan = json.loads((self._state / "finish.json").read_bytes())
            self._moved = {stream: self.out / row["folder"] for stream, row in plan.items()}
        for leftover in self._state.rglob("*.tmp"):
            leftover.unlink()
        if (self._state / "decided.json").exists():
            self.decided = json.loads((self._state / "decided.json").read_bytes())
        there = {i: all(self._file(stream, i).exists() for stream in self.streams) for i in records}
        self.done = {i: record for i, record in sorted(records.items()) if there[i]}

    def _check_finished(self, reports: Mapping[Path, Mapping[str, Any]]) -> None:
        for folder, report in reports.items():
            other = _differences(report["fingerprint"], self.fingerprint)
            if other:
                raise ResumeError(
                    f"{folder} holds a finished result that differs from what is asked for in: {other}. Choose another folder, "
                    f"or replace it with --restart"
                )
            absent = [str(folder / name) for name in report["files"] if not (folder / name).exists()]
            absent += [str(self.out / name) for name in report["folders"] if self.out / name not in reports]
            if absent:
                raise ResumeError(
                    f"{self.out} holds a finished result that lacks {', '.join(absent[:5])}; make it anew with --restart"
                )

    def _earlier_files(self) -> list[str]:
        """What earlier runs put into place, relative to the folder: only these may be deleted."""
        listed = [(folder, report["files"]) for folder, report in _reports(self.out).items()]
        if (self._state / "finish.json").exists():
            plan = json.loads((self._state / "finish.json").read_bytes())
            listed += [(self.out / row["folder"], row["files"]) for row in plan.values()]
        # the last part of a name only: a list that was tampered with must not reach outside
        paths = {folder / Path(name).name for folder, names in listed for name in names}
        return sorted(path.relative_to(self.out).as_posix() for path in (*paths, self.out / PROGRESS))

    def _discard(self) -> None:
        """Delete an earlier run. Killed here, the next run goes on deleting before it does anything else."""
        names = json.loads((self._state / "discard.json").read_bytes())["files"]
        for name in names:
            (self.out / name).unlink(missing_ok=True)
        for folder in {(self.out / name).parent for name in names} - {self.out}:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self._clear(keep="discard.json")
        (self._state / "discard.json").unlink()

    def _clear(self, keep: str = "") -> None:
        """Empty the folder of the unfinished run, but for the lock."""
        for entry in self._state.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in ("lock", keep):
                entry.unlink()

    def _leave(self) -> None:
        """Give up the folder; where no unfinished run is in it, our traces go first."""
        if self._lock.is_locked:
            if not (self._state / "fingerprint").exists() and not (self._state / "discard.json").exists():
                shutil.rmtree(self._state, ignore_errors=True)
            self._lock.release()

    def _identity(self) -> dict[str, str]:
        return {**self.fingerprint, "formats": ", ".join(self.streams), "shards": str(self.shards)}

    def _name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def _file(self, stream: str, index: int) -> Path:
        """Where a finished shard is now."""
        staged = self._state / stream / self._name(index)
        if stream in self._moved and not staged.exists():
            return self._moved[stream] / self._name(index)
        return staged

    def _write(self, path: Path, content: bytes) -> None:
        """Write a whole file or none of it. The temporary file lies in our own folder, never beside the result."""
        with write_aside(path, self._state) as aside:
            aside.write_bytes(content)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn the system's refusals into one of our errors."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = f"The disk of {self.out} is full" if full else f"{self.out} cannot be written ({error.strerror or error})"
            way = "Make room" if full else "Mend that"
            raise OutputError(
                f"{what}. {len(self.done)} of {self.shards} shards are finished and safe. {way} and give the same command "
                f"again: it continues from there"
            ) from error


def _loaded(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{file} was written by this run but cannot be read ({error}); use --restart") from error


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, a tensor at a time; equal tensors give equal bytes.

    The library's own save_file holds a second copy of all the tensors and hides why a disk refused to write.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # wide dtypes first, so that every tensor is aligned to its own width
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        first, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def require_room(folder: Path, nbytes: int) -> None:
    """Raise OutputError unless the disk of `folder`, which need not exist yet, has `nbytes` free."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise OutputError(
            f"The result needs {human(nbytes)}, but the disk of {folder} has {human(free)} free. Make room, or choose a folder "
            f"on another disk"
        )


def refuse_foreign(out: Path) -> None:
    """Nothing is ever written into, or deleted from, a folder that holds somebody's files."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; choose a folder that does not exist yet")
    entries = list(out.iterdir()) if out.exists() else []
    reports = _reports(out)
    ours = out / STATE in entries or out in reports or all(entry in reports or entry.name == PROGRESS for entry in entries)
    if not ours:
        raise OutputError(f"{out} exists and holds files that are not a result of {TOOL}; choose a new or an empty folder")


def _reports(out: Path) -> dict[Path, dict[str, Any]]:
    """The reports of finished results: of `out` itself or, when it has none, of the folders in it."""
    for folders in ([out], sorted(out.iterdir()) if out.exists() else []):
        found = {folder: report for folder in folders if (report := _report(folder)) is not None}
        if found:
            return found
    return {}


def report_of(folder: Path) -> dict[str, Any] | None:
    """report.json of a result of ours; None for any other folder."""
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("tool") == TOOL else None


def _report(folder: Path) -> dict[str, Any] | None:
    report = report_of(folder)
    if report is None:
        return None
    whole = isinstance(report.get("fingerprint"), dict) and all(
        isinstance(report.get(key), list) for key in ("files", "folders")
    )
    return report if whole else None


def _records(lines: bytes) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in lines.splitlines()]
    return {row.pop("shard"): row for row in rows}


def _differences(found: Mapping[str, str], asked: Mapping[str, str]) -> str:
    """The parts that are not the same, in words, each with what it was and what it is where a person can read that."""
    words = []
    for name in sorted(found.keys() | asked.keys()):
        before, now = found.get(name, ""), asked.get(name, "")
        if before != now:
            readable = all(value and len(value) <= _READABLE and not _HASH.fullmatch(value) for value in (before, now))
            words.append(f"{name} ({before} -> {now})" if readable else name)
    return ", ".join(words)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
