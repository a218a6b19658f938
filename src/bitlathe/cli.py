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
from bitlathe import options, tables
from bitlathe.arch import ARCHS
from bitlathe.errors import BitlatheError, RecipeError
from bitlathe.formats import FORMATS
from bitlathe.io.files import places_of
from bitlathe.numerics.scheme import PRESETS
from bitlathe.plan_file import read_plan, refuse_files, write_plan
from bitlathe.plotting import refuse_plot
from bitlathe.recipe import formats_named
from bitlathe.registry import load
from bitlathe.tune import TUNERS
from bitlathe.turns import ROTATIONS

_INTERRUPTED = 130  # 128 + SIGINT, as shells count

# What a command needs and `--help` does not; these import torch.
_LATE: dict[str, str] = {
    "sweep": "bitlathe.searching:sweep",
    "plot": "bitlathe.plot:draw",
    "display": "bitlathe.progress:Display",
    "report": "bitlathe.report:read_report",
    "record": "bitlathe.report:record_evaluation",
    "note": "bitlathe.report:record",
    "demo": "bitlathe.demo:demo",
    "tasks": "bitlathe.evaluation.tasks:measure_tasks",
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
            words = f"Interrupted.{safe if ctx.invoked_subcommand in ('quantize', 'search') else ''}"
            Console(stderr=True).print(words, style="red", highlight=False, soft_wrap=True)
            raise Exit(_INTERRUPTED) from error


app = Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        # --batch_size is --batch-size, as people know it from other tools.
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)


class Listing(StrEnum):
    """What `bitlathe list` can list."""

    SCHEMES = "schemes"
    FORMATS = "formats"
    TUNERS = "tuners"
    ROTATIONS = "rotations"
    MODELS = "models"


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
    model: options.Model = None,
    *,
    scheme: Annotated[
        str | None,
        Option(
            metavar="NAME",
            show_default=options.default("scheme"),
            help="What every linear gets; see 'bitlathe list schemes'.",
        ),
    ] = None,
    bits: Annotated[
        float | None,
        Option(
            "--bits",
            "--target-bits",
            metavar="N",
            show_default="none: one scheme for all",
            help="Average bits a weight, such as 4.5, never exceeded: a search chooses what every linear gets.",
        ),
    ] = None,
    schemes: options.Schemes = None,
    include: options.Include = None,
    group: options.Group = None,
    plan: Annotated[
        Path | None,
        Option(metavar="FILE.yaml", show_default="none", help="What every linear gets, as 'bitlathe search --out' wrote it."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            "--out",
            "--output-dir",
            metavar="DIR",
            show_default="required",
            help="Folder of the result; with several formats one folder inside it per format.",
        ),
    ] = None,
    formats: options.Formats = None,
    tuner: Annotated[
        str | None, Option(metavar="|".join(TUNERS), show_default=options.default("tuner"), help="How codes are found.")
    ] = None,
    effort: Annotated[
        str | None,
        Option(
            metavar="fast|normal|best",
            show_default=options.default("effort"),
            help="Of closed-form. fast: searched rounding alone. best: scales tuned on the whole model at the end.",
        ),
    ] = None,
    iters: Annotated[
        int | None, Option(metavar="N", show_default=options.default("iters"), help="Steps a block of signround.")
    ] = None,
    enable_alg_ext: Annotated[
        bool,
        Option(
            "--enable-alg-ext", show_default="off", help="signround starts from searched ranges (signround.start=searched)."
        ),
    ] = False,
    calib: options.Calib = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    batch_size: options.BatchSize = None,
    override: options.Override = None,
    rotate: options.Rotate = None,
    rotation_block: options.RotationBlock = None,
    rotation_seed: options.RotationSeed = None,
    rotation_trials: options.RotationTrials = None,
    smooth: options.Smooth = None,
    act_asymmetric: options.ActAsymmetric = None,
    act_clip: options.ActClip = None,
    kv: options.Kv = None,
    recipe: options.RecipeFile = None,
    sets: options.Sets = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = None,
    scores: options.Scores = None,
    named: options.Named = None,
    tasks: options.Tasks = None,
    limit: options.Limit = None,
    shots: options.Shots = None,
    verify: Annotated[
        bool, Option("--verify", show_default="off", help="At the end, open the result as 'bitlathe verify' does.")
    ] = False,
    restart: options.Restart = False,
) -> None:
    """Quantize MODEL into a folder. Stopped at any moment, the same command continues."""
    given = locals().copy()  # before anything else has a name
    given["model"] = options.one_model(model, named)
    measured = options.tasks_asked(tasks, limit, shots)
    if enable_alg_ext:
        given["signround"] = {"start": "searched"}
    asked = options.asked(given, recipe, sets, read_plan(plan) if plan else None)
    if enable_alg_ext and asked.tuner != "signround":
        raise RecipeError(f"--enable-alg-ext is an option of the tuner signround, and the tuner is {asked.tuner}: leave it out")
    fields = asked.model_dump(exclude_unset=True)
    with load(_LATE["display"])() as listen:
        bitlathe.quantize(fields.pop("model"), **fields, restart=restart, listen=listen)
    folders = list(places_of(asked.out, asked.formats).values())
    # Not this call's own time: the result may be the work of several, or have been there before.
    seconds = load(_LATE["report"])(folders[0])["seconds"]
    tables.show_summary([bitlathe.inspect(folder) for folder in folders], model=asked.model, seconds=seconds)
    for folder in folders if verify else ():
        verify_command(str(folder))
    if measured is not None:
        answers = load(_LATE["tasks"])(folders, measured, against=asked.model, device=asked.device)
        for folder, found in zip(folders, answers, strict=True):
            load(_LATE["record"])(folder, {"tasks": found})
            tables.show_tasks(found, folder=str(folder))


@app.command()
def search(
    model: options.Model = None,
    *,
    bits: Annotated[
        list[str] | None,
        Option(
            "--bits",
            "--target-bits",
            metavar="N[,N]|LOW:HIGH:STEP",
            show_default="required",
            help="Average bits a weight; several are answered from one scoring. Repeatable.",
        ),
    ] = None,
    schemes: options.Schemes = None,
    out: Annotated[
        Path | None,
        Option(
            metavar="FILE.yaml",
            show_default="none: the plan is only shown",
            help="Write the plan, to read, to edit, and for 'quantize --plan'; of several each, with its bits in the name.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        Option(
            metavar="FILE.png|.svg|.html", show_default="none", help="Draw bits against KL divergence, and the allocations."
        ),
    ] = None,
    include: options.Include = None,
    group: options.Group = None,
    override: options.Override = None,
    formats: options.Formats = None,
    calib: options.Calib = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    batch_size: options.BatchSize = None,
    rotate: options.Rotate = None,
    rotation_block: options.RotationBlock = None,
    rotation_seed: options.RotationSeed = None,
    rotation_trials: options.RotationTrials = None,
    act_asymmetric: options.ActAsymmetric = None,
    act_clip: options.ActClip = None,
    kv: options.Kv = None,
    recipe: options.RecipeFile = None,
    sets: options.Sets = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = None,
    scores: options.Scores = None,
    named: options.Named = None,
    as_json: options.Json = False,
) -> None:
    """Find which linear of MODEL gets which scheme for an average of N bits a weight. Nothing is quantized."""
    given = locals().copy()  # before anything else has a name
    given["model"] = options.one_model(model, named)
    budgets = options.budgets_of(bits) if bits else []
    given |= {"bits": budgets[0] if bits else None, "out": "."}  # a plan has no folder to go to
    asked = options.asked(given, recipe, sets)
    if asked.bits is None or (bits and asked.bits != budgets[0]):
        raise RecipeError(
            "--bits is what a search is for: give it once or several times, such as --bits 4.5, and not by --set too"
        )
    budgets = budgets or [asked.bits]
    files = refuse_files(out, budgets)
    if plot is not None:
        refuse_plot(plot)
    with load(_LATE["display"])() as listen:
        found = load(_LATE["sweep"])(asked, budgets, listen)
    for file, plan, record in zip(files, found.plans, found.records, strict=False):
        write_plan(file, plan, record["told"])
    drawn = {"model": asked.model, "budgets": list(found.records), "uniform": list(found.uniform)}
    if plot is not None:
        load(_LATE["plot"])(drawn, plot)
    if as_json:
        echo(json.dumps(drawn))
    else:
        tables.show_search(drawn, files=files)


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
    tasks: options.Tasks = None,
    limit: options.Limit = None,
    shots: options.Shots = None,
    as_json: options.Json = False,
) -> None:
    """Perplexity, and with --against the KL divergence and top-1 agreement; then --tasks. Each with its standard error."""
    measured = options.tasks_asked(tasks, limit, shots)
    result = bitlathe.evaluate(folder, against=against, text=text, seqlen=seqlen, windows=windows)
    recorded = load(_LATE["record"])(folder, result)
    if measured is not None:
        result |= {"tasks": load(_LATE["tasks"])([folder], measured, against=against)[0]}
        recorded |= load(_LATE["record"])(folder, result)
    _tell_recorded(folder, recorded)
    if as_json:
        echo(json.dumps(result))
    else:
        tables.show_evaluation(result)
        tables.show_tasks(result.get("tasks", {}), folder=folder)


@app.command("convert")
def convert_command(
    folder: Annotated[str, Argument(metavar="DIR", help="Quantized checkpoint, of bitlathe or another program.")],
    *,
    formats: options.Formats = None,
    out: Annotated[
        Path | None,
        Option(
            metavar="DIR", show_default="required", help="Folder of the result; with several formats one inside it per format."
        ),
    ] = None,
    restart: options.Restart = False,
) -> None:
    """Write a quantized checkpoint in another format, code for code: nothing is rounded, nothing is measured anew."""
    if out is None:
        raise RecipeError("--out is missing: give the folder of the result, such as --out converted")
    names = formats_named(formats or options.default("formats"))
    with load(_LATE["display"])() as listen:
        bitlathe.convert(folder, out=out, formats=names, restart=restart, listen=listen)
    folders = list(places_of(out, names).values())
    seconds = load(_LATE["report"])(folders[0])["seconds"]
    tables.show_summary([bitlathe.inspect(each) for each in folders], model="MODEL", seconds=seconds)


@app.command("verify")
def verify_command(
    folder: Annotated[str, Argument(metavar="DIR", help="Quantized checkpoint to open.")],
    *,
    native: Annotated[
        Path | None,
        Option(metavar="DIR", show_default="the one beside DIR, if any", help="Native folder whose codes the weights must be."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Open DIR in new processes, with our reader and the format's own, and compare weights and logits."""
    result = bitlathe.verify(folder, native=native)
    _tell_recorded(folder, load(_LATE["note"])(folder, {"verified": result}))
    if as_json:
        echo(json.dumps(result))
    else:
        tables.show_verified(result)
    if not result["same"]:
        raise Exit(1)


@app.command("inspect")
def inspect_command(
    folder: Annotated[str, Argument(metavar="DIR", help="Checkpoint to look at.")], *, as_json: options.Json = False
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


def _tell_recorded(folder: str, recorded: bool) -> None:  # noqa: FBT001 what a function that records gave
    if recorded:
        Console(stderr=True).print(f"Recorded in {folder}/report.json.", highlight=False, soft_wrap=True)


def _first_line(target: str) -> str:
    """The first line of the documentation of what a registry names."""
    return (load(target).__doc__ or "").partition("\n")[0]


def main() -> None:
    """The console script."""
    app()
