"""The README's table of schemes and formats is what the formats accept. `python tests/test_readme.py` rewrites it."""

from __future__ import annotations

import re
from pathlib import Path

from bitlathe.errors import FormatError
from bitlathe.formats import FORMATS
from bitlathe.numerics.scheme import SCHEMES
from bitlathe.plan import LayerPlan, Plan
from bitlathe.registry import load

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(?<=<!-- table:schemes-formats -->\n).*?(?=<!-- /table)", re.DOTALL)
INTEGER = re.compile(r"W(\d)(A16.*)")
SHAPE = (256, 256)


def accepts(format: str, scheme: str) -> bool:
    """Whether a format can hold a linear of a scheme."""
    plan = Plan(linears={"model.layers.0.mlp.up_proj": LayerPlan(weight=SCHEMES[scheme])})
    try:
        load(FORMATS[format])().check(plan, dict.fromkeys(plan.linears, SHAPE), {})
    except FormatError:
        return False
    return True


def table() -> str:
    """The table in Markdown: integers in one row for all widths, each cell the widths that the format holds."""
    rows: dict[str, dict[str, list[str]]] = {}
    for scheme in SCHEMES:
        integer = INTEGER.fullmatch(scheme)
        row, entry = (f"W*b*{integer[2]}", integer[1]) if integer else (scheme, "yes")
        cells = rows.setdefault(row, {format: [] for format in FORMATS})
        for format in FORMATS:
            if accepts(format, scheme):
                cells[format].append(entry)
    lines = [["scheme", *FORMATS], ["---"] * (1 + len(FORMATS))]
    lines += [[row, *(" ".join(entries) or "no" for entries in cells.values())] for row, cells in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n*b*: the widths that are held.\n"


def test_the_table_is_what_the_formats_accept() -> None:
    found = TABLE.search(README.read_text(encoding="utf-8"))
    assert found is not None and found[0] == table()


def test_the_readme_stays_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: table(), README.read_text(encoding="utf-8")), encoding="utf-8")
