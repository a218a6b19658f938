"""The end of a run: what goes beside the shards, and where it all lands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitlathe.formats import CONFIG_KEYS
from bitlathe.formats.base import Format, Source
from bitlathe.formats.ct_experts import read_alone
from bitlathe.io.checkpoint import CONFIG, HUB_ID, Checkpoint
from bitlathe.io.files import places_of
from bitlathe.io.writer import REPORT, TOOL, Writer
from bitlathe.model.skeleton import Skeleton
from bitlathe.plan import Plan
from bitlathe.prepare import CODES, Prepared
from bitlathe.report import CARD, as_json, card, read_report, rotations_of, sizes_of
from bitlathe.version import VERSION

# The names of dtypes in config.json.
_LONG = {"bf16": "bfloat16", "fp16": "float16"}
PLAN = "plan.json"
_VERSIONS = ("torch", "transformers", "safetensors", "compressed-tensors")


def finish(ready: Prepared, writer: Writer, *, seconds: float) -> None:
    """Give every format its files and move everything to its place."""
    results: dict[str, tuple[Path | None, dict[str, bytes]]] = {CODES: (None, {})}
    for name, folder in places_of(ready.recipe.out, ready.recipe.formats).items():
        results[name] = (folder, _files(ready, writer, ready.formats[name], seconds=seconds))
    made = containers_of(ready.weights.checkpoint, ready.plan, ready.formats.values(), name=name_of_model(ready.recipe.model))
    writer.finish(results, made)


def plan_of_finished(ready: Prepared) -> Plan:
    """The plan of the result that is there already: with the signs that its run chose, where the recipe has some drawn."""
    (folder, *_) = places_of(ready.recipe.out, ready.recipe.formats).values()
    return Plan(**read_report(folder)["plan"])


def _calibration(ready: Prepared) -> dict[str, Any] | None:
    """The text that was really used; None where none was."""
    if ready.tokens is None:
        return None
    windows, seqlen = ready.tokens.shape
    return {"text": ready.recipe.calib, "windows": windows, "seqlen": seqlen}


def _files(ready: Prepared, writer: Writer, format: Format, *, seconds: float) -> dict[str, bytes]:
    """The small files of one result by name."""
    checkpoint = ready.weights.checkpoint
    said = {
        "hub_model": checkpoint.source if checkpoint.from_hub else None,
        "recipe": ready.recipe.model_dump(mode="json"),
        "kept": ready.kept,
        "notes": [*ready.notes, *(record["note"] for record in writer.done.values() if record["note"])],
        "calibration": _calibration(ready),
        "search": ready.found,
        "seconds": seconds,
        "evaluation": None,
    }
    return files_of(checkpoint, ready.skeleton, ready.plan, writer, format, said=said)


def _config(checkpoint: Checkpoint, plan: Plan, format: Format) -> dict[str, Any]:
    """The config.json of a result in a format. checkpoint: what it was made from, whose configuration it takes over."""
    left = ("torch_dtype", "dtype", "quantization_config", "quantization")
    config = {key: value for key, value in checkpoint.config.items() if key not in left}
    config["dtype"] = _LONG[plan.dtype]
    if plan.untied:
        config["tie_word_embeddings"] = False
    quantization = format.config(plan)
    keys = ("quantization_config", *CONFIG_KEYS.get(format.name, ()))
    return config if quantization is None else config | dict.fromkeys(keys, quantization)


def name_of_model(source: str) -> str:
    """A model's own name, of the folder or the Hub id that it was asked for by."""
    hub = None if Path(source).expanduser().is_dir() else HUB_ID.fullmatch(source)
    return Path(hub["repo"] if hub else source).expanduser().absolute().name


def containers_of(checkpoint: Checkpoint, plan: Plan, formats: Iterable[Format], *, name: str) -> dict[str, tuple[str, Any]]:
    """Format -> the one file that its shards become, and what writes it; for those that have one. See `Writer.finish`.

    name: the model's own.
    """
    return {
        format.name: (
            format.container.file,
            partial(format.container.write, source=Source(name, _config(checkpoint, plan, format), checkpoint.path, plan)),
        )
        for format in formats
        if format.container is not None
    }


def files_of(
    checkpoint: Checkpoint, skeleton: Skeleton, plan: Plan, writer: Writer, format: Format, *, said: Mapping[str, Any]
) -> dict[str, bytes]:
    """The small files of a result in one format, by name.

    checkpoint: what it was made from, whose configuration and tokenizer it takes over. said: what only whoever made it can say
    in report.json.
    """
    config = _config(checkpoint, plan, format)
    quantization = config.get("quantization_config")
    sizes = sizes_of(writer.header(format.name), skeleton.matrices(plan.quantized), plan.quantized)
    sizes.pop("linears")  # `inspect` reads them off the files
    dumped = plan.model_dump(mode="json")
    report = {
        "tool": TOOL,
        "version": VERSION,
        "format": format.name,
        "quant_method": None if quantization is None else quantization["quant_method"],
        **said,
        "plan": dumped,
        "experts_alone": format.name != "compressed-tensors" or read_alone(plan),
        "versions": {package: version(package) for package in _VERSIONS},
        "blocks": [writer.done[shard] for shard in sorted(writer.done)],
        "linears": len(plan.linears),
        "quantized": len(plan.quantized),
        "sizes": sizes,
        "rotations": rotations_of(plan, skeleton),
    }
    beside = {path.name: path.read_bytes() for path in checkpoint.companions()}
    return beside | {
        CONFIG: as_json(config),
        PLAN: as_json(dumped),
        REPORT: as_json(report),
        CARD: card(report).encode(),
    }
