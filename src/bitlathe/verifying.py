"""verify: a finished folder, opened by other processes and other programs' readers, is what was made.

`python -m bitlathe.verifying READER JOBS` is one such process. JOBS is a JSON list of `Job`s; for each it opens the folder by
READER, compares the weight of every quantized linear with the codes, writes the logits on fixed tokens into the job's file, and
prints what it found as a line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from bitlathe.errors import CheckpointError
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.source import open_model
from bitlathe.model.weights import DTYPES, Weights
from bitlathe.numerics.project import dequantize
from bitlathe.readers import READERS, Reader
from bitlathe.readers.base import Opened
from bitlathe.registry import load
from bitlathe.report import own_report

OWN = "bitlathe"
_TAUGHT = "transformers with bitlathe.hf"
_FOR = f"{OWN} for "
# Fixed tokens: sequences, and tokens of one. Models run on any tokens, so that no text and no tokenizer is needed.
_SHAPE = (4, 64)
_MARK = '{"reader"'  # how the lines begin that are for us; readers print what they like
_NOTHING = {"linears": 0, "unequal": 0, "largest": 0.0}
_SHOWN = 2000  # characters of what a reader said when it failed


class Job(NamedTuple):
    """folder: to open. codes: a folder that bitlathe reads, whose codes the weights must be; `folder` itself, if need be. file:
    where the logits go."""

    folder: str
    codes: str
    file: str


def verify(folder: str | Path, *, native: str | Path | None = None) -> dict[str, Any]:
    """Open a finished folder with our reader and with others' that are installed, each in a process of its own, and compare.

    native: a folder with the codes that the weights are compared with; by default a native one beside `folder`, as `quantize`
    with several formats writes it, else `folder` itself.

    Returns {"folder", "format", "codes", "readers": [{"reader", "version", "linears", "unequal": how many weights differ in any
    bit, "largest": the largest difference, in roundings of the reader's dtype at the largest weight of its row, "kl": mean KL
    divergence of its logits from ours in nats a token or None, "same": whether that is within one rounding and within what the
    reader's row allows}], "missing": readers that are not installed, "same"}. Raises CheckpointError for a folder that is not
    quantized.
    """
    folder = Path(folder).expanduser()
    format, codes = _format_of(folder), _codes_of(folder, native)
    wanted = readers_for(folder, format)
    there = [name for name in wanted if find_spec(READERS[name].module) is not None]
    with tempfile.TemporaryDirectory(prefix="bitlathe-verify-") as scratch:
        names = list(dict.fromkeys((*there, *map(ours_for, there))))
        files = {name: Path(scratch) / f"{index}.safetensors" for index, name in enumerate(names)}
        read = {name: read_by(name, [Job(str(folder), str(codes), str(file))])[0] for name, file in files.items()}
        rows = [judged(read[name], ours=files[ours_for(name)], theirs=files[name]) for name in there]
    return {
        "folder": str(folder),
        "format": format,
        "codes": str(codes),
        "readers": rows,
        "missing": [name for name in wanted if name not in there],
        "same": all(row["same"] for row in rows),
    }


def _format_of(folder: Path) -> str:
    report = own_report(folder)
    if report:
        return str(report["format"])
    _, weights = open_model(Checkpoint(folder), device=torch.device("cpu"))
    if weights.format is None:
        raise CheckpointError(f"{folder} is not quantized, so there is nothing to verify: give a folder of codes")
    return weights.format.name


def _codes_of(folder: Path, native: str | Path | None) -> Path:
    """Where the codes are that the weights are compared with."""
    if native is not None:
        return Path(native).expanduser()
    beside = folder.parent / "native"
    mine, its = own_report(folder), own_report(beside)
    made_together = bool(mine) and bool(its) and mine["plan"] == its["plan"] and mine["fingerprint"] == its["fingerprint"]
    return beside if made_together else folder


def readers_for(folder: Path, format: str) -> list[str]:
    """The readers of a folder in a format: ours first, then the others'. What transformers alone would read as something else
    it is not asked to."""
    report = own_report(folder)
    online = any(row["online"] for row in report.get("rotations", ())) or not report.get("experts_alone", True)
    coded = report.get("quant_method") == "bitlathe"
    skipped = "transformers" if online or coded else _TAUGHT
    return [name for name, reader in READERS.items() if format in reader.formats and name != skipped]


def ours_for(name: str) -> str:
    """What `read_by` calls our reader as it computes for another one."""
    return OWN if READERS[name].ours == READERS[OWN].target else f"{_FOR}{name}"


def _reader(name: str) -> Reader:
    """By its name in the table, or as `ours_for` calls it."""
    return READERS[name] if name in READERS else READERS[OWN]._replace(target=READERS[name.removeprefix(_FOR)].ours)


def read_by(name: str, jobs: Sequence[Job], python: str = sys.executable) -> list[dict[str, Any]]:
    """What a reader finds in each folder, in one process as long as it does not fail; where it does, what it said ("error").

    python: the interpreter that has the reader, and bitlathe.
    """
    rows: list[dict[str, Any]] = []
    while len(rows) < len(jobs):
        command = [python, "-m", "bitlathe.verifying", name, json.dumps(jobs[len(rows) :])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith(_MARK)]
        if done.returncode:
            rows.append({"reader": name, "version": "", "error": done.stderr.strip()[-_SHOWN:]})
    return rows


def judged(row: Mapping[str, Any], *, ours: Path, theirs: Path) -> dict[str, Any]:
    """A row of `read_by` with the KL divergence of its logits from ours, and whether the reader sees what was made."""
    row = {**row, "kl": _divergence(ours, theirs)}
    return {**row, "same": _same(row)}


def _divergence(ours: Path, theirs: Path) -> float | None:
    """Mean KL divergence of a reader's logits from ours; None where one of them has none."""
    logits = [found for file in (ours, theirs) if file.is_file() and (found := load_file(file).get("logits")) is not None]
    if len(logits) < 2:
        return None
    wanted, got = (F.log_softmax(each.double(), -1) for each in logits)
    return F.kl_div(got, wanted, log_target=True, reduction="none").sum(-1).mean().item()


def _same(row: Mapping[str, Any]) -> bool:
    if "error" in row:
        return False
    close = row["kl"] is None or abs(row["kl"]) <= READERS[row["reader"]].most
    return row["largest"] <= 1 and close


@torch.no_grad()
def _weights_compared(opened: Opened, codes: Weights) -> dict[str, Any]:
    """How many weights differ from what the codes stand for, and by how much."""
    assert codes.plan is not None
    linears = unequal = 0
    largest = 0.0
    for name in codes.plan.quantized:
        found = opened.weight(name, codes.shapes[name][1])
        if found is None:
            continue
        wanted = dequantize(codes.layer(name).weight, DTYPES[codes.plan.dtype]).float()
        apart = (found.cpu().float() - wanted).abs()
        step = torch.finfo(found.dtype).eps * wanted.abs().amax(1, keepdim=True)
        linears, unequal = linears + 1, unequal + int((apart != 0).sum())
        largest = max(largest, (apart / step).nan_to_num(0.0, posinf=float("inf")).max().item())
    return {"linears": linears, "unequal": unequal, "largest": largest}


def _tokens(vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, _SHAPE, generator=torch.Generator().manual_seed(0))


def main(arguments: Sequence[str]) -> None:
    """The process of one reader; see above."""
    name, jobs = arguments
    reader = _reader(name)
    open_folder = load(reader.target)
    for job in (Job(*fields) for fields in json.loads(jobs)):
        opened: Opened = open_folder(Path(job.folder))
        skeleton, weights = open_model(Checkpoint(job.codes), device=torch.device("cpu"))
        logits = opened.logits(_tokens(skeleton.model.config.vocab_size))
        save_file({} if logits is None else {"logits": logits.contiguous()}, job.file)
        # Of a dense folder there are only logits to compare.
        found = _NOTHING if weights.format is None else _weights_compared(opened, weights)
        print(json.dumps({"reader": name, "version": version(reader.package), **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
