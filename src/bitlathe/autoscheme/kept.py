"""What a search has found out, kept in a folder: killed, it goes on; asked again, it answers at once.

    FOLDER/about.json              what the numbers depend on, for people
    FOLDER/scores.jsonl            a line for each part of the model: what every option of its linears is predicted to lose
    FOLDER/PART.safetensors        what was learned of the part's inputs, from which the codes of every option follow
    FOLDER/measured.jsonl          a line for each choice whose true KL divergence was measured
    FOLDER/lock                    held by the search that works here
    FOLDER/work/                   hidden states that do not fit into memory; emptied when a search begins

The name of a folder is a hash of all that its numbers depend on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import FileLock
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from torch import Tensor

from bitlathe.errors import OutputError
from bitlathe.io.files import replace_file, write_aside
from bitlathe.io.lines import append_line, read_lines
from bitlathe.io.writer import save


class Score(BaseModel):
    """What an option of a linear is predicted to lose, nats a token: by the rounding of its weights, and of its inputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: float
    inputs: float

    @property
    def loss(self) -> float:
        """Of both."""
        return self.weights + self.inputs


class Measured(BaseModel):
    """The mean KL divergence of a choice from the original, nats a token, and its standard error over windows of text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kl: float
    error: float | None


# Linear -> option -> score.
Scores = Mapping[str, Mapping[str, Score]]


class Kept:
    """One search's hold on its folder in `root`; used in a `with` statement.

    facts: what the numbers depend on. Entering waits for another search of the same folder to end, and raises OutputError where
    the folder cannot be written. scores: of the linears that are done. measured: key of a choice -> what was measured.
    """

    def __init__(self, root: Path, facts: Mapping[str, str]) -> None:
        text = json.dumps(facts, sort_keys=True, indent=2)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.work = self.folder / "work"
        self.scores: dict[str, dict[str, Score]] = {}
        self._parts: set[str] = set()
        self.measured: dict[str, Measured] = {}
        self._about = text
        self._lock = FileLock(self.folder / "lock", thread_local=False)

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()
            replace_file(self.folder / "about.json", self._about.encode() + b"\n")
        except OSError as error:
            self._lock.release()
            raise OutputError(
                f"scores are kept in {self.folder}, which cannot be written ({error.strerror or error}). Choose another folder "
                "with --scores"
            ) from error
        for row in read_lines(self.folder / "scores.jsonl"):
            self._take(row["part"], row["scores"])
        for row in read_lines(self.folder / "measured.jsonl"):
            self.measured[row["choice"]] = Measured(kl=row["kl"], error=row["error"])
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self._lock.release()

    def has(self, part: str, wanted: Mapping[str, Iterable[str]]) -> bool:
        """Whether a part of the model is done for the options `wanted` of its linears."""
        return part in self._parts and all(
            option in self.scores.get(name, {}) for name, options in wanted.items() for option in options
        )

    def put(self, part: str, scores: Scores, tensors: Mapping[str, Tensor]) -> None:
        """Keep the scores of a part of the model beside those of other options, and `tensors` likewise for `tensors`."""
        with self._disk():
            with write_aside(self.folder / f"{part}.safetensors") as aside:
                save(aside, {**(self.tensors(part) if part in self._parts else {}), **tensors})
            rows = {name: {option: score.model_dump() for option, score in row.items()} for name, row in scores.items()}
            append_line(self.folder / "scores.jsonl", {"part": part, "scores": rows})
            self._take(part, rows)

    def tensors(self, part: str) -> dict[str, Tensor]:
        """What was kept with the scores of a part."""
        return load_file(self.folder / f"{part}.safetensors")

    def measure(self, choice: str, found: Measured) -> None:
        """Keep what was measured of the choice of this key."""
        with self._disk():
            append_line(self.folder / "measured.jsonl", {"choice": choice, **found.model_dump()})
            self.measured[choice] = found

    def _take(self, part: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
        self._parts.add(part)
        for name, row in rows.items():
            self.scores.setdefault(name, {}).update({option: Score(**score) for option, score in row.items()})

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn what the system refuses into one of our errors."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.folder} cannot be written ({error.strerror or error}). What was found until now is kept: make room, "
                "and give the same command again"
            ) from error
