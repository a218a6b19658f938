"""What people look at: the picture of a search, and the grid of its allocation."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.axes import Axes
from rich.console import Console

from bitlathe.errors import OutputError, RecipeError
from bitlathe.grid import allocation_grid, bits_of, labels_of, mixed, places_of
from bitlathe.plot import draw, figure_of
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
    for words in (
        "W3A16",
        "W6A16",
        "W8A16",
        "keep",
        "3.5 bits asked for, 3.498 taken: KL 0.0123 ± 0.001",
        "6 bits asked for, 5.900 taken: KL 0<",
    ):
        assert words in text, words
    for words in (">q_proj<", ">o_proj<", ">lm_head<", ">block<", "one scheme for all", ">3<"):
        assert words in text, words
    assert "tiny &lt;model&gt;" in text


def test_a_page_stands_alone_and_has_the_numbers(tmp_path: Path) -> None:
    draw(FOUND, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<td>3.5 asked for</td><td>3.498</td><td>0.0123</td><td>0.001</td>" in page
    assert "<td>W6A16 for all</td><td>6.125</td><td>0.002</td><td>-</td>" in page
    assert "<tr><th>block</th><th>q_proj</th><th>o_proj</th></tr>" in page
    assert "<tr><td>0</td><td>W8A16</td><td>W8A16</td></tr>" in page
    assert "<tr><td>1-3</td><td>W3A16</td><td>W3A16</td></tr>" in page
    assert "<p>lm_head: keep</p>" in page
    assert "<script" not in page and "tiny &lt;model&gt;" in page
    # Nothing is drawn in a colour that only a light page can have behind it.
    assert "currentColor" in page and "#ffffff" not in page and "#1b1e23" not in page
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
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text.count(">experts.u_proj<") == 1 and ">down_proj<" in text and ">80<" in text


def test_names_of_schemes_cover_nothing() -> None:
    near = [
        {"scheme": scheme, "bits": 4.5 + place / 50, "kl": 0.01 + place / 2000, "error": 0.0005}
        for place, scheme in enumerate(("W4A16", "W4A16G32", "MXFP4A16", "NVFP4A16", "W4A16_ASYM"))
    ]
    figure = figure_of({**FOUND, "uniform": near})
    ax = next(ax for ax in figure.findobj(Axes) if ax.get_yscale() == "log")
    boxes = [note.get_window_extent() for note in ax.texts if note.get_text()]
    assert len(boxes) == len(near)
    assert all(box.count_overlaps(boxes[place + 1 :]) == 0 for place, box in enumerate(boxes))
    points = ax.transData.transform([(row["bits"], row["kl"]) for row in near])
    assert all(box.count_contains(points) == 0 for box in boxes)


def test_a_scheme_without_divergence_is_drawn_and_said_to_be(tmp_path: Path) -> None:
    kept = {"scheme": "keep", "bits": 16.0, "kl": 0.0, "error": None}
    draw({**FOUND, "uniform": [*FOUND["uniform"], kept]}, tmp_path / "a.svg")
    assert ">keep (0)<" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_the_user_s_settings_change_nothing_and_stay(tmp_path: Path) -> None:
    draw(FOUND, tmp_path / "a.svg")
    with matplotlib.rc_context({"font.size": 30, "lines.color": "red"}):
        draw(FOUND, tmp_path / "b.svg")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


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
    assert "A16 is left out of every name" in " ".join(shown.split())
    rows = [line.split() for line in shown.splitlines() if re.match(r"\s*\d", line)]
    assert rows == [["0", "W8", "W8"], ["1-3", "W3", "W3"]]
    assert "lm_head keep" in shown


def test_a_grid_of_seven_linears_fits_whatever_its_schemes() -> None:
    names = ("W4A16_CHANNEL_ASYM", "W3A16_CHANNEL_ASYM", "W8A8_STATIC")
    inner = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    shown = printed({f"model.layers.{b}.{name}": names[(b + n) % 3] for b in range(3) for n, name in enumerate(inner)})
    assert "_CH is _CHANNEL; _AS is _ASYM" in shown
    rows = [line.split() for line in shown.splitlines() if re.match(r"\s*\d", line)]
    assert rows[0] == ["0", *["W4A16_CH_AS", "W3A16_CH_AS", "W8A8_STATIC"] * 2, "W4A16_CH_AS"]
    assert len(rows) == 3 and "…" not in shown


def test_what_schemes_share_is_left_out_wherever_it_stands() -> None:
    shown = printed({"model.layers.0.a": "W4A16", "model.layers.0.b": "W2A16G32", "model.layers.1.a": "W8A16"})
    rows = [line.split() for line in shown.splitlines() if re.match(r"\s*\d", line)]
    assert rows == [["0", "W4", "W2G32"], ["1", "W8"]]
    assert "left out" not in printed({"model.layers.0.a": "W4A16", "model.layers.0.b": "FP8_BLOCK"})


def test_names_in_little_room_are_told_apart() -> None:
    dense, experts, shared = "mlp.up_proj", "mlp.experts.*.up_proj", "mlp.shared_expert.up_proj"
    labels = labels_of([dense, experts, shared, "self_attn.q_proj"])
    assert labels == {
        dense: "mlp.up_proj",
        experts: "experts.up_proj",
        shared: "shared_expert.up_proj",
        "self_attn.q_proj": "q_proj",
    }
    assert labels_of([dense]) == {dense: "up_proj"}


def test_schemes_of_experts_that_differ_lie_between_them() -> None:
    assert bits_of("W4A16") < bits_of("W4A16/W8A16") < bits_of("W8A16") < bits_of("keep") == 16


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
