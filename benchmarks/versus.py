"""Our quantizers against others' on the same model, the same calibration tokens and the same evaluator:

    python -m benchmarks.versus --model small --calib calib.txt --text eval.txt

The other tools run in environments of their own, which are made on the first run, each quantization in a process of its own.
Tools take turns, seed after seed; a seed chooses the windows of the calibration text, and is every tool's own seed. Figures are
medians over seeds. Ratios are to auto-round: of KL divergences, and of peak memory. "passes" is seconds over those of one float
forward pass of the calibration text through the model. For activations with outliers make a model by benchmarks.outliers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.others.job import Job
from benchmarks.others.judge import judged
from benchmarks.others.tools import FORWARD, OTHERS, OURS, ROOT, Tool, ToolFailed, done, python_of
from bitlathe.errors import BitlatheError
from bitlathe.io.checkpoint import find_folder
from bitlathe.io.sizes import human
from bitlathe.model.calib import characters_for, text_of, tokenizer_of, windows_of
from bitlathe.model.source import device_named
from bitlathe.recipe import parse_sets
from bitlathe.registry import did_you_mean
from bitlathe.tune import TUNERS

# What is compared -> fields of our recipe that belong to it. W4A4 is rotated, by every tool.
SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {},
    "W3A16": {},
    "W2A16G32": {},
    "MXFP4": {},
    "NVFP4": {},
    "W4A4": {"rotate": "R1,R2,R4"},
}
REFERENCE = "auto-round"
PASS = "float forward pass"
HEADER = "| scheme | tool | bits | KL mean | KL 99% | perplexity | top-1 | seconds | passes | peak memory | above imports |"


@dataclass(frozen=True)
class Settings:
    """What all tools share. samples, seqlen: calibration windows, and tokens of one, there and in the evaluation. steps, batch:
    of tuners that take steps. fields: more of our recipe, for our tools. record: a file that keeps what was measured, from
    which a run that is started again goes on."""

    model: str
    calib: str
    text: str
    device: str
    samples: int
    seqlen: int
    windows: int
    steps: int
    batch: int
    fields: Mapping[str, Any]
    environments: Path
    record: Path | None


def tool_named(name: str) -> tuple[Tool, dict[str, Any]]:
    """The tool, and what our recipe says for it. name: another program, or tuner or tuner:effort of ours. Raises ValueError."""
    if name in OTHERS:
        return OTHERS[name], {}
    tuner, colon, effort = name.partition(":")
    if tuner not in TUNERS:
        known = (*OTHERS, *TUNERS)
        raise ValueError(f"the tool {name!r} is not known.{did_you_mean(tuner, known)} Known: {', '.join(known)}")
    return OURS, {"tuner": tuner, **({"effort": effort} if colon else {})}


def measure(settings: Settings, scheme: str, name: str, seed: int) -> dict[str, Any]:
    """What one tool makes of a scheme, or of none for PASS, with one seed: its figures, or {"error": why there are none}."""
    tool, fields = (FORWARD, {}) if name == PASS else tool_named(name)
    if tool.schemes is not None and scheme not in tool.schemes:
        return {"error": "not done by it here"}
    with tempfile.TemporaryDirectory(prefix="bitlathe-versus-") as folder:
        tokens = f"{folder}/tokens"
        windows = windows_for(settings, seed)
        save_file(windows, tokens)
        said = {**SCHEMES[scheme], **fields, **settings.fields} if tool is OURS else {}
        job = Job(
            model=settings.model,
            out=f"{folder}/out",
            scheme=scheme,
            tokens=tokens,
            calib=settings.calib,
            seed=seed,
            steps=settings.steps,
            batch=settings.batch,
            device=settings.device,
            fields=said,
        )
        try:
            found = done(tool, python_of(tool, settings.environments), job)
            spent = {key: getattr(found, key) for key in ("version", "seconds", "peak", "imports", "vram")}
            if tool is FORWARD:
                return spent
            figures = judged(
                found, settings.model, scheme, text=settings.text, windows=windows["evaluation"], device=settings.device
            )
        except (ToolFailed, BitlatheError) as error:
            return {"error": str(error)}
        return spent | figures


def windows_for(settings: Settings, seed: int) -> dict[str, torch.Tensor]:
    """Calibration windows as `bitlathe.quantize` chooses them by the seed, evaluation windows as `bitlathe.evaluate` does."""
    tokenizer = tokenizer_of(Path(settings.model))
    found = {}
    for which, source, count, chosen in (
        ("calibration", settings.calib, settings.samples, seed),
        ("evaluation", settings.text, settings.windows, None),
    ):
        documents = text_of(source, which, characters=characters_for(count, settings.seqlen))
        found[which] = windows_of(tokenizer, documents, seqlen=settings.seqlen, count=count, seed=chosen)
    return found


def compared(settings: Settings, scheme: str, tools: Iterable[str], seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Name -> what was found with each seed; the tools take turns."""
    names = (PASS, *tools)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            found[name].append(_recorded(settings, scheme, name, seed))
    return found


def _recorded(settings: Settings, scheme: str, name: str, seed: int) -> dict[str, Any]:
    """The same as `measure`; what the file holds already is not measured again, and what is found is put into it."""
    if settings.record is None:
        return measure(settings, scheme, name, seed)
    told = {key: str(value) for key, value in vars(settings).items() if key not in ("record", "environments")}
    key = {"scheme": scheme, "tool": name, "seed": seed, **told}
    lines = settings.record.read_text(encoding="utf-8").splitlines() if settings.record.exists() else []
    for line in map(json.loads, lines):
        if line["asked"] == key and "error" not in line["found"]:
            return line["found"]
    found = measure(settings, scheme, name, seed)
    with settings.record.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"asked": key, "found": found}) + "\n")
    return found


def rows(scheme: str, found: Mapping[str, list[dict[str, Any]]], *, on_gpu: bool) -> Iterator[str]:
    """The lines of a table: medians over the seeds in which a tool did its job."""
    middle = {name: _middle(results) for name, results in found.items()}
    against, forward = middle.get(REFERENCE), middle[PASS]
    for name, results in found.items():
        figures = middle[name]
        if figures is None:
            yield f"| {scheme} | {name} | {results[0]['error'].replace('|', '/')} |"
            continue
        passes = "" if forward is None else f"{figures['seconds'] / forward['seconds']:.1f}"
        cells = ["", "", "", "", ""]
        ratios = ["", ""]
        if name != PASS:
            cells = [f"{figures[key]:{width}}" for key, width in _WIDTHS.items()]
            ratios = ["" if against is None else f"{figures[key] / against[key]:.3f}" for key in ("kl", "peak")]
        memory = [human(int(figures["peak"])), human(int(figures["peak"] - figures["imports"]))]
        if on_gpu:
            memory.append(human(int(figures["vram"])))
            ratios.append("" if against is None or name == PASS else f"{figures['vram'] / against['vram']:.3f}")
        every = [scheme, name, *cells, f"{figures['seconds']:.1f}", passes, *memory, *ratios]
        yield f"| {' | '.join(every)} |"


_WIDTHS = {"bits": ".3f", "kl": ".5f", "kl_99": ".4f", "perplexity": ".3f", "top1": ".4f"}


def header(*, on_gpu: bool) -> list[str]:
    """The first two lines of the table."""
    more = " GPU memory | KL ratio | memory ratio | GPU ratio |" if on_gpu else " KL ratio | memory ratio |"
    line = HEADER + more
    return [line, "|" + "---|" * (line.count("|") - 1)]


def _middle(results: list[dict[str, Any]]) -> dict[str, float] | None:
    """Medians of every figure; None where no seed has any."""
    good = [result for result in results if "error" not in result]
    names = [name for name in good[0] if name != "version"] if good else []
    return {name: median(result[name] for result in good) for name in names} if good else None


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--model", default="builtin", help="folder or Hub id (default: the bundled model)")
    parser.add_argument("--calib", default="builtin", help="calibration text (default: the bundled one)")
    parser.add_argument("--text", default="builtin", help="evaluation text (default: the bundled one)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help=f"with commas (default: {','.join(SCHEMES)})")
    parser.add_argument("--tools", default=",".join(OTHERS), help=f"other programs, with commas (default: {','.join(OTHERS)})")
    parser.add_argument("--tuners", default="closed-form:fast,closed-form,signround", help="ours, as tuner or tuner:effort")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="FIELD=VALUE", help="more of our recipe")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds the medians are over (default: 3)")
    parser.add_argument("--steps", type=int, default=200, help="of tuners that take steps (default: 200)")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, and at a time (default: 8)")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows (default: 128)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows (default: 64)")
    parser.add_argument("--environments", type=Path, default=ROOT / ".versus", help="where the tools' environments are kept")
    parser.add_argument("--record", type=Path, help="a file of what was measured, from which a later run goes on")
    given = parser.parse_args(arguments)
    given.tools = [name for name in (given.tools + "," + given.tuners).split(",") if name]
    given.schemes = given.schemes.split(",")
    try:
        for name in given.tools:
            tool_named(name)
        given.fields = parse_sets(given.sets)
        given.device = device_named(given.device).type
        # The tools run in another folder.
        given.model = str(find_folder(given.model).resolve())
        given.calib, given.text = (
            str(Path(name).resolve()) if Path(name).is_file() else name for name in (given.calib, given.text)
        )
        strange = [name for name in given.schemes if name not in SCHEMES]
        if strange:
            raise ValueError(f"the scheme {strange[0]!r} is not compared. Known: {', '.join(SCHEMES)}")
    except (ValueError, BitlatheError) as error:
        parser.error(str(error))
    return given


def main() -> None:
    """Print the tables asked for, a scheme at a time."""
    given = parsed()
    settings = Settings(**{key: getattr(given, key) for key in Settings.__dataclass_fields__})
    on_gpu = given.device == "cuda"
    place = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{given.samples} windows of {given.seqlen} tokens, {given.seeds} seeds, {given.steps} steps of {given.batch}; "
        f"evaluation on {given.windows} windows; torch {torch.__version__}, {place}\n"
    )
    print("\n".join(header(on_gpu=on_gpu)), flush=True)
    for scheme in given.schemes:
        for line in rows(scheme, compared(settings, scheme, given.tools, given.seeds), on_gpu=on_gpu):
            print(line, flush=True)


if __name__ == "__main__":
    main()
