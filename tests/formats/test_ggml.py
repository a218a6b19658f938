"""The block layouts of ggml against the dequantization of its own Python package, bit for bit."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as theirs

from bitlathe.formats.ggml import BYTES, NAMES, decode, encode, width_of
from bitlathe.numerics.project import Learned, dequantize, quantize, search
from bitlathe.numerics.scheme import SCHEMES
from format_samples import facts, weight


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_that_ggml_reads(name: str, searched: bool) -> None:  # noqa: FBT001 a parameter of pytest's
    scheme = SCHEMES[name]
    w = torch.cat([weight(8, 512), weight(8, 512).abs(), -weight(8, 512).abs()])
    learned = search(w, scheme) if searched else Learned(low=torch.rand(scheme.blocks((24, 512))) if scheme.unsigned else None)
    q = quantize(w, scheme, learned)
    data = encode(q)
    assert (data.dtype, tuple(data.shape)) == (torch.uint8, (24, width_of(scheme, 512)))
    read = torch.from_numpy(theirs(data.numpy(), GGMLQuantizationType[name]))
    assert torch.equal(read, dequantize(q, torch.float32))
    assert facts(decode(data, scheme, (24, 512))) == facts(q)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_as_many_as_bits(name: str) -> None:
    assert 8 * width_of(SCHEMES[name], 1024) == SCHEMES[name].bits((1, 1024))
    assert BYTES[name] == width_of(SCHEMES[name], SCHEMES[name].whole)


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_come_back(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 120, (4, width_of(SCHEMES[name], 512)), generator=generator).to(torch.uint8)
    assert torch.equal(encode(decode(data, SCHEMES[name], (4, 512))), data)
