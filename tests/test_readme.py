"""The README's table of schemes and formats is what the formats accept. `python tests/test_readme.py` rewrites it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bitlathe.errors import FormatError
from bitlathe.formats import FORMATS
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import KV_SCHEMES, PRESETS
from bitlathe.plan import LayerPlan, Plan
from bitlathe.registry import load

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(?<=<!-- table:schemes-formats -->\n).*?(?=<!-- /table)", re.DOTALL)
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


def _alike(rows: dict[str, dict[str, list[str]]]) -> list[tuple[list[str], list[str]]]:
    """Cells, and the rows that follow each other with the same."""
    found: list[tuple[list[str], list[str]]] = []
    for row, entries in rows.items():
        cells = [" ".join(entry) or "no" for entry in entries.values()]
        if found and found[-1][0] == cells:
            found[-1][1].append(row)
        else:
            found.append((cells, [row]))
    return found


def test_the_table_is_what_the_formats_accept() -> None:
    found = TABLE.search(README.read_text(encoding="utf-8"))
    assert found is not None and found[0] == table()


def test_the_readme_stays_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: table(), README.read_text(encoding="utf-8")), encoding="utf-8")
