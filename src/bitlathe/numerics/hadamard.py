"""Hadamard matrices, and turning the last axis of a tensor by one of them.

A block is turned by R = diag(s) H / sqrt(block), row vectors: x R; s is one, or the random signs of the rotation. H is a
Kronecker product (see rotation.py), so it is never held whole: each step multiplies by one small dense matrix. Its factors:

    Sylvester     powers of two, H_2 (x) H_2 (x) ...: compressed-tensors' "hadamard", entry for entry
    Paley I, II   orders q + 1 with q = 3 mod 4, and 2 (q + 1) with q = 1 mod 4, q a prime power (J. Math. Phys. 12, 1933)
    stored        four circulants in the array of Goethals and Seidel (J. Austral. Math. Soc. 11, 1970)

float64 is turned in float64, anything else in float32 and rounded once to its own dtype. The same call gives the same bits; how
many rows a call holds may change the last bit of one, because a matrix product chooses its order of summation by its shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod, sqrt

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from bitlathe.numerics.rotation import Rotation, factors, paley, sign_bits, steps

_CHUNK = 2**19  # elements turned at a time on a CPU; all at once takes fresh memory a step, few keep threads waiting

# First rows of the circulants A, B, C, D, with A A^T + B B^T + C C^T + D D^T = order * identity. Symmetric for 92, 116 and 172
# (there constant on the cosets of {+-1, +-6, +-7} mod 43); for 156 constant on the cosets of {1, 16, 22} mod 39.
_ROWS = {
    92: (
        "+++++-++---++---++-++++",
        "+-+++--++-+--+-++--+++-",
        "+-+--+++++----+++++--+-",
        "+--++-+-+------+-+-++--",
    ),
    116: (
        "+++--+++-+-++-++-++-+-+++--++",
        "++-+++------+-++-+------+++-+",
        "++-++++----+--++--+----++++-+",
        "+--++-+-+-++++--++++-+-+-++--",
    ),
    156: (
        "+-+--+-++--+-+---+-+++-++-+-+--++++--++",
        "+---+-----+---+--+-+-+-++++-++-+-+-+--+",
        "++-+--+--+----++++++--++--++++-+---+--+",
        "+--++---++++-------++----++++--+-------",
    ),
    172: (
        "+-+-+----++++-++++-++--++-++++-++++----+-+-",
        "++-+--++-+++----+++-++++-+++----+++-++--+-+",
        "+--+++--+-+--+-+++++-++-+++++-+--+-+--+++--",
        "+--++----+-+---+--++++++++--+---+-+----++--",
    ),
}


def hadamard(order: int) -> Tensor:
    """A Hadamard matrix, float64 [order, order] of +-1, not normalised: the Kronecker product of the `factors` of the order.

    Raises PlanError for an order that has no matrix here.
    """
    return _product(factors(order))


def signs(rotation: Rotation, width: int) -> Tensor:
    """s of a space `width` wide: float64 [width] of +-1, all one for the kind "hadamard"."""
    if rotation.kind == "hadamard":
        return torch.ones(width, dtype=torch.float64)
    packed = torch.frombuffer(bytearray(sign_bits(rotation, width)), dtype=torch.uint8)
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return 1.0 - 2.0 * bits.view(-1)[:width].double()


def turn(x: Tensor, rotation: Rotation) -> Tensor:
    """x R in every diagonal block of the last axis: a new tensor [..., width] of x's dtype, which passes gradients on to x.

    A space that is turned per head (value, qk) is given as [..., heads, head size]: all heads then share one R, as heads that
    share keys and values must. The matrices are made for this call; what turns often holds a `Turner`. Raises PlanError for a
    width that the rotation does not fit.
    """
    return turner(rotation, x.shape[-1], like=x).turn(x)


def turn_back(x: Tensor, rotation: Rotation) -> Tensor:
    """x R^T, the inverse of `turn`, on the same terms."""
    return turner(rotation, x.shape[-1], like=x).turn_back(x)


@dataclass(frozen=True, eq=False)
class Turner:
    """What turning takes, made once.

    width: of the last axis; it holds a whole number of blocks. matrices: one a step, outermost first, [f, f], all but the last
    transposed, the last divided by sqrt(block); there is at least one. before, after: signs [width] that multiply what comes in
    and what goes out. All in the dtype of the arithmetic, on the device of what is turned.
    """

    width: int
    matrices: tuple[Tensor, ...]
    before: Tensor | None = None
    after: Tensor | None = None

    @torch.compiler.disable()  # run as it is everywhere, so that what is tuned is what is loaded
    def turn(self, x: Tensor) -> Tensor:
        """x R: [..., width] to the same shape and dtype. Raises ValueError for another width."""
        if x.shape[-1] != self.width:
            raise ValueError(f"made for a width of {self.width}, not {x.shape[-1]}")
        return _Turn.apply(x, self)

    def turn_back(self, x: Tensor) -> Tensor:
        """x R^T."""
        return self.inverse().turn(x)

    def serves(self, x: Tensor) -> bool:
        """Whether it was made for tensors like x."""
        matrix = self.matrices[0]
        return x.shape[-1] == self.width and x.device == matrix.device and _arithmetic(x.dtype) == matrix.dtype

    def inverse(self) -> Turner:
        """The turner by R^T."""
        transposed = tuple(matrix.T.contiguous() for matrix in self.matrices)
        return replace(self, matrices=transposed, before=self.after, after=self.before)


@torch.compiler.disable()
def turner(rotation: Rotation, width: int, *, like: Tensor) -> Turner:
    """The turner of tensors [..., width] with the dtype and on the device of `like`. Raises PlanError as `turn` does."""
    block, dtype = rotation.block_of(width), _arithmetic(like.dtype)
    made = [_product(step) for step in steps(block)] or [torch.ones(1, 1, dtype=torch.float64)]
    matrices = [*(matrix.T.contiguous() for matrix in made[:-1]), made[-1] / sqrt(block)]
    before = None if rotation.kind == "hadamard" else signs(rotation, width).to(like.device, dtype)
    return Turner(width, tuple(matrix.to(like.device, dtype) for matrix in matrices), before)


class _Turn(Function):
    """Turning as one node of the graph: its gradient is turned back, and nothing is kept but the turner."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, turner: Turner) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.turner = turner  # pyright: ignore[reportAttributeAccessIssue]
        return _turned(x, turner)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Turn.apply(gradient, ctx.turner.inverse()), None  # pyright: ignore[reportAttributeAccessIssue]


def _turned(x: Tensor, turner: Turner) -> Tensor:
    rows = x.reshape(-1, turner.width)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    count = max(1, _CHUNK // turner.width) if x.device.type == "cpu" else max(1, len(rows))
    dtype = _arithmetic(x.dtype)
    buffers = [rows.new_empty(min(count, len(rows)), turner.width, dtype=dtype) for _ in range(2)]
    for start in range(0, len(rows), count):
        _turn_rows(rows[start : start + count], turner, out[start : start + count], buffers)
    return out.view(x.shape)


def _turn_rows(rows: Tensor, turner: Turner, out: Tensor, buffers: list[Tensor]) -> None:
    """Turns rows [n, width] into out [n, width]; two buffers [n or more, width] hold what is between two steps."""
    free, other = (buffer[: len(rows)] for buffer in buffers)
    direct = out.dtype == free.dtype and turner.after is None
    if turner.before is not None:
        rows, free, other = torch.mul(rows, turner.before, out=free), other, free
    elif rows.dtype != free.dtype:
        rows, free, other = free.copy_(rows), other, free
    inner = prod(len(matrix) for matrix in turner.matrices)
    for matrix in turner.matrices[:-1]:
        size = len(matrix)
        inner //= size
        parts = rows.view(-1, size, inner)
        torch.bmm(matrix.expand(len(parts), size, size), parts, out=free.view(-1, size, inner))
        rows, free, other = free, other, free
    into = out if direct else free
    torch.mm(rows.view(-1, inner), turner.matrices[-1], out=into.view(-1, inner))
    if turner.after is not None:
        torch.mul(into, turner.after, out=out)
    elif not direct:
        out.copy_(into)


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(bases: tuple[int, ...]) -> Tensor:
    """The Kronecker product of base matrices, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for order in bases:
        matrix = torch.kron(matrix, _base(order))
    return matrix


def _base(order: int) -> Tensor:
    """The matrix of a power of two or of a core."""
    if order & (order - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < order:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix
    built = paley(order)
    return _array(order) if built is None else _paley(*built)


def _paley(kind: int, p: int, k: int) -> Tensor:
    """The Paley matrix of type 1, order p^k + 1, or of type 2, order 2 (p^k + 1)."""
    q = p**k
    # An element of GF(q) is the number that its coefficients spell in base p.
    digits = torch.arange(q).unsqueeze(-1) // p ** torch.arange(k) % p
    differences = (digits.unsqueeze(1) - digits) % p @ p ** torch.arange(k)
    bordered = torch.ones(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 0] = 0
    bordered[1:, 1:] = _characters(p, k)[differences]
    identity = torch.eye(q + 1, dtype=torch.float64)
    if kind == 1:
        bordered[1:, 0] = -1
        return bordered + identity
    spread = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron(bordered, spread) + torch.kron(identity, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64))


def _characters(p: int, k: int) -> Tensor:
    """1 for the squares of GF(p^k), -1 for what is no square and 0 for zero, float64 [p^k].

    The powers of x modulo the first primitive polynomial run through all that is not zero; squares are the even ones.
    """
    powers = next(found for low in product(range(p), repeat=k) if len(found := list(_powers_of_x(p, low))) == p**k - 1)
    table = torch.zeros(p**k, dtype=torch.float64)
    table[powers[0::2]], table[powers[1::2]] = 1.0, -1.0
    return table


def _powers_of_x(p: int, low: tuple[int, ...]) -> Iterator[int]:
    """1, x, x^2, ... up to the power before 1 or 0 comes again, or p^k of them, where x^k = the polynomial `low`."""
    one = (1, *(0,) * (len(low) - 1))
    element = one
    for _ in range(p ** len(low)):
        yield sum(c * p**i for i, c in enumerate(element))
        shifted = (0, *element[:-1])
        element = tuple((a + element[-1] * b) % p for a, b in zip(shifted, low, strict=True))
        if element == one or not any(element):
            return


def _array(order: int) -> Tensor:
    """The array of Goethals and Seidel over the stored rows."""
    index = torch.arange(order // 4)
    shift = (index - index.unsqueeze(-1)) % (order // 4)
    a, b, c, d = (
        torch.tensor([1.0 if sign == "+" else -1.0 for sign in row], dtype=torch.float64)[shift] for row in _ROWS[order]
    )
    br, cr, dr = (matrix.flip(1) for matrix in (b, c, d))
    brt, crt, drt = (matrix.T.flip(1) for matrix in (b, c, d))
    rows = ((a, br, cr, dr), (-br, a, drt, -crt), (-cr, -drt, a, brt), (-dr, crt, -brt, a))
    return torch.cat([torch.cat(row, 1) for row in rows])
