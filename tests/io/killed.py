"""Kill a run at every place where it touches the file system; run as a script, it prints what came of it as one JSON object.

    python killed.py SCENARIO FOLDER

Each run is a forked process that sends itself SIGKILL just before its n-th system call that changes the result's folder,
for n = 1, 2, ... until a run lives to its end. After each kill the same run is given again, and left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bitlathe.io.writer import Writer

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SHARDS = 2
ONE = "one.bin"


def tensors(stream: str, shard: int) -> dict[str, torch.Tensor]:
    """The same tensors whenever they are asked for."""
    values = torch.arange(600.0) + 1000 * shard + len(stream)
    return {f"layers.{shard}.weight": values.view(20, 30).bfloat16(), f"layers.{shard}.bias": values[:7].clone()}


def make(path: Path, shards: Sequence[Path]) -> None:
    """One file of shards, in several writes."""
    with path.open("wb") as file:
        for shard in shards:
            file.write(shard.read_bytes())
            file.flush()


def run(out: Path, *, streams: tuple[str, ...], recipe: str = "a", restart: bool = False) -> None:
    """A whole run; with one stream `out` is the result, with two each has a folder in it, "dropped" goes nowhere, and "one"
    becomes one file."""
    with Writer(out, streams=streams, shards=SHARDS, fingerprint={"recipe": recipe}, restart=restart) as writer:
        if writer.finished:
            return
        for shard in range(SHARDS):
            if shard in writer.done:
                for stream in streams:
                    found = writer.read(stream, shard)
                    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(stream, shard).items())
                continue
            writer.put(shard, {stream: tensors(stream, shard) for stream in streams}, {"loss": shard / 8})
        kept = [stream for stream in streams if stream != "dropped"]
        folders = {stream: out if len(kept) == 1 else out / stream for stream in kept}
        report = json.dumps({"blocks": [writer.done[shard] for shard in range(SHARDS)]}).encode()
        files = {"config.json": b"{}", "report.json": report, "tokenizer.json": b"[]"}
        made = {"one": (ONE, make)} if "one" in streams else None
        writer.finish({stream: (folders.get(stream), files if stream in folders else {}) for stream in streams}, made)


def earlier(out: Path) -> None:
    """A finished result with another fingerprint and more folders, which a restart has to remove."""
    run(out, streams=("x", "y"), recipe="other")


SCENARIOS: dict[str, tuple[Callable[[Path], None] | None, Callable[[Path], None]]] = {
    "several": (None, lambda out: run(out, streams=("dropped", "x", "y"))),
    "one file": (None, lambda out: run(out, streams=("x", "one"))),
    "one file, restart": (
        lambda out: run(out, streams=("one",), recipe="other"),
        lambda out: run(out, streams=("dropped", "one"), restart=True),
    ),
    "restart": (earlier, lambda out: run(out, streams=("dropped", "x"), restart=True)),
}


def in_child(prepare: Callable[[], None], body: Callable[[], None]) -> int:
    """How `body` ended in a process of its own: 0, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        prepare()
        body()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killing(out: Path, number: int) -> Callable[[], None]:
    """Arrange for a SIGKILL before system call `number` that changes something in `out`."""

    def prepare() -> None:
        count = 0

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if not (event in CHANGES or (event == "open" and args[2] & WRITING)):
                return
            # a tree is removed through handles of its folders: the names are bare then
            inside = str(args[0]).startswith(str(out)) if os.path.isabs(args[0]) else args[-1] != -1
            if inside:
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    return prepare


def tearing(size: int) -> Callable[[], None]:
    """Arrange for death as soon as a file grows beyond `size` bytes: in the middle of writing it."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


def tree(out: Path) -> dict[str, str]:
    """A hash of every file, and the names of the folders."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(out.rglob("*"))
    }


WHOLE = 2 * 1400  # bytes that the one file of both shards has at least


def half_shown(out: Path) -> list[str]:
    """Folders that a reader would take for a whole checkpoint although files that its index names are missing, and files of a
    whole model that end early."""
    wrong = [str(one) for one in out.rglob(ONE) if one.stat().st_size < WHOLE]
    for config in out.rglob("config.json"):
        if config.parent.name == "one":
            wrong += [] if (config.parent / ONE).exists() else [str(config.parent)]
            continue
        index = config.parent / "model.safetensors.index.json"
        named = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {index.name}
        if not all((config.parent / name).exists() for name in named):
            wrong.append(str(config.parent))
    return wrong


def main(scenario: str, folder: Path) -> None:
    torch.set_num_threads(1)
    # what a killed process has written is in the system's hands: only a power cut asks for more, at a minute of waiting
    os.fsync = lambda _: None
    before, body = SCENARIOS[scenario]
    out = folder / "out"

    def killed(prepare: Callable[[], None]) -> tuple[int, bool, list[str]]:
        """How the first run ended, whether the second mended it, and what a reader would have met between them."""
        shutil.rmtree(out, ignore_errors=True)
        if before is not None:
            shutil.copytree(folder / "before", out)
        ended = in_child(prepare, lambda: body(out))
        # what a restart is deleting is not whole any more, and not meant to be
        shown = half_shown(out) if before is None else []
        body(out)
        return ended, tree(out) == expected, shown

    if before is not None:
        before(folder / "before")
    body(out)
    expected = tree(out)
    different, shown, deaths, number = [], [], 0, 0
    while True:
        number += 1
        ended, same, half = killed(killing(out, number))
        different += [] if same else [f"call {number}"]
        shown += half
        if ended == 0:
            break
        deaths += ended == -signal.SIGKILL
    torn = 0
    for size in (1, 40, 100, 200, 700, 1500):
        ended, same, half = killed(tearing(size))
        different += [] if same else [f"byte {size}"]
        shown += half
        torn += ended == -signal.SIGXFSZ
    told = {"calls": number - 1, "deaths": deaths, "torn": torn, "different": different, "half shown": shown}
    print(json.dumps(told | {"files": sorted(expected)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
