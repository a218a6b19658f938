"""What commands print: tables for people, on standard output."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from bitlathe.grid import allocation_grid, mixed
from bitlathe.io.sizes import human
from bitlathe.numerics.scheme import Preset, Scheme, described
from bitlathe.turns import Turn

# A matrix large enough that what is per tensor does not show in its average.
_TYPICAL = (4096, 4096)
# Linears kept for the same reason are told in one line; so many of their names are shown.
_SHOWN = 3
# Wider than any table here, in characters.
_UNBROKEN = 240

_FIGURES: dict[str, str] = {
    "perplexity": "perplexity",
    "perplexity_against": "perplexity of the original",
    "kl_mean": "KL divergence, mean (nats a token)",
    "kl_median": "KL divergence, median",
    "kl_99": "KL divergence, 99%",
    "kl_max": "KL divergence, largest",
    "top1_agreement": "top-1 agreement",
}


def show_summary(results: Sequence[Mapping[str, Any]], *, model: str, seconds: float) -> None:
    """The end of a run.

    results: what `bitlathe.inspect` returns for each format's folder, at least one. model: the original. seconds: what all
    runs that made them took together.
    """
    console = _console()
    first = results[0]
    console.print(
        f"{first['quantized']} of {len(first['linears'])} linears are quantized, which took {duration(seconds)} in all."
    )
    _print_kept(console, first)
    for result in results:
        console.print(
            f"{result['format']}: {human(result['bytes'])} in {result['model']}, {_bits(result['bits_quantized'])} bits a "
            f"quantized weight and {_bits(result['bits_linears'])} over all linears, as the file holds them",
            markup=False,
        )
    console.print(f"Load it:    import bitlathe; model = bitlathe.load({first['model']!r})", markup=False)
    measure = shlex.join(["bitlathe", "eval", first["model"], "--against", model])
    console.print(f"Measure it: {measure}", markup=False)


def show_evaluation(result: Mapping[str, Any]) -> None:
    """The figures of `bitlathe.evaluate`, each with its standard error."""
    against = f" against {result['against']}" if "against" in result else ""
    table = Table(
        "", *_right("value", "standard error"),
        title=f"{result['model']}{against}: {result['windows']} windows of {result['seqlen']} tokens of {result['text']}",
    )  # fmt: skip
    for name, words in _FIGURES.items():
        if name in result:
            table.add_row(words, *_figure(result[name]))
    _console().print(table)


def show_verified(result: Mapping[str, Any]) -> None:
    """What every reader made of a folder. result: what `bitlathe.verify` returns."""
    table = Table(
        "read by", "version", *_right("linears", "weights that differ", "by at most (roundings)", "KL divergence"), "",
        title=f"{result['folder']} ({result['format']}), weights against the codes of {result['codes']}",
    )  # fmt: skip
    for row in result["readers"]:
        if "error" in row:
            table.add_row(row["reader"], row["version"], "-", "-", "-", "-", "failed")
            continue
        apart = [f"{row['linears']:,}", f"{row['unequal']:,}", f"{row['largest']:.2g}"]
        kl = "-" if row["kl"] is None else f"{row['kl']:.2g}"
        table.add_row(row["reader"], row["version"], *apart, kl, "same" if row["same"] else "DIFFERENT")
    console = _console()
    console.print(table)
    for row in result["readers"]:
        if "error" in row:
            console.print(f"{row['reader']} failed: {row['error']}", markup=False)
    if result["missing"]:
        console.print(f"Not installed here, and not asked: {', '.join(result['missing'])}")


def show_tasks(tasks: Mapping[str, Any], *, folder: str) -> None:
    """What `measure_tasks` found for the model in a folder, beside the original where there is one. Nothing for no task."""
    if not tasks:
        return
    first = next(iter(tasks.values()))
    beside = ["original", "difference"] if first["against"] else []
    against = f" against {first['against']}" if beside else ""
    begin = first["begin_of_text"]
    table = Table(
        "task", "metric", *_right("examples", "documents", "value", *beside),
        title=f"{folder}{against}: tasks of lm-eval {first['lm_eval']}, each figure ± its standard error",
    )  # fmt: skip
    for name, task in tasks.items():
        shots = "-" if task["shots"] is None else str(task["shots"])
        for row in task["metrics"]:
            metric = row["name"] if row["filter"] == "none" else f"{row['name']} ({row['filter']})"
            figures = [" ± ".join(_figure(row[side])) for side in ("model", *beside)]
            table.add_row(name, metric, shots, f"{task['documents']} of {task['of']}", *figures)
    console = _console()
    console.print(table)
    where = "every text" if begin["everywhere"] else "a text without context, and no other"
    console.print(f"{begin['token']} begins {where}, as the tokenizer of {begin['tokenizer']} has it.", markup=False)


def show_inspection(result: Mapping[str, Any]) -> None:
    """Every linear of what `bitlathe.inspect` returns, then the averages."""
    inputs = ["activations"] if any(row["activations"] for row in result["linears"]) else []
    table = Table(
        "linear",
        "scheme",
        *inputs,
        *_right("shape", "bits", "bytes"),
        title=f"{result['model']} ({result['format']}, {result['dtype']})",
    )
    for row in result["linears"]:
        names = [row["name"], row["scheme"] or "kept", *(row[key] or "" for key in inputs)]
        table.add_row(*names, "x".join(map(str, row["shape"])), _bits(row["bits"]), f"{row['bytes']:,}")
    console = _console()
    console.print(table)
    schemes = {row["name"]: row["scheme"] for row in result["linears"]}
    if mixed(schemes):
        console.print(allocation_grid(schemes))
    _print_rotations(console, result)
    console.print(
        f"{human(result['bytes'])} in all. Average bits as the file holds them: {_bits(result['bits_quantized'])} of quantized "
        f"weights, {_bits(result['bits_linears'])} of all linears, {_bits(result['bits_checkpoint'])} of the whole checkpoint."
    )
    _print_kept(console, result)


def show_search(found: Mapping[str, Any], *, files: Sequence[Path]) -> None:
    """What a search chose for each budget, beside the uniform schemes, and where the plans are.

    found: {"model", "budgets": [{"asked", "bits", "bits_checkpoint", "kl", "error", "linears"}], "uniform": [{"scheme", "bits",
    "kl", "error"}]}.
    """
    table = Table(
        "", *_right("bits a weight", "of the whole checkpoint", "KL divergence", "standard error"),
        title=f"{found['model']}: schemes for each linear, measured on held-out text with weights rounded to nearest",
    )  # fmt: skip
    rows = [(row["scheme"] + " for all", row) for row in found["uniform"]]
    rows += [(f"{row['asked']:g} bits asked for", row) for row in found["budgets"]]
    for name, row in sorted(rows, key=lambda pair: (pair[1]["bits"], -pair[1]["kl"])):
        whole = _bits(row.get("bits_checkpoint"))
        table.add_row(name, _bits(row["bits"]), whole, *_figure({"value": row["kl"], "error": row["error"]}))
    console = _console()
    console.print(table)
    if len(found["budgets"]) == 1:
        console.print(allocation_grid(found["budgets"][0]["linears"]))
    for file in files:
        use = shlex.join(["bitlathe", "quantize", found["model"], "--plan", str(file), "--out", "DIR"])
        console.print(f"Use it: {use}", markup=False)


def show_schemes(presets: Mapping[str, Preset]) -> None:
    """Every scheme: its weights with the bits that one takes in a large matrix, and its activations."""
    table = Table(
        Column("scheme", no_wrap=True), "weights", "one scale for", *_right("bits a weight"), "activations",
        title="Case and - or _ do not matter; scales of activations that are not static are made as the model runs",
    )  # fmt: skip
    for name, preset in presets.items():
        weight, bits = preset.weight, preset.weight.bits(_TYPICAL) / (_TYPICAL[0] * _TYPICAL[1])
        codes = f"{weight.grid}{' asymmetric' if weight.asymmetric else ' and a minimum' if weight.minimum is not None else ''}"
        table.add_row(name, codes, _block(weight), f"{bits:.3f}", "" if preset.input is None else described(preset.input))
    _console().print(table)


def show_rotations(rotations: Mapping[str, Turn]) -> None:
    """Every rotation: what it turns, how it is applied, and what it is for."""
    table = Table(
        "rotation", "turns", "applied", "spreads outliers in", "kind", title="Add :random or :hadamard for the other kind"
    )
    for name, turn in rotations.items():
        table.add_row(name, turn.turns, turn.applied, turn.reader, turn.kind)
    _console().print(table)


def show_names(kind: str, names: Mapping[str, str]) -> None:
    """Names and what each means."""
    table = Table(kind, "") if any(names.values()) else Table(kind)
    for name, meaning in names.items():
        table.add_row(name, *([meaning] if meaning else []))
    _console().print(table)


def show_demo(result: Mapping[str, Any]) -> None:
    """Original and quantized model side by side. result: what `bitlathe.demo.demo` returns."""
    original, quantized, found = result["original"], result["quantized"], result["evaluation"]
    table = Table("", *_right("original", result["scheme"]), title="The bundled model, reloaded in a new process")
    table.add_row("size", human(original["bytes"]), human(quantized["bytes"]))
    table.add_row("perplexity", *(" ± ".join(_figure(found[name])) for name in ("perplexity_against", "perplexity")))
    table.add_row("KL divergence (nats a token)", "0", " ± ".join(_figure(found["kl_mean"])))
    table.add_row("top-1 agreement", "1", " ± ".join(_figure(found["top1_agreement"])))
    console = _console()
    console.print(table)
    show_verified(result["verified"])
    console.print(f"original:  {original['text']}", markup=False)
    console.print(f"quantized: {quantized['text']}", markup=False)


def duration(seconds: float) -> str:
    """7.25 as "7.3 s", 75 as "1 min 15 s", 7500 as "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    # A file or a pipe has no edge at which to break the lines of a table.
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=_UNBROKEN)


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def _figure(figure: Mapping[str, float | None]) -> tuple[str, str]:
    value, error = figure["value"], figure["error"]
    return "-" if value is None else f"{value:.5g}", "-" if error is None else f"{error:.2g}"


def _bits(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.3f}"


def _block(scheme: Scheme) -> str:
    rows, columns = scheme.block
    whole = {(0, 0): "the tensor", (1, 0): "a row"}
    return whole.get((rows, columns), f"{columns} inputs" if rows == 1 else f"{rows} x {columns} weights")


def _print_rotations(console: Console, result: Mapping[str, Any]) -> None:
    """What is turned, what of it runs at every token and costs, and what is unusual about the embeddings and the cache."""
    if result["rotations"]:
        table = Table(
            "rotation", "space", "kind", *_right("block", "seed"), "applied", *_right("linears", "operations", "bytes"),
            title="Rotations; operations and bytes are those of one token",
        )  # fmt: skip
        for row in result["rotations"]:
            cost = [f"{row['linears']:,}", f"{row['operations']:,}", human(row["bytes"])] if row["online"] else ["-"] * 3
            seed = str(row["seed"]) if row["kind"] == "random" else "-"
            applied = "online" if row["online"] else "folded"
            table.add_row(row["name"], row["space"], row["kind"], str(row["block"]), seed, applied, *cost)
        console.print(table)
        online = [row for row in result["rotations"] if row["online"]]
        operations, moved = (sum(row[key] for row in online) for key in ("operations", "bytes"))
        console.print(
            f"Online rotations cost {operations:,} operations and {human(moved)} a token."
            if online
            else "Every rotation is folded into weights and costs nothing."
        )
    if result["untied"]:
        console.print("The output head has a weight of its own; in the original it shares that of the embeddings.")
    if result["kv"] is not None:
        console.print(f"Cached keys and values: {result['kv']}", markup=False)


def _print_kept(console: Console, result: Mapping[str, Any]) -> None:
    """One line a reason, with a few of the linears it concerns."""
    reasons: dict[str, list[str]] = {}
    for row in result["linears"]:
        if row["scheme"] is None:
            reasons.setdefault(row["kept"], []).append(row["name"])
    for reason, names in reasons.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        console.print(f"Kept in 16 bits: {', '.join(names[:_SHOWN])}{more} ({reason})", markup=False)
