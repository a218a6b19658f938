"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from bitlathe.errors import RecipeError
from bitlathe.io.sizes import human, parse_size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1288490189, "1.2 GiB"),
        (5 * 1024**5, "5120.0 TiB"),
    ],
)
def test_human(nbytes: int, text: str) -> None:
    assert human(nbytes) == text


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4GiB", 4 * 1024**3),
        ("500MB", 500 * 1000**2),
        ("1.5 gib", 3 * 1024**3 // 2),
        ("4G", 4 * 1024**3),
        ("0.1KB", 100),
        (" 12 ", 12),
        ("12B", 12),
        (4096, 4096),
        ("9007199254740993", 9007199254740993),  # more digits than a float has
    ],
)
def test_parse_size(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4 GiBit", "4,5GiB", "four", "1e9", -4])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(RecipeError, match="is not a size"):
        parse_size(text)
