"""The options that commands share: each is said once, with its help and the default that it shows."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from bitlathe.autoscheme.options import SearchOptions
from bitlathe.errors import RecipeError
from bitlathe.io.sizes import human
from bitlathe.numerics.scheme import KV_SCHEMES
from bitlathe.plan_file import refuse_both
from bitlathe.recipe import Memory, Recipe, merge, parse_overrides, parse_sets, read_yaml
from bitlathe.registry import load
from bitlathe.tune.options import ClosedFormOptions, RtnOptions, SignRoundOptions


def default(field: str) -> str:
    """The default of a field of the recipe, as help shows it."""
    value = Recipe.model_fields[field].default
    if value in (None, ()):
        return "none"
    return ",".join(value) if isinstance(value, tuple) else str(value)


_SETTABLE = ", ".join(
    [
        f"memory.activations={human(Memory().activations)} (bytes)",
        *(f"search.{name}={value}" for name, value in SearchOptions()),
        *(f"closed_form.{name}={value}" for name, value in ClosedFormOptions()),
        *(f"rtn.{name}={value}" for name, value in RtnOptions()),
        *(f"signround.{name}={'1/iters' if value is None else value}" for name, value in SignRoundOptions()),
    ]
)

_MOST = 1000  # budgets in a range
# Imports lm-eval, which is the extra `tasks`.
_ASKED_FOR = "bitlathe.evaluation.tasks:asked_for"
# Options that may be repeated, and the fields of the recipe they go to.
_FIELDS = {"override": "overrides", "group": "groups"}

Model = Annotated[str | None, Argument(metavar="MODEL", help="Folder, Hub id, or 'builtin'; may stand in the recipe instead.")]
Named = Annotated[str | None, Option("--model", metavar="MODEL", show_default="none", help="MODEL, said as an option.")]
Schemes = Annotated[
    str | None,
    Option(
        "--schemes",
        "--options",
        metavar="NAME,NAME",
        show_default="some that suit the bits and the format",
        help="What a search chooses from, for every linear; 'keep' is 16 bits. See 'bitlathe list schemes'.",
    ),
]
Include = Annotated[
    list[str] | None,
    Option(
        metavar="NAME[,NAME]",
        show_default="none",
        help="What joins the search though it is kept otherwise: lm_head, embed_tokens. Repeatable.",
    ),
]
Group = Annotated[
    list[str] | None,
    Option(
        metavar="GLOB,GLOB",
        show_default="what engines run as one: q, k, v; gate, up; the experts of a block",
        help="Linears to give one scheme; repeatable.",
    ),
]
Scores = Annotated[
    Path | None,
    Option(metavar="DIR", show_default="the user's cache", help="Where a search keeps what it finds out, to use it again."),
]
Formats = Annotated[
    str | None,
    Option("--format", metavar="NAME[,NAME]", show_default=default("formats"), help="Checkpoints to write, by commas."),
]
Calib = Annotated[
    str | None,
    Option(
        "--calib",
        "--dataset",
        metavar="NAME|FILE|builtin",
        show_default=default("calib"),
        help="Calibration text: Hub data set or file.",
    ),
]
Samples = Annotated[
    int | None,
    Option("--samples", "--nsamples", metavar="N", show_default=default("samples"), help="Calibration windows (sequences)."),
]
Seqlen = Annotated[int | None, Option(metavar="TOKENS", show_default=default("seqlen"), help="Length of a window, in tokens.")]
BatchSize = Annotated[int | None, Option(metavar="N", show_default=default("batch_size"), help="Sequences a step.")]
Override = Annotated[
    list[str] | None,
    Option(metavar="GLOB=SCHEME|keep", show_default="none", help="For linears that match; repeatable, the last wins."),
]
Rotate = Annotated[
    list[str] | None,
    Option(
        "--rotate",
        "--rotation-type",
        metavar="R1,R2,R4|hadamard",
        show_default=default("rotate"),
        help="Spread outliers: R1 and R2 (hadamard is both) fold into weights, R4 runs online; see 'bitlathe list "
        "rotations'. Repeatable.",
    ),
]
RotationBlock = Annotated[
    int | None,
    Option(
        metavar="N",
        show_default="whole spaces; of R4 the largest power of two in it",
        help="Rotate N channels at a time; 32 for MXFP4.",
    ),
]
RotationSeed = Annotated[
    int | None, Option(metavar="N", show_default=default("rotation_seed"), help="Of the random signs in rotations.")
]
RotationTrials = Annotated[
    int | None,
    Option(
        metavar="K",
        show_default=default("rotation_trials"),
        help="Draw K sign vectors and keep the one with the least activation error.",
    ),
]
Smooth = Annotated[
    bool | None,
    Option(
        "--smooth/--no-smooth",
        show_default="smooth, where text is read",
        help="Share the ranges of channels between activations and weights where that loses less; folded into weights.",
    ),
]
ActAsymmetric = Annotated[
    bool | None,
    Option("--act-asym/--act-sym", show_default="symmetric", help="Integer activations with a zero point, or without."),
]
ActClip = Annotated[
    float | None,
    Option(
        metavar="RATIO",
        show_default=default("act_clip"),
        help="Part of the range of activations that is kept; what lies beyond is cut off.",
    ),
]
Kv = Annotated[
    str | None,
    Option(
        metavar="|".join(KV_SCHEMES),
        show_default=default("kv"),
        help="Round cached keys and values to 8 or 4 bits; R3 helps at 4.",
    ),
]
RecipeFile = Annotated[
    Path | None, Option(metavar="FILE.yaml", show_default="none", help="Fields from a file; options win over it.")
]
Sets = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", show_default=_SETTABLE, help="Any recipe field; repeatable, wins over all."),
]
Device = Annotated[str | None, Option(metavar="auto|cpu|cuda[:i]", show_default=default("device"), help="Where to compute.")]
Dtype = Annotated[
    str | None,
    Option(metavar="auto|bf16|fp16", show_default=default("dtype"), help="Of what stays in 16 bits; auto: the model's."),
]
Seed = Annotated[int | None, Option(metavar="N", show_default=default("seed"), help="Of every random choice.")]
Tasks = Annotated[
    str | None,
    Option(
        metavar="NAME,NAME|DIR",
        show_default="none",
        help="Measure tasks of lm-eval too, or all in a folder of task files: on the result and on the original.",
    ),
]
Limit = Annotated[int | None, Option(min=1, metavar="N", show_default="all", help="Documents a task, from its first.")]
Shots = Annotated[
    int | None,
    Option("--num-fewshot", min=0, metavar="K", show_default="what each task says", help="Examples in a task's prompts."),
]
Restart = Annotated[
    bool, Option("--restart", show_default="off", help="Throw away what an earlier run left in --out, finished or not.")
]
Json = Annotated[
    bool, Option("--json", show_default="off", help="Print one JSON object on standard output and nothing else there.")
]


def one_model(model: str | None, named: str | None) -> str | None:
    """The model, in its own place or after --model. Raises RecipeError where both name one."""
    if model is not None and named is not None:
        raise RecipeError(f"the model is given twice, as {model!r} and as --model {named!r}: leave one of the two out")
    return named if model is None else model


def tasks_asked(tasks: str | None, limit: int | None, shots: int | None) -> Any:
    """The tasks to measure, looked up before any work starts; None for none. Raises RecipeError for an unknown one."""
    if tasks is None:
        if limit is not None or shots is not None:
            raise RecipeError(
                "--limit and --num-fewshot say how tasks are measured, and no task is named: add --tasks, or leave out"
            )
        return None
    if find_spec("lm_eval") is None:
        raise RecipeError("--tasks needs lm-eval, which is not installed: pip install 'bitlathe[tasks]', or leave --tasks out")
    return load(_ASKED_FOR)(tasks, limit=limit, shots=shots)


def asked(
    options: Mapping[str, Any], recipe: Path | None, sets: list[str] | None, planned: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe that the options of a command ask for: its file, then what a plan says, then options, then --set.

    options: the command's parameters as typed, None where nothing was; those that are no fields of a recipe do not count.
    """
    named = {_FIELDS.get(name, name): value for name, value in options.items()}
    given = {name: value for name, value in named.items() if name in Recipe.model_fields and value not in (None, [])}
    if "overrides" in given:
        given["overrides"] = parse_overrides(given["overrides"])
    for name in ("rotate", "include"):
        if name in given:
            given[name] = ",".join(given[name])
    layers = [read_yaml(recipe) if recipe else {}, given, parse_sets(sets or ())]
    if planned:
        refuse_both(planned, {name: value for layer in layers for name, value in layer.items()})
    return merge(layers[0], planned or {}, *layers[1:])


def budgets_of(texts: list[str] | None) -> list[float]:
    """["3.5,4", "5:6:0.5"] as [3.5, 4, 5, 5.5, 6]. Raises RecipeError for what is no number and no LOW:HIGH:STEP."""
    found: list[float] = []
    for part in ",".join(texts or ()).split(","):
        try:
            ends = [float(number) for number in part.split(":")]
            spaced = len(ends) == 3 and ends[0] <= ends[1] <= ends[0] + _MOST * ends[2]
            if not all(map(isfinite, ends)) or not (len(ends) == 1 or (spaced and ends[2] > 0)):
                raise ValueError(part)
        except ValueError as error:
            raise RecipeError(
                f"--bits {part!r} is no number of bits a weight. Give one such as 4.5, several with commas, or a range such as "
                "3:6:0.5"
            ) from error
        low, high, step = ends if len(ends) == 3 else (ends[0], ends[0], 1.0)
        # Half a step beyond the end is what adding steps up may be off.
        found += [
            low + index * step for index in range(int((high - low) / step + 0.5) + 1) if low + index * step <= high + 1e-9
        ]
    return list(dict.fromkeys(found))
