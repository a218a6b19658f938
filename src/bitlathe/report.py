"""What a run tells: events while it runs, report.json and a model card when it is done, and `inspect` of any checkpoint."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, field_validator

from bitlathe.errors import CheckpointError
from bitlathe.io.checkpoint import Checkpoint, TensorInfo
from bitlathe.io.files import replace_file
from bitlathe.io.sizes import human
from bitlathe.io.writer import REPORT, TOOL
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.source import open_model, stored_dtype
from bitlathe.numerics.rotation import cost
from bitlathe.numerics.scheme import KV_SCHEMES, Scheme, described, name_of
from bitlathe.plan import ROTATION_NAMES, Plan

CARD = "README.md"
# How every format begins the names of what is static of a linear's activations: "input_scale" and its like.
_OF_INPUTS = "input_"


class BlockReport(BaseModel):
    """One finished block: a line of progress.jsonl.

    block: 0-based. linears: how many were quantized. loss_before, loss_after: mean squared error of the block's output,
    rounded to nearest and as tuned; None where no text was used or the output is not finite. seconds: wall clock of
    its own. peak_ram, peak_vram: bytes, the highest of the process so far. elapsed: seconds since the first run began, less the
    pauses. note: what went wrong with it. resumed: taken over from an earlier run instead of tuned.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    block: int
    blocks: int
    name: str
    linears: int
    loss_before: float | None
    loss_after: float | None
    seconds: float
    peak_ram: int
    peak_vram: int
    elapsed: float
    note: str | None = None
    resumed: bool = False

    @field_validator("loss_before", "loss_after")
    @classmethod
    def _known(cls, loss: float | None) -> float | None:
        # JSON has neither infinity nor NaN.
        return loss if loss is None or isfinite(loss) else None


@dataclass(frozen=True)
class Step:
    """Where the tuning of the current block is."""

    block: int
    blocks: int
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class Note:
    """Something the user should know: what was decided for them, or what was left alone."""

    text: str


@dataclass(frozen=True)
class Searching:
    """How far a search is: "forward", "score" or "measure", and how many blocks of that are done; or whether the
    "gradients" that a tuner asks for are there; or how far the "scales" are that are tuned end to end, in steps."""

    what: str
    done: int
    of: int


Event = BlockReport | Step | Note | Searching
Listener = Callable[[Event], None]


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Highest resident memory of this process, and highest memory allocated on `device` if it is a GPU, so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux hands a process its parent's ru_maxrss; this line is its own.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        ram = int(fields["VmHWM"].split()[0]) * 1024
    else:
        # In KiB, but for macOS, where it is in bytes.
        ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return ram, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def sizes_of(
    header: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, int]], quantized: Container[str]
) -> dict[str, Any]:
    """Bytes and bits as a checkpoint's files hold them, from their header alone.

    shapes: linear -> (outputs, inputs). Returns {"bytes": of all tensors, "linears": {linear: bytes stored for its weight},
    "bits_quantized", "bits_linears", "bits_checkpoint": average bits per weight of the quantized linears, of all linears, and
    per parameter of the whole checkpoint}. Static scales of activations are no part of a weight: only the totals hold them. A
    tied head stores nothing of its own and is left out.
    """
    owner = {name: name.rpartition(".")[0] for name in header}
    of_inputs = {name for name in header if owner[name] in shapes and name.rpartition(".")[2].startswith(_OF_INPUTS)}
    of_weights = {name for name in header if owner[name] in shapes and not name.endswith(".bias")} - of_inputs
    stored = dict.fromkeys((name for name in shapes if name in owner.values()), 0)
    for name in of_weights:
        stored[owner[name]] += header[name].nbytes
    total = sum(info.nbytes for info in header.values())
    weights = {name: prod(shapes[name]) for name in stored}
    others = sum(prod(header[name].shape) for name in header.keys() - of_weights - of_inputs)
    coded = [name for name in stored if name in quantized]
    return {
        "bytes": total,
        "linears": stored,
        "bits_quantized": _ratio(8 * sum(stored[name] for name in coded), sum(weights[name] for name in coded)),
        "bits_linears": _ratio(8 * sum(stored.values()), sum(weights.values())),
        "bits_checkpoint": _ratio(8 * total, sum(weights.values()) + others),
    }


def _ratio(bits: int, numbers: int) -> float | None:
    return bits / numbers if numbers else None


def read_report(folder: Path | str) -> dict[str, Any]:
    """report.json of a finished result. Raises CheckpointError if the folder has none of ours."""
    path = Path(folder) / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no report.json of a finished run ({error})") from error
    if not isinstance(report, dict) or report.get("tool") != TOOL:
        raise CheckpointError(f"{path} was not written by bitlathe")
    return report


def card(report: Mapping[str, Any]) -> str:
    """The model card: how the checkpoint was made, how to load it, and what was measured."""
    loader = Environment(
        loader=PackageLoader("bitlathe", "data"), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    return loader.get_template("card.md.jinja").render(report=report, human=human)


def as_json(data: Any) -> bytes:
    """JSON as it is written to files."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def inspect(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, original or quantized, from its headers alone.

    Returns {"model", "format", "dtype", "linears": [{"name", "scheme", "activations", "shape", "bits", "bytes", "kept"}],
    "quantized": how many of them, "rotations": as `rotations_of` has them, "untied", "kv": its name, "bytes", "bits_quantized",
    "bits_linears", "bits_checkpoint"}; bits are per weight as the file holds them; scheme is None and kept the reason for a
    linear in 16 bits.
    Raises CheckpointError or UnsupportedModel.
    """
    checkpoint = Checkpoint(folder)
    skeleton, weights = open_model(checkpoint, device=torch.device("cpu"))
    report = own_report(checkpoint.path)
    plan = Plan(**report["plan"]) if report else weights.plan
    schemes = {} if plan is None else plan.quantized
    matrices = skeleton.matrices(schemes)
    sizes = sizes_of(checkpoint.header, matrices, schemes)
    stored = sizes.pop("linears")
    kept = report.get("kept", {})
    unknown = "the model is not quantized" if plan is None else "not in the plan"
    linears = {} if plan is None else plan.linears
    rows = [
        {
            "name": name,
            "scheme": name_of(schemes[name], linears[name].input) if name in schemes else None,
            "activations": _activations(linears[name].input) if name in linears else None,
            "shape": list(shape),
            "bits": 8 * stored[name] / prod(shape) if name in stored else None,
            "bytes": stored.get(name, 0),
            "kept": None if name in schemes else kept.get(name, unknown),
        }
        for name, shape in matrices.items()
    ]
    return {
        "model": str(folder),
        "format": report.get("format") or (weights.format.name if weights.format else "float"),
        "dtype": stored_dtype(checkpoint),
        "linears": rows,
        "quantized": len(schemes),
        "rotations": [] if plan is None else rotations_of(plan, skeleton),
        "untied": plan is not None and plan.untied,
        "kv": None if plan is None else _cache(plan.kv),
        **sizes,
    }


def _activations(scheme: Scheme | None) -> str | None:
    return scheme and described(scheme)


def _cache(scheme: Scheme | None) -> str | None:
    """The name of a cache's scheme, or its description where it has none."""
    known = {scheme.served_in("bf16"): name for name, scheme in KV_SCHEMES.items()}
    return scheme and known.get(scheme.served_in("bf16"), described(scheme))


def rotations_of(plan: Plan, skeleton: Skeleton) -> list[dict[str, Any]]:
    """Every rotation of a plan, and what a token costs where it runs while the model does.

    Returns [{"name", "space", "block", "kind", "seed", "online": or folded, "linears": how many run it, "operations":
    multiplications and additions, "bytes": read and written in 16 bits}], the last two of all linears, of experts as many as a
    token chooses, for R3 of all heads of keys, there and back.
    """
    online = dict.fromkeys(row.online for row in plan.linears.values() if row.online is not None)
    found = []
    for rotation in dict.fromkeys((*plan.rotations, *online)):
        turning = [name for name, row in plan.linears.items() if row.online == rotation]
        turned = [(skeleton.linears[name][1], skeleton.share(name)) for name in turning]
        if rotation.space == "qk":
            turned = [(skeleton.value_width, 1)] * 2 * skeleton.depth
        found.append(
            {
                "name": ROTATION_NAMES[rotation.space],
                **rotation.model_dump(mode="json"),
                # A plan that was read from a folder of another program may run what could have been folded.
                "online": bool(turned) or not skeleton.arch.folds(rotation.space),
                "linears": 0 if rotation.space == "qk" else len(turned),
                "operations": int(sum(share * cost(width, rotation)[0] for width, share in turned)),
                "bytes": int(sum(share * 2 * 2 * width for width, share in turned)),
            }
        )
    return found


def record_evaluation(folder: str | Path, found: Mapping[str, Any]) -> bool:
    """Write what was measured into report.json and the model card of a result of ours, and say whether that was done.

    found: what `evaluate` returns, and under "tasks" what `measure_tasks` does for the folder; either may be left out, and what
    is recorded of it stays. Not done for any other folder, for one that cannot be written, and where a comparison with the
    original is recorded and `found` has none: the fuller one stays, of each task too.
    """
    report = own_report(Path(folder))
    if not report:
        return False
    figures = {name: value for name, value in found.items() if name != "tasks"}
    before, tasks = report["evaluation"] or {}, dict(report.get("tasks", {}))
    fuller = {
        name: task for name, task in found.get("tasks", {}).items() if task["against"] or not tasks.get(name, {}).get("against")
    }
    new: dict[str, Any] = {"tasks": tasks | fuller} if fuller else {}
    if figures and ("against" in figures or "against" not in before):
        new["evaluation"] = figures
    return bool(new) and record(folder, new)


def record(folder: str | Path, fields: Mapping[str, Any]) -> bool:
    """Write fields into report.json of a result of ours, and its model card anew, and say whether that was done: not for any
    other folder, nor for one that cannot be written."""
    path = Path(folder)
    report = own_report(path)
    if not report:
        return False
    report |= dict(fields)
    files = {REPORT: as_json(report), CARD: card(report).encode()}
    try:
        for name, content in files.items():
            replace_file(path / name, content)
    except OSError:
        return False
    return True


def own_report(folder: Path) -> dict[str, Any]:
    """report.json of a result of ours; empty for any other folder, which may have one of another program."""
    try:
        return read_report(folder)
    except CheckpointError:
        return {}
