"""The recipe: everything a user can ask for, in one frozen value.

A field has one name wherever it appears: as a keyword of `bitlathe.quantize`, as a key of a yaml file, after `--set`, and, for
the common ones, as an option of the command line. Later layers win: defaults, then the file, then options, then `--set`.

No torch in this file: `--help` reads it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bitlathe.autoscheme.options import SearchOptions
from bitlathe.errors import RecipeError
from bitlathe.formats import ALIASES, FORMATS
from bitlathe.io.sizes import parse_size
from bitlathe.mixes import mix_named
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import KV_SCHEMES, canonical_name
from bitlathe.plan import KEEP
from bitlathe.registry import canonical, did_you_mean
from bitlathe.tune import TUNERS
from bitlathe.tune.options import ClosedFormOptions, Effort, RtnOptions, SignRoundOptions, TuneOptions
from bitlathe.turns import ROTATIONS, rotations_named, turn_named

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_NONE = "none"
# What only signround has: whoever says one of these and no tuner asks for it.
_SIGNROUNDS = ("iters", "signround")
# Tuner -> the field that it does not listen to, and the tuner that does.
_UNHEARD = {"closed-form": ("iters", "signround"), "signround": ("effort", "closed-form"), "rtn": ("effort", "closed-form")}
# Fields that change neither the numbers nor the files of the result, or are told by what they stand for.
_APART = {"model", "out", "calib", "device", "memory", "scores"}


class Memory(BaseModel):
    """Budgets in bytes; texts such as "4GiB" are understood. activations: hidden states beyond it lie in a file in `out`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activations: PositiveInt = 4 * 2**30

    @field_validator("activations", mode="before")
    @classmethod
    def _bytes(cls, size: Any) -> Any:
        try:
            return parse_size(size) if isinstance(size, str) else size
        except RecipeError as error:
            raise ValueError(str(error)) from error


class Recipe(BaseModel):
    """What is asked for; everything but `model` and `out` has a default.

    model: a folder, a Hub id, or "builtin". out: the folder of the result. scheme: the name of the scheme that every linear
    gets, or of a mix of llama.cpp's, such as Q4_K_M. overrides: glob over full linear names -> scheme name or "keep"; the last
    that matches wins. linears: instead of both, every linear by its full name -> scheme name or "keep", as a search finds
    them. bits: instead of a scheme, average bits a weight: a search chooses for every linear one of `schemes` (names, or
    "keep"; by default some that suit bits and formats). include: globs over names or their last parts, of what joins it though
    it is kept unless asked for, the head and the embeddings. groups: lists of globs; what they match gets one scheme. rotate:
    names in ROTATIONS, each alone or with a kind ("R4:random", "R1:hadamard"); "hadamard" is R1 and R2, "none" nothing.
    rotation_block: size of the diagonal blocks of all of them; None turns whole spaces, and before down_proj the largest power
    of two in its width. rotation_seed: of their random signs. rotation_trials: how many vectors of signs are drawn, of which
    the best is kept. smooth: ranges of channels are shared between activations and the weights that read them, where that
    loses less and text is read. act_asymmetric: integer activations have a zero point. act_clip: part of a range of
    activations that is kept, at most 1. kv: the scheme of cached keys and values, a name in KV_SCHEMES or its bits; None keeps
    them. formats: the checkpoints written. tuner: how codes are found; signround where its fields are said alone. effort: how
    much closed-form does. iters: steps of signround. batch_size: sequences a step. calib: a data set on the Hub, a text file,
    or "builtin". samples, seqlen: calibration windows and their length in tokens. device: auto, cpu, cuda or cuda:i. dtype: of
    what stays in 16 bits; auto follows the model. seed: of every random choice but the signs of rotations. scores: the folder
    in which what a search finds out is kept; None is one in the user's cache. memory, search, rtn, signround, closed_form: see
    their types.

    Raises RecipeError, naming the field, for anything that is not understood.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    out: Path
    scheme: str = "W4A16"
    overrides: dict[str, str] = {}
    linears: dict[str, str] = {}
    bits: float | None = Field(default=None, gt=0, le=16)
    schemes: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    rotate: tuple[str, ...] = ()
    rotation_block: PositiveInt | None = None
    rotation_seed: NonNegativeInt = 0
    rotation_trials: PositiveInt = 1
    smooth: bool = True
    act_asymmetric: bool = False
    act_clip: float = Field(default=1.0, gt=0, le=1)
    kv: str | None = None
    formats: tuple[str, ...] = ("native",)
    tuner: str = "closed-form"
    effort: Effort = "normal"
    iters: PositiveInt = 200
    batch_size: PositiveInt = 8
    calib: str = "NeelNanda/pile-10k"
    samples: PositiveInt = 128
    seqlen: PositiveInt = 2048
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp16"] = "auto"
    seed: NonNegativeInt = 0
    memory: Memory = Field(default_factory=Memory)
    scores: Path | None = None
    search: SearchOptions = Field(default_factory=SearchOptions)
    rtn: RtnOptions = Field(default_factory=RtnOptions)
    signround: SignRoundOptions = Field(default_factory=SignRoundOptions)
    closed_form: ClosedFormOptions = Field(default_factory=ClosedFormOptions)

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, data: Any, handler: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        try:
            recipe = handler(data)
        except ValidationError as error:
            raise RecipeError(_explain(error)) from error
        recipe._refuse_two_ways()
        return recipe

    @field_validator("model", "calib", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("out", "scores")
    @classmethod
    def _home(cls, folder: Path | None) -> Path | None:
        try:
            return folder and folder.expanduser()
        except RuntimeError as error:
            raise ValueError("its ~ names nobody's home folder; write the path in full") from error

    @field_validator("scheme")
    @classmethod
    def _scheme(cls, name: str) -> str:
        return mix_named(name) or _known_scheme(name)

    @field_validator("schemes", mode="before")
    @classmethod
    def _schemes(cls, names: Any) -> tuple[str, ...]:
        schemes = tuple(_known_option(part) for part in _parts(names)) if names else ()
        if len(set(schemes)) < len(schemes):
            raise ValueError(f"a scheme is named twice: {', '.join(schemes)}")
        return schemes

    @field_validator("include", mode="before")
    @classmethod
    def _include(cls, globs: Any) -> tuple[str, ...]:
        return tuple(_parts(globs)) if globs else ()

    @field_validator("groups", mode="before")
    @classmethod
    def _groups(cls, groups: Any) -> Any:
        return tuple(tuple(_parts(group)) for group in groups) if isinstance(groups, list | tuple) else groups

    @field_validator("overrides", "linears")
    @classmethod
    def _overrides(cls, wanted: dict[str, str]) -> dict[str, str]:
        return {glob: _known_option(name) for glob, name in wanted.items()}

    @field_validator("rotate", mode="before")
    @classmethod
    def _rotate(cls, names: Any) -> tuple[str, ...]:
        parts = _parts(names)
        return rotations_named([] if [part.lower() for part in parts] == [_NONE] else parts)

    @field_validator("rotation_block", "rotation_seed", "rotation_trials")
    @classmethod
    def _of_rotations(cls, value: int | None, info: ValidationInfo) -> int | None:
        name = str(info.field_name)
        # Where `rotate` itself was refused it is not in the data.
        if value == cls.model_fields[name].default or "rotate" not in info.data:
            return value
        if not info.data["rotate"]:
            raise ValueError("nothing is rotated: give rotate as well, such as R1,R2, or leave this out")
        if name == "rotation_block" and value == 1:
            raise ValueError("blocks of one channel turn nothing: give a larger one, such as 32, or leave this out")
        if name != "rotation_block" and all(kind == "hadamard" for _, kind in map(turn_named, info.data["rotate"])):
            raise ValueError("no rotation has random signs to draw: ask for one, such as R1 or R4:random, or leave this out")
        return value

    @field_validator("kv", mode="before")
    @classmethod
    def _kv(cls, name: Any) -> Any:
        if not isinstance(name, str | int):
            return name
        spellings = {known.removeprefix("KV"): known for known in KV_SCHEMES} | {_NONE: None}
        text = str(name).lower()
        return spellings[text] if text in spellings else _known(text, dict.fromkeys(KV_SCHEMES, ""), "cache scheme")

    @field_validator("formats", mode="before")
    @classmethod
    def _formats(cls, names: Any) -> tuple[str, ...]:
        try:
            return formats_named(names)
        except RecipeError as error:
            raise ValueError(str(error)) from error

    @field_validator("tuner")
    @classmethod
    def _tuner(cls, name: str) -> str:
        return _known(name, TUNERS, "tuner")

    @field_validator("device")
    @classmethod
    def _device(cls, name: str) -> str:
        if not _DEVICE.fullmatch(name.lower()):
            raise ValueError("a device is auto, cpu, cuda, or cuda:0, cuda:1 ...")
        return name.lower()

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype(cls, name: Any) -> Any:
        longer = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
        return longer.get(name.lower(), name.lower()) if isinstance(name, str) else name

    @field_validator("memory", "search", "rtn", "signround", "closed_form", mode="before")
    @classmethod
    def _section(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Mapping | BaseModel):
            return value
        raise ValueError(f"a section, not a value: set one of its fields, {_fields_of(str(info.field_name))}")

    def _refuse_two_ways(self) -> None:
        """There is one way to say what a linear gets, and nothing is said to a tuner that does not listen."""
        name, tuner = _UNHEARD[self.tuner]
        if getattr(self, name) != type(self).model_fields[name].default:
            raise RecipeError(
                f"{name} is for the tuner {tuner}, and the tuner is {self.tuner}: leave it out, or ask for tuner={tuner}"
            )
        if self.bits is not None and self.linears:
            raise RecipeError("bits asks for a search, and linears says what it would choose: leave one of the two out")
        lone = [name for name in ("schemes", "include", "groups") if getattr(self, name)]
        if self.bits is None and lone:
            raise RecipeError(
                f"{lone[0]} is for a search, and none is asked for: give bits as well, such as 4.5, or leave it out"
            )
        if self.linears and self.overrides:
            raise RecipeError("linears says what every linear gets, and so do overrides: leave one of the two out")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """The recipe in a yaml file, which must name `model` and `out`. Raises RecipeError."""
        return merge(read_yaml(path))

    def rotations(self) -> tuple[Rotation, ...]:
        """What is asked to be turned, in the order R1 to R4; block 0 until the model says how wide its spaces are."""
        block, seed = self.rotation_block or 0, self.rotation_seed
        return tuple(
            Rotation(space=ROTATIONS[name].space, kind=kind, block=block, seed=seed if kind == "random" else 0)
            for name, kind in map(turn_named, self.rotate)
        )

    def tuning(self) -> TuneOptions:
        """What a tuner may know of the recipe."""
        return TuneOptions(**{name: getattr(self, name) for name in TuneOptions.model_fields})

    def settings(self) -> dict[str, Any]:
        """The fields that can change the numbers or the files of the result, as plain values.

        A field in a section is named as after `--set`: "signround.lr". Left out: where the result goes, how much memory may be
        used, where scores are kept, and what a run is told by in another way: the model and the text by their content, the
        device by what it is.
        """
        plain: dict[str, Any] = {}
        for name, value in self.model_dump(mode="json", exclude=_APART).items():
            plain |= {f"{name}.{key}": part for key, part in value.items()} if name in _SECTIONS else {name: value}
        return plain


def merge(*layers: Mapping[str, Any]) -> Recipe:
    """One recipe from several partial ones; later layers win, field by field, and override by override.

    Raises RecipeError for a missing, unknown or unusable field.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            before = merged.get(name)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                # A key that is given again moves to the end: of overrides, the last that matches wins.
                value = {key: kept for key, kept in before.items() if key not in value} | dict(value)
            merged[name] = value
    if "tuner" not in merged and any(name in merged for name in _SIGNROUNDS):
        merged["tuner"] = "signround"
    if merged.get("bits") is not None and merged.get("scheme") is not None:
        raise RecipeError(
            f"bits={merged['bits']} asks for a search, which chooses a scheme for every linear, and scheme={merged['scheme']} "
            "gives one to all. Leave one of the two out; what a search chooses from is named in schemes"
        )
    return Recipe.model_validate(merged)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The fields that a yaml file gives, not checked yet. Raises RecipeError if it cannot be read as a mapping."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {str(path)!r} is not yaml: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"the recipe {str(path)!r} holds no fields. It is a mapping such as 'scheme: W4A16'")
    return {str(name): value for name, value in content.items()}


def parse_sets(assignments: Iterable[str]) -> dict[str, Any]:
    """["seqlen=512", "memory.activations=4GiB"] as nested fields, not checked yet. Raises RecipeError for one without "="."""
    fields: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        section, dot, name = key.strip().partition(".")
        if not equals or not section or (dot and not name):
            raise RecipeError(f"--set {assignment!r} is not key=value. Example: --set memory.activations=4GiB")
        if dot:
            inside = fields.setdefault(section, {})
            if not isinstance(inside, dict):
                raise RecipeError(f"--set {section} is given both as a value and as a section ({assignment!r})")
            inside[name] = value
        else:
            fields[section] = value
    return fields


def parse_overrides(assignments: Iterable[str]) -> dict[str, str]:
    """["*.down_proj=W8A16", "*.0.*=keep"] as a mapping in the same order. Raises RecipeError for one without "="."""
    overrides: dict[str, str] = {}
    for assignment in assignments:
        glob, equals, wanted = assignment.rpartition("=")
        if not equals or not glob or not wanted:
            raise RecipeError(f"--override {assignment!r} is not GLOB=SCHEME. Example: --override '*.down_proj=W8A16'")
        overrides.pop(glob, None)
        overrides[glob] = wanted
    return overrides


def _known(name: str, table: Mapping[str, str], kind: str, aliases: Mapping[str, str] | None = None) -> str:
    try:
        return canonical(name, table, kind, aliases)
    except RecipeError as error:
        raise ValueError(str(error)) from error


def formats_named(names: Any) -> tuple[str, ...]:
    """Formats as the table spells them, of names in a list or with commas between. Raises RecipeError for anything else."""
    try:
        formats = tuple(canonical(part, FORMATS, "format", ALIASES) for part in _parts(names))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not formats:
        raise RecipeError("name at least one format")
    if len(set(formats)) < len(formats):
        raise RecipeError(f"a format is named twice: {', '.join(formats)}")
    return formats


def _parts(names: Any) -> list[str]:
    """Names in a list, or in a text with commas between them, without spaces around. Raises ValueError for anything else."""
    parts = names.split(",") if isinstance(names, str) else names
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts) or parts == [""]:
        raise ValueError("one name or several, as a list or with commas between them")
    return [part.strip() for part in parts]


def _known_option(name: str) -> str:
    """The table's spelling of a scheme, or "keep", which people also know by the name of a 16-bit dtype."""
    return KEEP if name.lower() in (KEEP, "bf16", "fp16") else _known_scheme(name)


def _known_scheme(name: str) -> str:
    try:
        return canonical_name(name)
    except RecipeError as error:
        raise ValueError(str(error)) from error


_SECTIONS: dict[str, type[BaseModel]] = {
    "memory": Memory,
    "search": SearchOptions,
    "rtn": RtnOptions,
    "signround": SignRoundOptions,
    "closed_form": ClosedFormOptions,
}


def _fields_of(section: str) -> str:
    """The names a section knows, in full ("" is the recipe itself)."""
    prefix = f"{section}." if section else ""
    return ", ".join(prefix + name for name in (_SECTIONS[section] if section else Recipe).model_fields)


def _explain(error: ValidationError) -> str:
    """pydantic's findings as one message: a line each, naming the field, what is wrong with it, and what was found."""
    lines = []
    for found in error.errors(include_url=False):
        name = ".".join(str(part) for part in found["loc"])
        if found["type"] == "extra_forbidden":
            section = name.rpartition(".")[0]
            known = _fields_of(section if section in _SECTIONS else "")
            lines.append(f"unknown recipe field {name!r}. Known: {known}.{did_you_mean(name, known.split(', '))}")
        elif found["type"] == "missing":
            lines.append(f"the recipe field {name!r} is missing and has no default")
        else:
            message = found["msg"].removeprefix("Value error, ").removeprefix("Input ")
            lines.append(f"recipe field {name!r}: {message} (found {found['input']!r})")
    return "\n".join(lines)
