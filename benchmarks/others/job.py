"""What a quantizing process is asked, and what it answers.

It runs in the environments of other programs, so nothing of ours is imported here. What counts is the work: a process begins to
count when it has imported what it names, and remembers how much memory that took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Sequences of the evaluation text that a live model is given at a time.
_BATCH = 4


@dataclass(frozen=True)
class Job:
    """One quantization. model, out: folders. scheme: a name of ours. tokens: a file with the windows "calibration" and
    "evaluation" [windows, tokens]. calib, seed: the text and the choice that the calibration windows are. steps, batch: of a
    tuner that takes steps, and sequences of a step. device: "cpu" or "cuda". fields: of our recipe, for our own tool alone.
    """

    model: str
    out: str
    scheme: str
    tokens: str
    calib: str
    seed: int
    steps: int
    batch: int
    device: str
    fields: dict[str, Any]

    def windows(self, which: str = "calibration") -> Tensor:
        """The windows [windows, tokens], int64."""
        return load_file(self.tokens)[which]


@dataclass(frozen=True)
class Made:
    """What a tool made: a folder, or a live model whose logits are the result where the tool writes no folder that others read
    in full. bits: a weight, where there is no folder to say it. seconds: of what counts, where that is not all that was done.
    """

    folder: str | None = None
    model: torch.nn.Module | None = None
    bits: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Answer:
    """seconds: of the work. peak, imports: highest resident bytes of the process in all, and before the work. vram: highest
    bytes on the GPU. folder, logits, bits: what was made; logits: a file with float32 "logits" [windows, tokens, vocabulary].
    """

    version: str
    seconds: float
    peak: int
    imports: int
    vram: int
    folder: str | None
    logits: str | None
    bits: float | None


def answer(work: Callable[[Job], Made], package: str) -> None:
    """Do the job in the file that the command line names first, and write what came of it into the one it names second."""
    asked, told = map(Path, sys.argv[1:3])
    job = Job(**json.loads(asked.read_text(encoding="utf-8")))
    imports, started = _peak(), time.perf_counter()
    made = work(job)
    if job.device == "cuda":
        torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - started, _peak()
    vram = torch.cuda.max_memory_allocated() if job.device == "cuda" else 0
    logits = None if made.model is None else _logits(made.model, job)
    found = Answer(version(package), made.seconds or seconds, peak, imports, vram, made.folder, logits, made.bits)
    told.write_text(json.dumps(asdict(found)), encoding="utf-8")


@torch.no_grad()
def _logits(model: torch.nn.Module, job: Job) -> str:
    """In float32, as our evaluator runs its models."""
    model = model.float().eval().to(job.device)
    batches = job.windows("evaluation").to(job.device).split(_BATCH)
    path = f"{job.out}-logits.safetensors"
    save_file({"logits": torch.cat([model(batch).logits.float().cpu() for batch in batches])}, path)
    return path


def _peak() -> int:
    """Highest resident bytes so far. Linux hands a process its parent's ru_maxrss; VmHWM is its own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
