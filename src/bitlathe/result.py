"""The end of a run: what goes beside the shards, and where it all lands."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitlathe.formats.base import Format
from bitlathe.formats.ct_experts import read_alone
from bitlathe.io.checkpoint import CONFIG
from bitlathe.io.writer import REPORT, TOOL, Writer
from bitlathe.plan import Plan
from bitlathe.prepare import CODES, Prepared
from bitlathe.report import CARD, as_json, card, read_report, rotations_of, sizes_of
from bitlathe.version import VERSION

# The names of dtypes in config.json.
_LONG = {"bf16": "bfloat16", "fp16": "float16"}
_VERSIONS = ("torch", "transformers", "safetensors", "compressed-tensors")


def finish(ready: Prepared, writer: Writer, *, seconds: float) -> None:
    """Give every format its files and move everything to its place."""
    results: dict[str, tuple[Path | None, dict[str, bytes]]] = {CODES: (None, {})}
    for name, format in ready.formats.items():
        results[name] = (_folder(ready, name), _files(ready, writer, name, format, seconds=seconds))
    writer.finish(results)


def plan_of_finished(ready: Prepared) -> Plan:
    """The plan of the result that is there already: with the signs that its run chose, where the recipe has some drawn."""
    return Plan(**read_report(_folder(ready, next(iter(ready.formats))))["plan"])


def _folder(ready: Prepared, name: str) -> Path:
    """Where the result in a format lies."""
    return ready.recipe.out if len(ready.formats) == 1 else ready.recipe.out / name


def _calibration(ready: Prepared) -> dict[str, Any] | None:
    """The text that was really used; None where none was."""
    if ready.tokens is None:
        return None
    windows, seqlen = ready.tokens.shape
    return {"text": ready.recipe.calib, "windows": windows, "seqlen": seqlen}


def _files(ready: Prepared, writer: Writer, name: str, format: Format, *, seconds: float) -> dict[str, bytes]:
    """The small files of one result by name."""
    checkpoint = ready.weights.checkpoint
    config: dict[str, Any] = {key: value for key, value in checkpoint.config.items() if key not in ("torch_dtype", "dtype")}
    config["dtype"] = _LONG[ready.plan.dtype]
    if ready.plan.untied:
        config["tie_word_embeddings"] = False
    quantization = format.config(ready.plan)
    if quantization is not None:
        config["quantization_config"] = quantization
    sizes = sizes_of(writer.header(name), ready.skeleton.matrices(ready.plan.quantized), ready.plan.quantized)
    sizes.pop("linears")  # `inspect` reads them off the files
    plan = ready.plan.model_dump(mode="json")
    report = {
        "tool": TOOL,
        "version": VERSION,
        "format": name,
        "quant_method": None if quantization is None else quantization["quant_method"],
        "hub_model": checkpoint.source if checkpoint.from_hub else None,
        "recipe": ready.recipe.model_dump(mode="json"),
        "plan": plan,
        "kept": ready.kept,
        "experts_alone": name != "compressed-tensors" or read_alone(ready.plan),
        "notes": [*ready.notes, *(record["note"] for record in writer.done.values() if record["note"])],
        "calibration": _calibration(ready),
        "versions": {package: version(package) for package in _VERSIONS},
        "blocks": [writer.done[shard] for shard in sorted(writer.done)],
        "linears": len(ready.plan.linears),
        "quantized": len(ready.plan.quantized),
        "sizes": sizes,
        "search": ready.found,
        "rotations": rotations_of(ready.plan, ready.skeleton),
        "seconds": seconds,
        "evaluation": None,
        "tasks": {},
    }
    beside = {path.name: path.read_bytes() for path in checkpoint.companions()}
    return beside | {
        CONFIG: as_json(config),
        "plan.json": as_json(plan),
        REPORT: as_json(report),
        CARD: card(report).encode(),
    }
