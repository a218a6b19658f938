"""The README's tables are what the formats accept and what `make interop` found. `python tests/test_readme.py` rewrites it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bitlathe.errors import FormatError
from bitlathe.formats import FORMATS
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import KV_SCHEMES, PRESETS
from bitlathe.plan import LayerPlan, Plan
from bitlathe.readers import READERS
from bitlathe.registry import load

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(?<=<!-- table:schemes-formats -->\n).*?(?=<!-- /table)", re.DOTALL)
READ = re.compile(r"(?<=<!-- table:formats-readers -->\n).*?(?=<!-- /table)", re.DOTALL)
INTEROP = README.parent / "docs" / "interop.json"
INTEGER = re.compile(r"([WQ])(\d)(A16.*|_[01K])")
SHAPE = (256, 256)
LINEAR = "model.layers.0.mlp.down_proj"
R1 = Rotation(space="residual", block=256)
R2 = Rotation(space="value", block=32)
R4 = Rotation(space="mid", block=256, kind="hadamard")


def planned(scheme: str, *, online: Rotation | None = None) -> Plan:
    """One linear of a scheme."""
    preset = PRESETS[scheme]
    return Plan(linears={LINEAR: LayerPlan(weight=preset.weight, input=preset.input, online=online)})


# What a plan can hold beyond a scheme, by the options that ask for it.
BEYOND: dict[str, tuple[Rotation | None, dict[str, Any]]] = {
    "`--rotate R1,R2`": (None, {"rotations": (R1, R2)}),
    "`--rotate R4`": (R4, {"rotations": (R4,)}),
    "`--kv KV4`": (None, {"kv": KV_SCHEMES["KV4"]}),
}


def accepts(format: str, plan: Plan) -> bool:
    """Whether a format can hold a plan, in the dtype of its readers."""
    made = load(FORMATS[format])()
    dtype = made.dtype or "bf16"
    rows = {
        name: row.model_copy(update={"weight": row.weight and row.weight.served_in(dtype)})
        for name, row in plan.linears.items()
    }
    try:
        made.check(plan.model_copy(update={"linears": rows, "dtype": dtype}), dict.fromkeys(plan.linears, SHAPE), {})
    except FormatError:
        return False
    return True


def table() -> str:
    """The table in Markdown: integers in one row for all widths, each cell the widths that the format holds."""
    rows: dict[str, dict[str, list[str]]] = {}
    for scheme in PRESETS:
        integer = INTEGER.fullmatch(scheme)
        row, entry = (f"{integer[1]}*b*{integer[3]}", integer[2]) if integer else (scheme, "yes")
        cells = rows.setdefault(row, {format: [] for format in FORMATS})
        for format in FORMATS:
            if accepts(format, planned(scheme)):
                cells[format].append(entry)
    first = {format: next(scheme for scheme in PRESETS if accepts(format, planned(scheme))) for format in FORMATS}
    for option, (online, more) in BEYOND.items():
        plans = {format: planned(scheme, online=online).model_copy(update=more) for format, scheme in first.items()}
        rows[option] = {format: ["yes"] * accepts(format, plan) for format, plan in plans.items()}
    lines = [["scheme", *FORMATS], ["---"] * (1 + len(FORMATS))]
    lines += [[", ".join(names), *cells] for cells, names in _alike(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n*b*: the widths that are held.\n"


def _alike(rows: dict[str, dict[str, list[str]]]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Cells, and the rows that have them."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row, entries in rows.items():
        found.setdefault(tuple(" ".join(entry) or "no" for entry in entries.values()), []).append(row)
    return list(found.items())


def verified() -> list[dict[str, Any]]:
    """What `make interop` found, our own readings left out."""
    return [row for row in json.loads(INTEROP.read_bytes())["rows"] if row["reader"] != "bitlathe"]


def readers() -> str:
    """The table of formats and their readers in Markdown."""
    lines = [["format", "read by", "weights that differ", "KL divergence of logits, at most"], ["---"] * 4]
    for format in FORMATS:
        rows = [row for row in verified() if row["format"] == format]
        for name in dict.fromkeys(row["reader"] for row in rows):
            own = [row for row in rows if row["reader"] == name]
            apart = "not shown" if not any(row["linears"] for row in own) else "none"
            apart = "by one rounding" if any(row["unequal"] for row in own) else apart
            kl = [row["kl"] for row in own if row["kl"] is not None]
            lines.append(
                [format, f"{name} {own[0]['version']}", apart, f"{max(0.0, *kl, 0.0):.1g}" if kl else "runs no models"]
            )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_every_scheme_of_every_format_was_read_by_its_readers() -> None:
    """Where this fails a scheme, a format or a reader is new: run `make interop`."""
    found = {(row["format"], row["scheme"], row["reader"]) for row in verified()}
    wanted = {
        (format, scheme, name)
        for name, reader in READERS.items()
        if name not in ("bitlathe", "transformers with bitlathe.hf", "transformers")
        for format in reader.formats
        if format in FORMATS
        for scheme in PRESETS
        if accepts(format, planned(scheme))
    }
    assert wanted - found == set()
    assert {row["format"] for row in verified()} == set(FORMATS)
    assert all(row["same"] for row in verified())


def test_the_readers_are_those_that_were_asked() -> None:
    found = READ.search(README.read_text(encoding="utf-8"))
    assert found is not None and found[0] == readers()


def test_the_table_is_what_the_formats_accept() -> None:
    found = TABLE.search(README.read_text(encoding="utf-8"))
    assert found is not None and found[0] == table()


def test_the_readme_stays_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


if __name__ == "__main__":
    text = TABLE.sub(lambda _: table(), README.read_text(encoding="utf-8"))
    README.write_text(READ.sub(lambda _: readers(), text), encoding="utf-8")
