"""Packing is a bijection, laid out as documented."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlathe.numerics.bits import pack, unpack


@settings(deadline=None, max_examples=150)
@given(bits=st.integers(1, 8), rows=st.integers(0, 4), columns=st.integers(0, 70), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(unpack(packed, bits, columns=columns), codes)


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(1, 8), codes=st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_a_row_is_one_little_endian_number(bits: int, codes: list[int]) -> None:
    codes = [code % (1 << bits) for code in codes]
    number = sum(code << (index * bits) for index, code in enumerate(codes))
    expected = number.to_bytes(-(-len(codes) * bits // 8), "little")
    assert bytes(pack(torch.tensor([codes], dtype=torch.uint8), bits)[0].tolist()) == expected


def test_literal_bytes() -> None:
    assert pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]
    assert pack(torch.tensor([[7, 0, 5, 1]], dtype=torch.uint8), 3).tolist() == [[0b01000111, 0b0011]]


def test_codes_too_wide_and_streams_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match="code 8 does not fit in 3 bits"):
        pack(torch.tensor([[8]], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="take 4 bytes a row, not 3"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), 4, columns=8)
