"""What becomes of a parameter between the checkpoint and whoever reads it.

An edit is a function of what the checkpoint holds and of the plan. It is applied in float64 at every read anew, so a second
read gives the same weight as the first, and nothing edited is ever stored.

It works in parts of a fixed size, each rounded once and straight into the result: beside source and result some tens of MiB are
held. A weight whose inputs and outputs are both turned is held whole in float64 in between, four times its size in 16 bits,
because an output that is turned needs every row after its inputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitlathe.numerics.project import QuantTensor, dequantize, quantize, search
from bitlathe.numerics.scheme import Scheme

# x [..., size of a space] to x R, in x's dtype.
Turn = Callable[[Tensor], Tensor]

_PART = 2**20  # elements edited at a time: 8 MiB in float64


@dataclass(frozen=True)
class Edit:
    """What becomes of one parameter [outputs, inputs], a bias [outputs], or a gain.

    gain: the norm's weight that multiplies the columns first. columns: turns the inputs; rows: turns the outputs from `start`
    on. ones: a gain that has moved elsewhere. scheme: at the end it is rounded, and read as what its codes stand for: a table
    of embeddings, which no block holds, is quantized where it is read.
    """

    gain: str | None = None
    columns: Turn | None = None
    rows: Turn | None = None
    start: int = 0
    ones: bool = False
    scheme: Scheme | None = None

    def __call__(self, tensor: Tensor, gain: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """The edited parameter in `dtype`, a new tensor. gain: what `self.gain` names."""
        if self.ones:
            return torch.ones_like(tensor, dtype=dtype)
        matrix = tensor if tensor.ndim == 2 else tensor.unsqueeze(-1)
        result = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
        start = len(matrix) if self.rows is None else self.start
        for part in _parts(start, matrix.shape[1]):
            result[part] = self._read(matrix[part], gain)
        if self.rows is not None:
            _turn_rows(self._turned_inputs(matrix[start:], gain), self.rows, result[start:])
        return result.view(tensor.shape) if self.scheme is None else dequantize(coded(result, self.scheme), dtype)

    def _read(self, rows: Tensor, gain: Tensor | None) -> Tensor:
        """Rows with their columns multiplied and turned, float64."""
        read = rows.double()
        if gain is not None:
            read = read * gain.double()
        return read if self.columns is None else self.columns(read)

    def _turned_inputs(self, rows: Tensor, gain: Tensor | None) -> Tensor:
        """What is left to be turned: all rows as `_read` gives them, or as they are where that changes nothing."""
        if gain is None and self.columns is None:
            return rows
        read = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
        for part in _parts(*rows.shape):
            read[part] = self._read(rows[part], gain)
        return read


def coded(weight: Tensor, scheme: Scheme) -> QuantTensor:
    """The codes of a matrix that nothing is known of but itself: to nearest, on the ranges that lose least."""
    return quantize(weight, scheme, search(weight, scheme))


def _turn_rows(matrix: Tensor, turn: Turn, into: Tensor) -> None:
    """R^T of a matrix [outputs, inputs], a part of its columns at a time."""
    for part in _parts(matrix.shape[1], len(matrix)):
        columns = matrix[:, part].T.to(torch.float64, memory_format=torch.contiguous_format)
        into[:, part] = turn(columns).T


def _parts(count: int, size: int) -> Iterator[slice]:
    """Slices of `count` things with `size` elements each."""
    step = max(1, _PART // max(1, size))
    for start in range(0, count, step):
        yield slice(start, start + step)
