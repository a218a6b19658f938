"""convert: a quantized folder in another format, code for code.

Codes are decoded from the one and encoded in the other, and everything else is copied. Nothing is rounded, so what was measured
of the one holds for the other. A checkpoint that another program made is read the same way; its folder does not say how it was
made, and neither does the result's report.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitlathe.errors import CheckpointError
from bitlathe.formats import FORMATS
from bitlathe.formats.base import Format
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.io.files import places_of
from bitlathe.io.writer import Writer, refuse_foreign
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.source import open_model
from bitlathe.model.weights import Weights
from bitlathe.pipeline import encoded
from bitlathe.plan import Plan
from bitlathe.prepare import bytes_written, notes_of_files, notes_on, refuse_nested, refuse_unheld
from bitlathe.recipe import formats_named
from bitlathe.registry import load
from bitlathe.report import BlockReport, Listener, Note, own_report, peak_memory
from bitlathe.result import containers_of, files_of, name_of_model
from bitlathe.version import VERSION

# Why a linear is in 16 bits, where the folder does not say it.
_KEPT = "the folder that was converted keeps it"


@dataclass(frozen=True)
class _Conversion:
    """A conversion that has been found possible.

    source: the format of the folder. report: that of the folder, empty where another program made it.
    """

    weights: Weights
    source: Format
    skeleton: Skeleton
    plan: Plan
    formats: dict[str, Format]
    report: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The model's own, where the folder's report knows it."""
        source = self.report.get("hub_model") or (self.report.get("recipe") or {}).get("model")
        return name_of_model(source or self.weights.checkpoint.source)

    def bytes_needed(self) -> int:
        """What the result will take on the disk, without headers and small files."""
        coded = {f"{name}.weight" for name in self.plan.quantized}
        header = self.weights.checkpoint.header
        kept = sum(header[name].nbytes for name in self.skeleton.shapes if name not in coded)
        return bytes_written(self.plan, self.skeleton, list(self.formats.values()), kept=kept)

    def said(self, seconds: float) -> dict[str, Any]:
        """What only this conversion can say in a report; of how the codes were made, what the folder's own says."""
        checkpoint, earlier = self.weights.checkpoint, self.report
        kept = {name: _KEPT for name in self.plan.linears if name not in self.plan.quantized}
        return {
            "hub_model": earlier.get("hub_model") or (checkpoint.source if checkpoint.from_hub else None),
            "recipe": earlier.get("recipe"),
            "kept": earlier.get("kept", kept),
            "notes": list(dict.fromkeys((*earlier.get("notes", ()), *self.notes))),
            "calibration": earlier.get("calibration"),
            "search": earlier.get("search"),
            "seconds": seconds,
            "evaluation": earlier.get("evaluation"),
            "converted": {"folder": str(checkpoint.path), "format": self.source.name},
        }


def convert(
    folder: str | Path,
    *,
    out: Path | str,
    formats: str | Sequence[str] = "native",
    restart: bool = False,
    listen: Listener | None = None,
) -> Plan:
    """Write a quantized folder in other formats into `out`, code for code, and return its plan.

    folder: a quantized checkpoint of any format that is read here, of this program or of another one; a folder or a Hub id.
    formats: names, one or several; with several one folder inside of `out` for each. restart, listen: as for `quantize`.
    Raises CheckpointError for a folder without codes, and FormatError where a format cannot hold the plan; both before any
    weight is read.
    """
    tell, out = listen or (lambda event: None), Path(out).expanduser()
    asked = _prepare(str(folder), out, formats)
    for note in asked.notes:
        tell(Note(note))
    began = time.perf_counter()
    with Writer(
        out,
        streams=tuple(asked.formats),
        shards=asked.skeleton.depth + 1,
        fingerprint={"convert": asked.weights.checkpoint.fingerprint(), "version": f"bitlathe {VERSION}"},
        room=asked.bytes_needed(),
        restart=restart,
    ) as writer:
        if writer.finished:
            tell(Note(f"{out} already holds this very result: nothing was done"))
            return asked.plan
        for index in range(writer.shards):
            if index not in writer.done:
                tell(_shard(asked, writer, index, began=began))
        said = asked.said(time.perf_counter() - began)
        checkpoint, skeleton, plan = asked.weights.checkpoint, asked.skeleton, asked.plan
        results = {
            name: (place, files_of(checkpoint, skeleton, plan, writer, asked.formats[name], said=said))
            for name, place in places_of(out, list(asked.formats)).items()
        }
        writer.finish(results, containers_of(checkpoint, plan, asked.formats.values(), name=asked.name))
    return asked.plan


def _prepare(folder: str, out: Path, formats: str | Sequence[str]) -> _Conversion:
    """All that can be refused is refused here."""
    made: dict[str, Format] = {name: load(FORMATS[name])() for name in formats_named(formats)}
    if Path(folder).expanduser().is_dir():
        refuse_nested(out, Path(folder).expanduser())
    refuse_foreign(out)
    checkpoint = Checkpoint(folder)
    skeleton, weights = open_model(checkpoint, device=torch.device("cpu"))
    report = own_report(checkpoint.path)
    if weights.plan is None or weights.format is None or report.get("format") == "dense":
        what = "holds dequantized weights and no codes" if report.get("format") == "dense" else "is not quantized"
        raise CheckpointError(
            f"{checkpoint.path} {what}, so there is nothing to convert: quantize the original, with --format for what you want"
        )
    plan = Plan(**report["plan"]) if report else weights.plan
    refuse_unheld(plan, skeleton, made.values(), checkpoint)
    notes = (*notes_on(plan, skeleton.arch, made), *notes_of_files(made.values(), checkpoint))
    return _Conversion(weights, weights.format, skeleton, plan, made, report, notes)


def _shard(asked: _Conversion, writer: Writer, index: int, *, began: float) -> BlockReport:
    """One shard: its codes from the one format into the others, and what is kept as it is."""
    started, skeleton, weights = time.perf_counter(), asked.skeleton, asked.weights
    names, coded = skeleton.shard(index), {f"{name}.weight": name for name in asked.plan.quantized}
    kept = weights.checkpoint.read(name for name in names if name not in coded)
    layers = {coded[name]: weights.layer(coded[name]) for name in names if name in coded}
    ram, vram = peak_memory(weights.device)
    now = time.perf_counter()
    report = BlockReport(
        block=index,
        blocks=skeleton.depth,
        name=skeleton.blocks[index] if index < skeleton.depth else "head",
        linears=len(layers),
        loss_before=None,
        loss_after=None,
        seconds=now - started,
        peak_ram=ram,
        peak_vram=vram,
        elapsed=now - began,
    )
    streams = {name: kept | encoded(format, layers, asked.plan) for name, format in asked.formats.items()}
    writer.put(index, streams, report.model_dump())
    return report
