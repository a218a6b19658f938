"""What a number is stored as: grids, schemes, and the table of schemes users name.

A `Grid` is a finite set of numbers and the width of its codes. A `Scheme` says how a matrix [rows, columns] is stored: a grid
for its values, and for each block of them one scale, which is itself a matrix stored by a scheme. The size of a file is a
fold over this structure (`bits`), so a budget computed from a scheme cannot disagree with the bytes it becomes.

No torch in this file: recipes and `--help` read it.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from bitlathe.errors import RecipeError


class Grid(BaseModel):
    """A finite set of numbers.

    kind: "int" (two's complement, or unsigned with a zero point), "float" (a sign, an exponent, a mantissa), "exponent"
    (powers of two). bits: width of one code. maximum: largest finite value of a float grid. unsigned: integers from zero on,
    without a zero point.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bits: int
    kind: Literal["int", "float", "exponent"]
    maximum: float = 0.0
    unsigned: bool = False


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        *(Grid(name=f"INT{bits}", bits=bits, kind="int") for bits in range(2, 9)),
        *(Grid(name=f"UINT{bits}", bits=bits, kind="int", unsigned=True) for bits in (2, 4, 5, 6)),
        Grid(name="E2M1", bits=4, kind="float", maximum=6.0),  # OCP Microscaling Formats 1.0
        Grid(name="E4M3", bits=8, kind="float", maximum=448.0),  # OCP 8-bit floating point, the "fn" variant
        Grid(name="E8M0", bits=8, kind="exponent", maximum=2.0**127),  # OCP Microscaling Formats 1.0
        Grid(name="BF16", bits=16, kind="float", maximum=3.3895313892515355e38),
        Grid(name="FP16", bits=16, kind="float", maximum=65504.0),
        Grid(name="FP32", bits=32, kind="float", maximum=3.4028234663852886e38),
    )
}


class Scheme(BaseModel):
    """How a matrix [rows, columns] is stored.

    grid: name in GRIDS. block: (rows, columns) that share one scale; 0 means the whole extent, so (1, 128) is groups of 128
    inputs, (1, 0) one scale a row, (0, 0) one a tensor, (128, 128) square blocks (the last may be ragged in rows, never in
    columns). scale: the scheme of the matrix of scales [ceil(rows / block rows), columns / block columns]; None for values
    stored as they are. asymmetric: an unsigned integer zero point of the grid's width beside each scale. minimum: the scheme of
    what is taken off, one number a block, of a matrix of the same shape as the scales: a value is scale * code - minimum.
    fixed: the grid stays what it is whatever 16-bit dtype a reader has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    grid: str
    block: tuple[int, int] = (1, 1)
    scale: Scheme | None = None
    asymmetric: bool = False
    minimum: Scheme | None = None
    fixed: bool = False

    @field_validator("grid")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in GRIDS:
            raise ValueError(f"unknown grid {name!r}; known: {', '.join(GRIDS)}")
        return name

    @model_validator(mode="after")
    def _sound(self) -> Scheme:
        if self.asymmetric and (GRIDS[self.grid].kind != "int" or self.scale is None):
            raise ValueError("only an integer grid with scales can be asymmetric")
        if self.asymmetric and GRIDS[self.grid].unsigned:
            raise ValueError("a grid without negative numbers has a minimum, not a zero point")
        if self.minimum is not None and not (GRIDS[self.grid].unsigned and self.scale is not None):
            raise ValueError("only an unsigned integer grid with scales has minima")
        if GRIDS[self.grid].kind == "int" and self.scale is None:
            raise ValueError("an integer grid needs a scale")
        return self

    def blocks(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the matrix of scales of a matrix of `shape` [rows, columns]."""
        rows, columns = (extent or whole for extent, whole in zip(self.block, shape, strict=True))
        return ceil(shape[0] / rows), ceil(shape[1] / columns)

    def bits(self, shape: tuple[int, int]) -> int:
        """Bits that a matrix of `shape` [rows, columns] takes: codes, scales of every level, zero points; no padding."""
        width, total = GRIDS[self.grid].bits, shape[0] * shape[1] * GRIDS[self.grid].bits
        if self.scale is not None:
            blocks = self.blocks(shape)
            total += self.scale.bits(blocks) + (blocks[0] * blocks[1] * width if self.asymmetric else 0)
            total += 0 if self.minimum is None else self.minimum.bits(blocks)
        return total

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether the blocks, and blocks of these, divide the inputs (columns) of a matrix of `shape`."""
        return shape[1] % self.run == 0

    @property
    def run(self) -> int:
        """What the inputs must be a multiple of."""
        within = 1 if self.scale is None else self.scale.run
        return (self.block[1] or 1) * (within if self.block[1] else 1)

    @property
    def two_ended(self) -> bool:
        """Whether both ends of a block's range can move alone."""
        return self.asymmetric or self.minimum is not None

    @property
    def moves(self) -> bool:
        """Whether scales can be a little larger or smaller: powers of two cannot."""
        return self.scale is not None and GRIDS[self.scale.grid].kind != "exponent"

    @property
    def reader_bound(self) -> bool:
        """Whether the dtype of the scales of the lowest level is fixed."""
        return self.fixed or (self.scale is not None and self.scale.reader_bound)

    def served_in(self, dtype: str) -> Scheme:
        """The same scheme with its 16-bit scales in `dtype`, "bf16" or "fp16": the dtype a reader will hold them in."""
        if self.fixed:
            return self
        grid = {"BF16": dtype.upper(), "FP16": dtype.upper()}.get(self.grid, self.grid)
        parts = {name: part and part.served_in(dtype) for name, part in (("scale", self.scale), ("minimum", self.minimum))}
        return self.model_copy(update={"grid": grid, **parts})


_SCALE = Scheme(grid="BF16")
_HALF = Scheme(grid="FP16", fixed=True)  # what llama.cpp holds its scales in


def _integer(bits: int, columns: int, *, asymmetric: bool) -> Scheme:
    return Scheme(grid=f"INT{bits}", block=(1, columns), scale=_SCALE, asymmetric=asymmetric)


def _super(grid: str, blocks: int) -> Scheme:
    """Scales that are integers, with one scale for so many of them."""
    return Scheme(grid=grid, block=(1, blocks), scale=_HALF)


def _with_minimum(grid: str, columns: int, scale: Scheme) -> Scheme:
    return Scheme(grid=grid, block=(1, columns), scale=scale, minimum=scale)


# llama.cpp's block types, ggml-common.h: of 32 weights, and "K" of 256 in blocks of 16 or 32.
LLAMA_CPP: dict[str, Scheme] = {
    "Q4_0": Scheme(grid="INT4", block=(1, 32), scale=_HALF),
    "Q4_1": _with_minimum("UINT4", 32, _HALF),
    "Q5_0": Scheme(grid="INT5", block=(1, 32), scale=_HALF),
    "Q5_1": _with_minimum("UINT5", 32, _HALF),
    "Q8_0": Scheme(grid="INT8", block=(1, 32), scale=_HALF),
    "Q2_K": _with_minimum("UINT2", 16, _super("UINT4", 16)),
    "Q3_K": Scheme(grid="INT3", block=(1, 16), scale=_super("INT6", 16)),
    "Q4_K": _with_minimum("UINT4", 32, _super("UINT6", 8)),
    "Q5_K": _with_minimum("UINT5", 32, _super("UINT6", 8)),
    "Q6_K": Scheme(grid="INT6", block=(1, 16), scale=_super("INT8", 16)),
}

# The names users type. A group of 128 is what a plain name means; "_CHANNEL" is one scale a row.
SCHEMES: dict[str, Scheme] = {
    f"W{bits}A16{suffix}{'_ASYM' if asymmetric else ''}": _integer(bits, columns, asymmetric=asymmetric)
    for bits in (2, 3, 4, 5, 6, 8)
    for suffix, columns in (("", 128), ("G32", 32), ("G64", 64), ("_CHANNEL", 0))
    for asymmetric in (False, True)
} | {
    "FP8_TENSOR": Scheme(grid="E4M3", block=(0, 0), scale=_SCALE),
    "FP8_CHANNEL": Scheme(grid="E4M3", block=(1, 0), scale=_SCALE),
    "FP8_BLOCK": Scheme(grid="E4M3", block=(128, 128), scale=_SCALE),
    "MXFP4A16": Scheme(grid="E2M1", block=(1, 32), scale=Scheme(grid="E8M0")),
    "MXFP8A16": Scheme(grid="E4M3", block=(1, 32), scale=Scheme(grid="E8M0")),
    "NVFP4A16": Scheme(grid="E2M1", block=(1, 16), scale=Scheme(grid="E4M3", block=(0, 0), scale=Scheme(grid="FP32"))),
    **LLAMA_CPP,
}


class Preset(BaseModel):
    """What a name stands for. weight: scheme of the weight [outputs, inputs]; input: of the activations [tokens, inputs], None
    where they stay in 16 bits.

    A scale of activations that one token or a part of it has is computed when it is run ("dynamic"); one that the whole matrix
    shares, at any level, is measured on calibration text and stored ("static", see `static`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: Scheme
    input: Scheme | None = None

    def served_in(self, dtype: str) -> Preset:
        """The same with 16-bit scales in `dtype`, "bf16" or "fp16"."""
        return Preset(weight=self.weight.served_in(dtype), input=self.input and self.input.served_in(dtype))


def per_token(grid: str, *, asymmetric: bool = False) -> Scheme:
    """Activations with one scale a token."""
    return Scheme(grid=grid, block=(1, 0), scale=_SCALE, asymmetric=asymmetric)


def per_tensor(grid: str, *, asymmetric: bool = False) -> Scheme:
    """Activations with one scale for all tokens."""
    return Scheme(grid=grid, block=(0, 0), scale=_SCALE, asymmetric=asymmetric)


def static(scheme: Scheme | None) -> bool:
    """Whether activations of this scheme have a scale, or a scale of scales, that all tokens share."""
    return scheme is not None and scheme.scale is not None and (scheme.block == (0, 0) or static(scheme.scale))


# Square blocks of weights and groups of activations with float32 scales: what the fp8 method of serving engines runs.
_SINGLE = Scheme(grid="FP32")
_FP8_BLOCKS = Preset(
    weight=Scheme(grid="E4M3", block=(128, 128), scale=_SINGLE), input=Scheme(grid="E4M3", block=(1, 128), scale=_SINGLE)
)

# Every name users type: weights alone, and weights with activations.
PRESETS: dict[str, Preset] = {name: Preset(weight=scheme) for name, scheme in SCHEMES.items()} | {
    "W4A4": Preset(weight=SCHEMES["W4A16_CHANNEL"], input=per_token("INT4")),
    "W4A4G128": Preset(weight=SCHEMES["W4A16"], input=per_token("INT4")),
    "W4A8": Preset(weight=SCHEMES["W4A16"], input=per_token("INT8")),
    "W8A8": Preset(weight=SCHEMES["W8A16_CHANNEL"], input=per_token("INT8")),
    "W8A8_STATIC": Preset(weight=SCHEMES["W8A16_CHANNEL"], input=per_tensor("INT8")),
    "FP8_DYNAMIC": Preset(weight=SCHEMES["FP8_CHANNEL"], input=per_token("E4M3")),
    "FP8_STATIC": Preset(weight=SCHEMES["FP8_CHANNEL"], input=per_tensor("E4M3")),
    "FP8_BLOCK_DYNAMIC": _FP8_BLOCKS,
    "MXFP4": Preset(weight=SCHEMES["MXFP4A16"], input=SCHEMES["MXFP4A16"]),
    "MXFP8": Preset(weight=SCHEMES["MXFP8A16"], input=SCHEMES["MXFP8A16"]),
    "NVFP4": Preset(weight=SCHEMES["NVFP4A16"], input=SCHEMES["NVFP4A16"]),
}

# Other names for some of them.
PRESET_ALIASES: dict[str, str] = {"INT8": "W8A8", "INT4": "W4A4"}

# Schemes of the keys and values of a cache: [tokens, head size] of every head, one scale a token and head.
KV_SCHEMES: dict[str, Scheme] = {
    "KV8": per_token("INT8", asymmetric=True),
    "KV4": per_token("INT4", asymmetric=True),
}


def _key(name: str) -> str:
    plain = name.upper().replace("-", "").replace("_", "")
    return plain.replace("A16G128", "A16")


_BY_KEY = {_key(name): name for name in PRESETS} | {_key(alias): name for alias, name in PRESET_ALIASES.items()}


def canonical_name(name: str) -> str:
    """The table's spelling of a scheme's name; case, "-" and "_" do not matter. Raises RecipeError for an unknown one."""
    if _key(name) not in _BY_KEY:
        raise RecipeError(
            f"unknown scheme {name!r}. Known: {', '.join(PRESETS)}. "
            "Weight-only integer names read W<bits>A16, then G32, G64 or _CHANNEL (groups of 128 otherwise), then _ASYM."
        )
    return _BY_KEY[_key(name)]


def preset_named(name: str, dtype: str = "bf16") -> Preset:
    """What users call `name`, with 16-bit scales in `dtype` ("bf16" or "fp16")."""
    return PRESETS[canonical_name(name)].served_in(dtype)


def scheme_named(name: str, dtype: str = "bf16") -> Scheme:
    """The scheme of the weights of what users call `name`."""
    return preset_named(name, dtype).weight


def name_of(weight: Scheme, input: Scheme | None = None) -> str:
    """The name of a weight's scheme with that of its activations; a description where the table has none."""
    plain = Preset(weight=weight, input=input).served_in("bf16")
    for name, known in PRESETS.items():
        if known == plain:
            return name
    if input is not None:
        return f"{name_of(weight)} with {described(input)}"
    if weight.scale is None:
        return weight.grid
    return f"{weight.grid}[{weight.block[0] or 'all'}x{weight.block[1] or 'all'}]"


def described(scheme: Scheme) -> str:
    """A scheme of activations, or of a cache, in words: its grid, and what shares a scale."""
    shared = {(1, 0): " per token", (0, 0): " per tensor, static"}.get(scheme.block)
    rows, columns = (extent or "all" for extent in scheme.block)
    words = shared or (f" in groups of {columns}" if rows == 1 else f" in blocks of {rows} x {columns}")
    nested = ", with a static scale of scales" if static(scheme.scale) else ""
    return f"{scheme.grid}{' asymmetric' if scheme.asymmetric else ''}{words}{nested}"
