"""Codes as a dense stream of bits, and back: bijections, nothing is rounded here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_BYTE = 8  # bits; codes whose width divides it never straddle two bytes, and are shifted as bytes
_RUN = 8  # codes that fill a whole number of bytes, whatever their width; they and their bytes fit one int64


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (uint8 [rows, columns], each below 2^bits, bits 1..8) to bytes, uint8 [rows, ceil(columns * bits / 8)].

    Each row is a stream of its own: code j takes bits j * bits and up, lowest first, of the bytes read as one little-endian
    number; what is left of the last byte is zero. Raises ValueError for a code that is too wide.
    """
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"the code {int(codes.max())} does not fit in {bits} bits")
    rows, columns = codes.shape
    if _BYTE % bits == 0:
        share = _BYTE // bits  # codes of one byte
        parts = F.pad(codes, (0, -columns % share)).view(rows, -(-columns // share), share)
        packed = parts[..., 0].clone()
        for index in range(1, share):
            packed |= parts[..., index] << (index * bits)
        return packed
    count = -(-columns // _RUN)
    runs = F.pad(codes, (0, count * _RUN - columns)).view(rows, count, _RUN)
    words = torch.zeros(rows, count, dtype=torch.int64, device=codes.device)
    for index in range(_RUN):
        words |= runs[..., index].to(torch.int64) << (index * bits)
    stream = words.unsqueeze(-1).view(torch.uint8)[..., :bits].reshape(rows, count * bits)
    return stream[:, : (columns * bits + 7) // 8].contiguous()


def unpack(packed: Tensor, bits: int, *, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, ceil(columns * bits / 8)] to codes, uint8 [rows, columns].

    Raises ValueError for a stream of another length.
    """
    rows, width = packed.shape
    if width != (columns * bits + 7) // 8:
        raise ValueError(f"{columns} codes of {bits} bits take {(columns * bits + 7) // 8} bytes a row, not {width}")
    if _BYTE % bits == 0:
        share = _BYTE // bits
        parts = torch.empty(rows, width, share, dtype=torch.uint8, device=packed.device)
        for index in range(share):
            torch.bitwise_and(packed >> (index * bits), (1 << bits) - 1, out=parts[..., index])
        return parts.view(rows, width * share)[:, :columns].contiguous()
    count = -(-columns // _RUN)
    stream = F.pad(packed, (0, count * bits - width)).view(rows, count, bits)
    words = F.pad(stream, (0, _RUN - bits)).view(torch.int64)
    codes = torch.cat([words >> (index * bits) & (1 << bits) - 1 for index in range(_RUN)], dim=-1)
    return codes.to(torch.uint8).view(rows, count * _RUN)[:, :columns].contiguous()
