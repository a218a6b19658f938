"""Rotations: which space of the model is turned, by which orthogonal matrix, and into which factors that matrix splits.

No torch in this file, because plans and recipes ask it; the matrices themselves are in `hadamard.py`.

A Hadamard matrix of order n has entries +-1 and orthogonal rows. Its order here is a product of cores (orders that are not
powers of two, each with a construction of its own) and of one power of two (Sylvester); its matrix is the Kronecker product in
that order. `factors` is a fact of the file formats: a checkpoint turned by one split is wrong under another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod
from typing import Literal

from pydantic import BaseModel, ConfigDict

from bitlathe.errors import PlanError

LARGEST_CORE = 512  # a dense factor above it costs more than most layers that it would turn
STORED_CORES = (92, 116, 156, 172)  # no Paley construction; their rows are in hadamard.py
_MATRIX_BYTES = 4  # online, factors and signs are float32


class Rotation(BaseModel):
    """One orthogonal change of basis.

    space: "residual" (R1), "value" (R2, per head), "qk" (R3, after RoPE) or "mid" (R4, before down_proj). block: size of the
    diagonal blocks, 0 for the whole space. kind: "hadamard", or "random" for a Hadamard matrix with random signs drawn from
    `seed`. Whether it is folded into weights or runs online follows from the space, and is never a flag. (QuaRot,
    arXiv:2404.00456; SpinQuant, arXiv:2405.16406.)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    space: Literal["residual", "value", "qk", "mid"]
    block: int = 0
    kind: Literal["hadamard", "random"] = "random"
    seed: int = 0

    def block_of(self, width: int) -> int:
        """The size of the diagonal blocks in a space `width` wide.

        Raises PlanError when they do not divide it, or when no Hadamard matrix of that size is known here.
        """
        block = self.block or width
        if block < 1 or width % block:
            raise PlanError(f"blocks of {block} do not divide a width of {width} ({self.space}): {_way_out(width)}")
        if not fits(block):
            raise PlanError(f"no Hadamard matrix of order {block} is known ({self.space}, {width} wide): {_way_out(width)}")
        return block


def fits(order: int) -> bool:
    """Whether a Hadamard matrix of this order can be built here."""
    return next(_splits(order, LARGEST_CORE), None) is not None


def factors(order: int) -> tuple[int, ...]:
    """Cores in descending order, then the power of two (left out when it is 1); their product is `order`.

    Of all splits the one that needs the fewest multiplications as `steps` runs it, then the smallest cores. Raises PlanError
    for an order that has no split.
    """
    splits = list(_splits(order, LARGEST_CORE))
    if not splits:
        raise PlanError(f"no Hadamard matrix of order {order} is known: {_way_out(order)}")
    return min(splits, key=lambda split: (sum(map(prod, _grouped(split))), split))


def steps(order: int) -> tuple[tuple[int, ...], ...]:
    """The factors of `order` as they are run: one dense matrix a step, the Kronecker product of the step's factors.

    A power of two may be cut into several (Sylvester matrices are Kronecker products of each other), and a power of two that is
    too small for a matrix product of its own shares a step with the core before it.
    """
    return _grouped(factors(order))


def largest_block(width: int) -> int:
    """The largest power of two that divides `width`."""
    return width & -width


def largest_fit(width: int) -> int:
    """The largest divisor of `width` that is the order of a Hadamard matrix known here."""
    return next(width // n for n in range(1, width + 1) if width % n == 0 and fits(width // n))


def cost(width: int, rotation: Rotation) -> tuple[int, int]:
    """What turning one token online takes: (multiplications with their additions, bytes of matrices and signs held).

    Raises PlanError as `Rotation.block_of` does.
    """
    sizes = [prod(step) for step in steps(rotation.block_of(width))]
    signs = width if rotation.kind == "random" else 0
    return width * sum(sizes) + signs, _MATRIX_BYTES * (sum(size * size for size in sizes) + signs)


def sign_bits(rotation: Rotation, width: int) -> bytes:
    """The random signs of a space `width` wide, one bit each, lowest bit first, 1 for minus; ceil(width / 8) bytes.

    Sign i is a function of space, seed and i, so every diagonal block has its own. A hash and no generator of a library, whose
    numbers may change with its version: a checkpoint is reloaded for years.
    """
    return hashlib.shake_256(f"{rotation.space} {rotation.seed}".encode()).digest((width + 7) // 8)


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with p prime and q = p^k, or None."""
    p = next((p for p in range(2, q) if p * p <= q and q % p == 0), q)
    k = 0
    while q > 1 and q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 and k else None


def paley(order: int) -> tuple[int, int, int] | None:
    """(type, p, k) of the Paley construction of this order: type 1 with p^k = order - 1, else 2 with p^k = order / 2 - 1."""
    for kind, q in ((1, order - 1), (2, order // 2 - 1)):
        field = prime_power(q)
        if order % 4 == 0 and field is not None and q % 4 == (3 if kind == 1 else 1):
            return kind, *field
    return None


def _is_core(order: int) -> bool:
    return order % 4 == 0 and order & (order - 1) != 0 and (order in STORED_CORES or paley(order) is not None)


def _splits(order: int, most: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `order` as descending cores up to `most` and a power of two."""
    if order < 1:
        return
    if order & (order - 1) == 0:
        yield (order,) if order > 1 else ()
        return
    for core in range(min(most, order) // 4 * 4, 8, -4):
        if order % core == 0 and _is_core(core):
            for rest in _splits(order // core, core):
                yield (core, *rest)


def _grouped(split: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """A split as steps. The sizes are those that matrix products on a CPU run fastest: 16 or 32 a step, the last 12 or more."""
    if not split:
        return ()
    *cores, last = split
    if last & (last - 1):
        return tuple((core,) for core in split)
    if cores and last < 16:
        return (*((core,) for core in cores[:-1]), (cores[-1], last))
    return tuple((part,) for part in (*cores, *_powers(last)))


def _powers(order: int) -> tuple[int, ...]:
    """A power of two as factors of 16, with an 8 before or one or two 32 after where four does not divide its logarithm."""
    log = order.bit_length() - 1
    if log <= 6:
        return (order,)
    ends: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {0: ((), ()), 1: ((), (32,)), 2: ((), (32, 32)), 3: ((8,), ())}
    before, after = ends[log % 4]
    rest = order // prod(before + after)
    return (*before, *(16,) * ((rest.bit_length() - 1) // 4), *after)


def _way_out(width: int) -> str:
    block = largest_fit(width) if width > 0 else 1
    if block == 1:
        return "no block fits it, so leave this rotation out of --rotate"
    return f"--rotation-block {block} is the largest that fits"
