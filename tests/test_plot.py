"""What people look at: the picture of a search, and the grid of its allocation."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bitlathe.errors import OutputError, RecipeError
from bitlathe.grid import allocation_grid, mixed, places_of
from bitlathe.plot import draw
from bitlathe.plotting import refuse_plot

LINEARS = {f"model.layers.{block}.self_attn.{name}_proj": "W3A16" if block else "W8A16" for block in range(4) for name in "qo"}
FOUND: dict[str, Any] = {
    "model": "tiny <model>",
    "budgets": [
        {"asked": 3.5, "bits": 3.498, "kl": 0.0123, "error": 0.001, "linears": {**LINEARS, "lm_head": "keep"}},
        {"asked": 6.0, "bits": 5.9, "kl": 0.0, "error": None, "linears": dict.fromkeys(LINEARS, "W6A16")},
    ],
    "uniform": [
        {"scheme": "W3A16", "bits": 3.125, "kl": 0.05, "error": 0.002},
        {"scheme": "W6A16", "bits": 6.125, "kl": 0.002, "error": None},
    ],
}
EXPERTS = {
    f"model.layers.{block}.mlp.experts.{expert}.{name}_proj": "W4A16"
    for block in range(2)
    for expert in range(8)
    for name in "ud"
}


def printed(linears: dict[str, str | None]) -> str:
    shown = StringIO()
    Console(width=120, file=shown).print(allocation_grid(linears))
    return shown.getvalue()


def test_a_png_is_one(tmp_path: Path) -> None:
    draw(FOUND, tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG\r\n")


def test_an_svg_says_everything_as_text(tmp_path: Path) -> None:
    draw(FOUND, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    for words in ("W3A16", "W6A16", "W8A16", "keep", "3.5 bits asked for, 3.498 taken", "self_attn.q_proj", "lm_head", "mixes"):
        assert words in text, words
    assert "tiny &lt;model&gt;" in text


def test_a_page_stands_alone_and_has_the_numbers(tmp_path: Path) -> None:
    draw(FOUND, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<td>3.5 asked for</td><td>3.498</td><td>0.0123</td><td>0.001</td>" in page
    assert "<td>W6A16 for all</td><td>6.125</td><td>0.002</td><td>-</td>" in page
    assert "<td>model.layers.0.self_attn.q_proj</td><td>W8A16</td>" in page
    assert "<script" not in page and "tiny &lt;model&gt;" in page
    # The names of what svg is made of are no addresses.
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


@pytest.mark.parametrize("ending", ["png", "svg", "html"])
def test_equal_data_give_equal_files_and_nothing_else(tmp_path: Path, ending: str) -> None:
    for name in ("a", "b"):
        draw(FOUND, tmp_path / f"{name}.{ending}")
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_experts_and_many_blocks_are_drawn(tmp_path: Path) -> None:
    deep = {f"model.layers.{block}.mlp.down_proj": "W4A16" for block in range(90)}
    draw({**FOUND, "budgets": [{**FOUND["budgets"][0], "linears": linears} for linears in (EXPERTS, deep)]}, tmp_path / "a.svg")
    assert "mlp.experts.*.u_proj" in (tmp_path / "a.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [("a.pdf", RecipeError, "one of .png, .svg, .html"), ("a", RecipeError, "''"), ("none/a.png", OutputError, "is not there")],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        refuse_plot(tmp_path / name)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_plot(tmp_path / "a.png")
    monkeypatch.setattr("bitlathe.plotting.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=re.escape("pip install 'bitlathe[plot]'")):
        refuse_plot(tmp_path / "a.png")


def test_a_grid_has_a_row_for_blocks_that_are_the_same() -> None:
    shown = printed({**LINEARS, "lm_head": None})
    assert "each ending in A16" in " ".join(shown.split())
    rows = [re.findall(r"[\w-]+", line) for line in shown.splitlines() if re.match(r"│\s*\d", line)]
    assert rows == [["0", "W8", "W8"], ["1-3", "W3", "W3"]]
    assert "lm_head keep" in shown


def test_all_experts_of_a_block_are_one_column() -> None:
    blocks, outside = places_of(EXPERTS)
    assert blocks == {block: {f"mlp.experts.*.{name}_proj": "W4A16" for name in "ud"} for block in (0, 1)}
    assert outside == {}
    split = {**EXPERTS, "model.layers.1.mlp.experts.3.u_proj": None}
    assert places_of(split)[0][1]["mlp.experts.*.u_proj"] == "W4A16/keep"


@pytest.mark.parametrize(
    ("linears", "expected"),
    [
        ({**LINEARS}, True),
        ({**dict.fromkeys(LINEARS, "W4A16"), "lm_head": None}, False),
        ({**dict.fromkeys(LINEARS, "W4A16"), "model.layers.2.self_attn.q_proj": None}, True),
        (dict.fromkeys(LINEARS, None), False),
        ({**dict.fromkeys(LINEARS, "W4A16"), **{f"model.layers.{block}.mlp.gate": None for block in range(4)}}, False),
    ],
    ids=["two", "a kept head", "one kept", "none", "routers"],
)
def test_what_a_mix_is(linears: dict[str, str | None], expected: bool) -> None:  # noqa: FBT001
    assert mixed(linears) is expected
