"""The command line: parses, builds a Recipe, calls the public functions, and shows what they return.

Results go to standard output, everything else (progress, notes, errors) to standard error. Nothing here imports torch: what
does is fetched when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Argument, Exit, Option, Typer, echo
from typer.core import TyperGroup

import bitlathe
from bitlathe import tables
from bitlathe.arch import ARCHS
from bitlathe.errors import BitlatheError
from bitlathe.formats import FORMATS
from bitlathe.io.sizes import human
from bitlathe.numerics.scheme import KV_SCHEMES, PRESETS
from bitlathe.recipe import ROTATIONS, Memory, Recipe, merge, parse_overrides, parse_sets, read_yaml
from bitlathe.registry import load
from bitlathe.tune import TUNERS
from bitlathe.tune.options import RtnOptions, SignRoundOptions

_INTERRUPTED = 130  # 128 + SIGINT, as shells count

# What a command needs and `--help` does not; these import torch.
_LATE: dict[str, str] = {
    "display": "bitlathe.progress:Display",
    "report": "bitlathe.report:read_report",
    "record": "bitlathe.report:record_evaluation",
    "demo": "bitlathe.demo:demo",
}


class _Commands(TyperGroup):
    """The commands, with errors that a user can mend shown as one message instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BitlatheError as error:
            if ctx.params["traceback"]:
                raise
            Console(stderr=True).print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise Exit(2) from error
        except KeyboardInterrupt as error:
            if ctx.params["traceback"]:
                raise
            safe = " Finished blocks are safe: the same command continues after the last of them."
            words = f"Interrupted.{safe if ctx.invoked_subcommand == 'quantize' else ''}"
            Console(stderr=True).print(words, style="red", highlight=False, soft_wrap=True)
            raise Exit(_INTERRUPTED) from error


app = Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


class Listing(StrEnum):
    """What `bitlathe list` can list."""

    SCHEMES = "schemes"
    FORMATS = "formats"
    TUNERS = "tuners"
    ROTATIONS = "rotations"
    MODELS = "models"


def _default(field: str) -> str:
    value = Recipe.model_fields[field].default
    if value in (None, ()):
        return "none"
    return ",".join(value) if isinstance(value, tuple) else str(value)


_SETTABLE = ", ".join(
    [
        f"memory.activations={human(Memory().activations)} (bytes)",
        *(f"rtn.{name}={value}" for name, value in RtnOptions()),
        *(f"signround.{name}={'1/iters' if value is None else value}" for name, value in SignRoundOptions()),
    ]
)

_Json = Annotated[
    bool, Option("--json", show_default="off", help="Print one JSON object on standard output and nothing else there.")
]


def _version(wanted: bool) -> None:  # noqa: FBT001 the signature of an option's callback
    if wanted:
        echo(f"bitlathe {bitlathe.__version__}")
        raise Exit


@app.callback()
def bitlathe_command(
    *,
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, show_default="off", help="Print the version and stop.")
    ] = False,
    traceback: Annotated[
        bool, Option("--traceback", show_default="off", help="Show where in the program an error arose.")
    ] = False,
) -> None:
    """Turn a language model into a few bits, and measure how far the result is from the original."""


@app.command()
def quantize(
    model: Annotated[
        str | None, Argument(metavar="MODEL", help="Folder, Hub id, or 'builtin'; may stand in the recipe instead.")
    ] = None,
    *,
    scheme: Annotated[
        str | None,
        Option(metavar="NAME", show_default=_default("scheme"), help="What every linear gets; see 'bitlathe list schemes'."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            show_default="required",
            help="Folder of the result; with several formats one folder inside it per format.",
        ),
    ] = None,
    formats: Annotated[
        str | None,
        Option("--format", metavar="NAME[,NAME]", show_default=_default("formats"), help="Checkpoints to write, by commas."),
    ] = None,
    tuner: Annotated[
        str | None, Option(metavar="|".join(TUNERS), show_default=_default("tuner"), help="How codes are found.")
    ] = None,
    iters: Annotated[int | None, Option(metavar="N", show_default=_default("iters"), help="Tuning steps a block.")] = None,
    calib: Annotated[
        str | None,
        Option(metavar="NAME|FILE|builtin", show_default=_default("calib"), help="Calibration text: Hub data set or file."),
    ] = None,
    samples: Annotated[
        int | None, Option(metavar="N", show_default=_default("samples"), help="Calibration windows (sequences).")
    ] = None,
    seqlen: Annotated[
        int | None, Option(metavar="TOKENS", show_default=_default("seqlen"), help="Length of a window, in tokens.")
    ] = None,
    batch_size: Annotated[
        int | None, Option(metavar="N", show_default=_default("batch_size"), help="Sequences a tuning step.")
    ] = None,
    override: Annotated[
        list[str] | None,
        Option(metavar="GLOB=SCHEME|keep", show_default="none", help="For linears that match; repeatable, the last wins."),
    ] = None,
    rotate: Annotated[
        list[str] | None,
        Option(
            metavar="R1,R2,R4|hadamard",
            show_default=_default("rotate"),
            help="Spread outliers: R1 and R2 (hadamard is both) fold into weights, R4 runs online; see 'bitlathe list "
            "rotations'. Repeatable.",
        ),
    ] = None,
    rotation_block: Annotated[
        int | None,
        Option(
            metavar="N",
            show_default="whole spaces; of R4 the largest power of two in it",
            help="Rotate N channels at a time; 32 for MXFP4.",
        ),
    ] = None,
    rotation_seed: Annotated[
        int | None, Option(metavar="N", show_default=_default("rotation_seed"), help="Of the random signs in rotations.")
    ] = None,
    rotation_trials: Annotated[
        int | None,
        Option(
            metavar="K",
            show_default=_default("rotation_trials"),
            help="Draw K sign vectors and keep the one with the least activation error.",
        ),
    ] = None,
    act_asymmetric: Annotated[
        bool | None,
        Option("--act-asym/--act-sym", show_default="symmetric", help="Integer activations with a zero point, or without."),
    ] = None,
    act_clip: Annotated[
        float | None,
        Option(
            metavar="RATIO",
            show_default=_default("act_clip"),
            help="Part of the range of activations that is kept; what lies beyond is cut off.",
        ),
    ] = None,
    kv: Annotated[
        str | None,
        Option(
            metavar="|".join(KV_SCHEMES),
            show_default=_default("kv"),
            help="Round cached keys and values to 8 or 4 bits; R3 helps at 4.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, Option(metavar="FILE.yaml", show_default="none", help="Fields from a file; options win over it.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", show_default=_SETTABLE, help="Any recipe field; repeatable, wins over all."),
    ] = None,
    device: Annotated[
        str | None, Option(metavar="auto|cpu|cuda[:i]", show_default=_default("device"), help="Where to compute.")
    ] = None,
    dtype: Annotated[
        str | None,
        Option(metavar="auto|bf16|fp16", show_default=_default("dtype"), help="Of what stays in 16 bits; auto: the model's."),
    ] = None,
    seed: Annotated[int | None, Option(metavar="N", show_default=_default("seed"), help="Of every random choice.")] = None,
    restart: Annotated[
        bool, Option("--restart", show_default="off", help="Throw away what an earlier run left in --out, finished or not.")
    ] = False,
) -> None:
    """Quantize MODEL into a folder. Stopped at any moment, the same command continues."""
    options = {
        "model": model,
        "scheme": scheme,
        "out": out,
        "formats": formats,
        "tuner": tuner,
        "iters": iters,
        "calib": calib,
        "samples": samples,
        "seqlen": seqlen,
        "batch_size": batch_size,
        "overrides": parse_overrides(override or ()),
        "rotate": ",".join(rotate) if rotate else None,
        "rotation_block": rotation_block,
        "rotation_seed": rotation_seed,
        "rotation_trials": rotation_trials,
        "act_asymmetric": act_asymmetric,
        "act_clip": act_clip,
        "kv": kv,
        "device": device,
        "dtype": dtype,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    asked = merge(read_yaml(recipe) if recipe else {}, given, parse_sets(sets or ()))
    fields = asked.model_dump()
    with load(_LATE["display"])() as listen:
        bitlathe.quantize(fields.pop("model"), **fields, restart=restart, listen=listen)
    folders = [asked.out / name for name in asked.formats] if len(asked.formats) > 1 else [asked.out]
    # Not this call's own time: the result may be the work of several, or have been there before.
    seconds = load(_LATE["report"])(folders[0])["seconds"]
    tables.show_summary([bitlathe.inspect(folder) for folder in folders], model=asked.model, seconds=seconds)


@app.command("eval")
def eval_command(
    folder: Annotated[str, Argument(metavar="DIR", help="Checkpoint to measure: quantized or original, folder or Hub id.")],
    *,
    against: Annotated[
        str | None, Option(metavar="MODEL", show_default="none: perplexity alone", help="Original to compare with.")
    ] = None,
    text: Annotated[
        str, Option(metavar="NAME|FILE|builtin", help="Text: Hub data set or file, never the calibration's.")
    ] = "builtin",
    seqlen: Annotated[int, Option(metavar="TOKENS", help="Length of a window, in tokens.")] = 2048,
    windows: Annotated[
        int | None, Option(metavar="N", show_default="all", help="Windows to measure, from the text's beginning.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Perplexity, and with --against the KL divergence and top-1 agreement, each with its standard error."""
    result = bitlathe.evaluate(folder, against=against, text=text, seqlen=seqlen, windows=windows)
    if load(_LATE["record"])(folder, result):
        Console(stderr=True).print(f"Recorded in {folder}/report.json.", highlight=False, soft_wrap=True)
    if as_json:
        echo(json.dumps(result))
    else:
        tables.show_evaluation(result)


@app.command("inspect")
def inspect_command(
    folder: Annotated[str, Argument(metavar="DIR", help="Checkpoint to look at.")], *, as_json: _Json = False
) -> None:
    """Every linear: scheme, shape, bits, bytes; then averages, and what was kept and why."""
    result = bitlathe.inspect(folder)
    if as_json:
        echo(json.dumps(result))
    else:
        tables.show_inspection(result)


@app.command("list")
def list_command(what: Annotated[Listing, Argument(help="What to list.")]) -> None:
    """The names that are understood."""
    if what is Listing.SCHEMES:
        tables.show_schemes(PRESETS)
    elif what is Listing.ROTATIONS:
        tables.show_rotations(ROTATIONS)
    elif what is Listing.MODELS:
        tables.show_names("model_type", dict.fromkeys(ARCHS, ""))
    else:
        registry = FORMATS if what is Listing.FORMATS else TUNERS
        tables.show_names(what.value.removesuffix("s"), {name: _first_line(target) for name, target in registry.items()})


@app.command()
def demo(
    out: Annotated[
        Path | None, Option(metavar="DIR", show_default="a temporary folder, removed", help="Where to keep the result.")
    ] = None,
) -> None:
    """Quantize the bundled model to W4A16, reload it in a new process, and compare it with the original."""
    with load(_LATE["display"])() as listen:
        result = load(_LATE["demo"])(out, listen=listen)
    tables.show_demo(result)


def _first_line(target: str) -> str:
    """The first line of the documentation of what a registry names."""
    return (load(target).__doc__ or "").partition("\n")[0]


def main() -> None:
    """The console script."""
    app()
