"""verify: a finished folder, opened by other processes and other programs' readers, is what was made.

`python -m bitlathe.verifying FOLDER READER CODES FILE` is one such process: it opens FOLDER by READER, compares the weight of
every quantized linear with the codes in CODES (a folder that bitlathe reads, or FOLDER itself), writes its logits on fixed
tokens into FILE and prints what it found as JSON.
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
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from bitlathe.errors import CheckpointError
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.source import open_model
from bitlathe.model.weights import DTYPES, Weights
from bitlathe.numerics.project import dequantize
from bitlathe.readers import READERS
from bitlathe.readers.base import Opened
from bitlathe.registry import load
from bitlathe.report import own_report

OWN = "bitlathe"
_TAUGHT = "transformers with bitlathe.hf"
# What another order of additions may do to logits, in nats a token.
MOST = 1e-5
# Fixed tokens: sequences, and tokens of one. Models run on any tokens, so that no text and no tokenizer is needed.
_SHAPE = (4, 64)
_SHOWN = 2000  # characters of what a reader said when it failed


def verify(folder: str | Path, *, native: str | Path | None = None, pythons: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Open a finished folder with our reader and with others' that are installed, each in a process of its own, and compare.

    native: a folder with the codes that the weights are compared with; by default a native one beside `folder`, as `quantize`
    with several formats writes it, else `folder` itself. pythons: reader -> the interpreter that has it; by default this one,
    for readers that it has.

    Returns {"folder", "format", "codes", "readers": [{"reader", "version", "linears", "unequal": how many weights differ in any
    bit, "largest": the largest difference, in roundings of the reader's dtype at the largest weight of its row, "kl": mean KL
    divergence of its logits from our load's in nats a token or None, "same": whether that is within one rounding and 1e-5}],
    "missing": readers that are not installed, "same"}. Raises CheckpointError for a folder that is not quantized.
    """
    folder = Path(folder).expanduser()
    format = _format_of(folder)
    codes = _codes_of(folder, native)
    wanted = _readers_for(folder, format)
    there = {name: (pythons or {}).get(name, sys.executable) for name in wanted}
    missing = [name for name in wanted if name not in (pythons or {}) and find_spec(READERS[name].module) is None]
    with tempfile.TemporaryDirectory(prefix="bitlathe-verify-") as scratch:
        rows = []
        for index, name in enumerate(name for name in wanted if name not in missing):
            file = Path(scratch) / f"{index}.safetensors"
            rows.append(_asked(name, [there[name], "-m", "bitlathe.verifying", str(folder), name, str(codes), str(file)]))
            rows[-1] |= _compared(Path(scratch) / "0.safetensors", file)
            rows[-1]["same"] = _same(rows[-1])
    return {
        "folder": str(folder),
        "format": format,
        "codes": str(codes),
        "readers": rows,
        "missing": missing,
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


def _readers_for(folder: Path, format: str) -> list[str]:
    """Ours first, then the others'. What transformers alone would read as something else it is not asked to."""
    report = own_report(folder)
    online = any(row["online"] for row in report.get("rotations", ())) or not report.get("experts_alone", True)
    coded = report.get("quant_method") == "bitlathe"
    skipped = "transformers" if online or coded else _TAUGHT
    return [name for name, reader in READERS.items() if format in reader.formats and name != skipped]


def _asked(name: str, command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"reader": name, "version": "", "error": done.stderr.strip()[-_SHOWN:]}
    return json.loads(done.stdout.splitlines()[-1])


def _compared(ours: Path, other: Path) -> dict[str, float | None]:
    """Mean KL divergence of a reader's logits from ours; None where one of them has none."""
    logits = [found for file in (ours, other) if file.is_file() and (found := load_file(file).get("logits")) is not None]
    if len(logits) < 2:
        return {"kl": None}
    wanted, got = (F.log_softmax(each.double(), -1) for each in logits)
    return {"kl": F.kl_div(got, wanted, log_target=True, reduction="none").sum(-1).mean().item()}


def _same(row: Mapping[str, Any]) -> bool:
    if "error" in row:
        return False
    close = row["kl"] is None or abs(row["kl"]) <= MOST or bool(READERS[row["reader"]].computes)
    return row["largest"] <= 1 and close


@torch.no_grad()
def _weights_compared(opened: Opened, codes: Weights) -> dict[str, Any]:
    """How many weights differ from what the codes stand for, and by how much."""
    assert codes.plan is not None
    linears = unequal = 0
    largest = 0.0
    for name in codes.plan.quantized:
        found = opened.weight(name)
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
    folder, name, codes, file = arguments
    reader = READERS[name]
    opened: Opened = load(reader.target)(Path(folder))
    skeleton, weights = open_model(Checkpoint(codes), device=torch.device("cpu"))
    dense = weights.format is None  # without codes there are only logits to compare
    logits = opened.logits(_tokens(skeleton.model.config.vocab_size))
    save_file({} if logits is None else {"logits": logits.contiguous()}, file)
    found = {"linears": 0, "unequal": 0, "largest": 0.0} if dense else _weights_compared(opened, weights)
    print(json.dumps({"reader": name, "version": version(reader.package), **found}))


if __name__ == "__main__":
    main(sys.argv[1:])
