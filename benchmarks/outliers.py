"""python -m benchmarks.outliers MODEL OUT: a model with the same function and with outliers in its activations.

Small models have few of the outliers that make 4-bit activations hard in large ones, so they are made here, of three kinds:

- norm: a few channels of what the norms hand on are larger by a factor; the columns that read them are smaller by it.
- value: the same in a few channels of the values (between v_proj and o_proj) and behind the gate (between up_proj and
  down_proj). All query heads of a key-value head read its values, so each has the outliers.
- residual: the residual stream is turned into the principal axes of its own activations, which puts most of its energy into
  a few channels. The axes come in a random order: nothing sorts the channels of a real model by their energy.

All of it is done in float64 and stored in float32, so the function stays what it was up to rounding in float32; in bfloat16,
which is what most programs run, it is another model with outliers like these. The model is held in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from shutil import copyfile
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

import bitlathe
from bitlathe.arch import Linear
from bitlathe.errors import BitlatheError, CheckpointError, OutputError, RecipeError, UnsupportedModel
from bitlathe.io.checkpoint import CONFIG, SINGLE, Checkpoint
from bitlathe.io.writer import save
from bitlathe.model.calib import characters_for, refuse_strange_tokens, text_of, tokenizer_of, windows_of
from bitlathe.model.fold import fold
from bitlathe.model.hidden import Budget, Hidden
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.source import open_model
from bitlathe.model.walk import begin, walk
from bitlathe.model.weights import Weights

KINDS = ("norm", "value", "residual")
# What was done, beside the weights.
RECORD = "outliers.json"

# The text on which axes are found and channels are measured: enough tokens to fill spaces of a few thousand channels.
_WINDOWS, _TOKENS, _BATCH = 128, 128, 8
_MEMORY = 2**32
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Space -> what linears that write it write, in the words of a family's table.
_WRITERS = {"value": ("value", "qkv"), "mid": ("gate_up",)}


@dataclass(frozen=True)
class Outliers:
    """What is to be made. channels: how many of a norm's, of the values of a block, and of the space behind its gate. factor:
    by how much they grow. seed: of their choice. text: a file, a data set or "builtin", on which the principal axes are found.
    dtype: in which it is stored.
    """

    kinds: tuple[str, ...] = KINDS
    channels: int = 8
    factor: float = 30.0
    seed: int = 0
    text: str = "builtin"
    dtype: Literal["float32", "bfloat16"] = "float32"


def add_outliers(model: str | Path, out: str | Path, wanted: Outliers | None = None) -> None:
    """Write the model of a folder or Hub id into the folder `out`, which must be new or empty, with outliers.

    Raises UnsupportedModel for a family whose residual stream cannot be turned by folding, RecipeError for kinds that are not
    known or more channels than there are, OutputError for an `out` that holds files.
    """
    wanted, out = wanted or Outliers(), Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists already; choose a new or an empty folder")
    checkpoint = Checkpoint(model)
    skeleton, weights = open_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    _refuse(wanted, skeleton, weights)
    order, factors = _drawn(wanted, skeleton)
    turns = {}
    if "residual" in wanted.kinds:
        matrix = _principal_axes(skeleton, weights, _tokens(checkpoint, skeleton, wanted.text))[:, order]
        turns = {"residual": partial(torch.matmul, other=matrix)}
    unties = bool(turns and skeleton.tied)
    skeleton = skeleton.untie() if unties else skeleton
    weights = replace(weights, dtype=torch.float64, edits=fold(skeleton, turns))
    tensors = {name: factors(name, weights.read([name])[name]).to(_DTYPES[wanted.dtype]) for name in skeleton.shapes}
    config = {key: value for key, value in checkpoint.config.items() if key not in ("torch_dtype", "dtype")}
    config |= {"dtype": wanted.dtype, **({"tie_word_embeddings": False} if unties else {})}
    _write(out, checkpoint, tensors, {CONFIG: config, RECORD: asdict(wanted)})


def spread(model: str | Path, text: str = "builtin") -> dict[str, float]:
    """How far channels stick out: the largest RMS of a channel over the median one, the median of that over blocks.

    Of the inputs of one linear for each norm and each space that is read without one: q_proj, o_proj, gate_proj, down_proj.
    text: a file, a data set or "builtin".
    """
    checkpoint = Checkpoint(model)
    skeleton, weights = open_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    first: dict[tuple[str, str | None], str] = {}
    for row in skeleton.arch.linears:
        first.setdefault((row.reads, row.norm), row.name)
    found: dict[str, list[float]] = defaultdict(list)
    tokens = _tokens(checkpoint, skeleton, text)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        start = begin(skeleton, weights, tokens, Budget(_MEMORY, Path(folder)), streams=1)
        for step in walk(skeleton, weights, start, batch_size=_BATCH):
            assert step.inputs is not None
            squares = _Squares()
            with step.block.watch({f"{step.block.name}.{name}": None for name in first.values()}, squares.see):
                for batch in step.inputs.batches(_BATCH):
                    step.block(step.inputs[batch])
            for name, sums in squares.sums.items():
                rms = sums.sqrt()
                found[name.rpartition(".")[2]].append((rms.max() / rms.median()).item())
    return {name: median(ratios) for name, ratios in found.items()}


class _Squares:
    """Sums of squares [channels] over the tokens of what it is shown, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Take in [..., channels]."""
        self.sums[name] = self.sums.get(name, torch.zeros(())) + x.double().square().flatten(0, -2).sum(0)


def _refuse(wanted: Outliers, skeleton: Skeleton, weights: Weights) -> None:
    strange = [kind for kind in wanted.kinds if kind not in KINDS]
    if strange or not wanted.kinds:
        raise RecipeError(
            f"outliers of the kinds {', '.join(wanted.kinds) or '(none)'} are not known. Known: {', '.join(KINDS)}"
        )
    least = min(skeleton.model.config.hidden_size, skeleton.value_width, *skeleton.widths["mid"])
    if not 1 <= wanted.channels <= least:
        raise RecipeError(f"outliers in {wanted.channels} channels were asked for, and the narrowest space has {least}")
    if not wanted.factor > 0:
        raise RecipeError(f"channels cannot grow by {wanted.factor}: ask for a factor above 0, such as 30")
    if weights.plan is not None:
        raise CheckpointError(f"{weights.checkpoint.path} is quantized already. Use the original model instead")
    family = skeleton.model.config.model_type
    if skeleton.arch.experts is not None:
        raise UnsupportedModel(
            f"the family {family!r} has experts, and each a space of its own behind its gate, in which no outliers are made. "
            "Take a family without, such as llama"
        )
    if not skeleton.arch.folds("residual"):
        raise UnsupportedModel(
            f"norms with gains write the residual stream of the family {family!r}, so it cannot be turned by folding and no "
            "outliers are made in it. Take a family with norms before its blocks alone, such as llama"
        )


@dataclass(frozen=True)
class _Factors:
    """What rows (a gain, a bias, outputs) are multiplied by and what columns (inputs) are divided by, by parameter's name."""

    skeleton: Skeleton
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)

    def at_norms(self, block: str, factors: Tensor) -> None:
        """Outliers [channels] in what the norms of a block hand on. The output head is left out: it may share its weight."""
        for name, row in self._linears(block):
            if row.norm is not None:
                self.rows[f"{row.norm}.weight"] = self.columns[f"{name}.weight"] = factors

    def in_values(self, block: str, factors: Tensor) -> None:
        """Outliers [channels of all key-value heads] between v_proj and o_proj."""
        config, size = self.skeleton.model.config, self.skeleton.head_size
        queries_each = config.num_attention_heads // config.num_key_value_heads
        read = factors.view(-1, size).repeat_interleave(queries_each, dim=0).flatten()
        self._between(block, "value", factors, read)

    def in_mid(self, block: str, factors: Tensor) -> None:
        """Outliers [channels] in the space behind the gate, by way of what is not gated: up_proj."""
        self._between(block, "mid", factors, factors)

    def __call__(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter, float64, as it is to be."""
        if (columns := self.columns.get(name)) is not None:
            parameter = parameter / columns
        if (rows := self.rows.get(name)) is not None:
            parameter = parameter * (rows if parameter.ndim == 1 else rows[:, None])
        return parameter

    def _between(self, block: str, space: str, written: Tensor, read: Tensor) -> None:
        """`written` for the last rows of the last linear that writes the space: of a matrix that holds queries, keys and
        values the values are last, and of one that holds gate and up it is up."""
        writers = _WRITERS[space]
        name = [name for name, row in self._linears(block) if row.writes in writers][-1]
        rest = self.skeleton.linears[name][0] - len(written)
        rows = torch.cat([torch.ones(rest, dtype=torch.float64), written])
        self.rows[f"{name}.weight"] = self.rows[f"{name}.bias"] = rows
        for name, row in self._linears(block):
            if row.reads == space:
                self.columns[f"{name}.weight"] = read

    def _linears(self, block: str) -> list[tuple[str, Linear]]:
        return [(name, row) for name, row in self.skeleton.rows.items() if name.startswith(f"{block}.")]


def _drawn(wanted: Outliers, skeleton: Skeleton) -> tuple[Tensor, _Factors]:
    """What is left to chance: an order of the principal axes, and the channels that grow.

    All is drawn whatever the kinds are, so that one kind is the same alone and with others.
    """
    generator = torch.Generator().manual_seed(wanted.seed)

    def grown(width: int) -> Tensor:
        factors = torch.ones(width, dtype=torch.float64)
        factors[torch.randperm(width, generator=generator)[: wanted.channels]] = wanted.factor
        return factors

    factors, hidden = _Factors(skeleton), skeleton.model.config.hidden_size
    order = torch.randperm(hidden, generator=generator)
    normed = grown(hidden)  # a model's outliers keep to the same channels of the residual stream through all of its blocks
    for block in skeleton.blocks:
        values, mid = grown(skeleton.value_width), grown(skeleton.widths["mid"][0])
        if "norm" in wanted.kinds:
            factors.at_norms(block, normed)
        if "value" in wanted.kinds:
            factors.in_values(block, values)
            factors.in_mid(block, mid)
    return order, factors


def _principal_axes(skeleton: Skeleton, weights: Weights, tokens_NT: Tensor) -> Tensor:
    """An orthogonal matrix [width, width], float64: its columns are the eigenvectors of the mean of x x^T.

    x: the residual stream between blocks, every token of it scaled to one length, as the norms that read it scale it.
    """
    width = skeleton.model.config.hidden_size
    moments = torch.zeros(width, width, dtype=torch.float64)

    def see(hidden: Hidden) -> None:
        for batch in hidden.batches(_BATCH):
            x = torch.nn.functional.normalize(hidden[batch].double().flatten(0, -2), dim=-1)
            moments.addmm_(x.T, x)

    with tempfile.TemporaryDirectory() as folder:
        start = begin(skeleton, weights, tokens_NT, Budget(_MEMORY, Path(folder)), streams=1)
        for step in walk(skeleton, weights, start, batch_size=_BATCH):
            assert step.inputs is not None
            see(step.inputs)
        see(start.streams[0])
    return torch.linalg.eigh(moments).eigenvectors


def _tokens(checkpoint: Checkpoint, skeleton: Skeleton, text: str) -> Tensor:
    documents = text_of(text, "calibration", characters=characters_for(_WINDOWS, _TOKENS))
    tokens = windows_of(tokenizer_of(checkpoint.path), documents, seqlen=_TOKENS, count=_WINDOWS)
    refuse_strange_tokens(tokens, skeleton.model.config.vocab_size, checkpoint.path)
    return tokens


def _write(out: Path, checkpoint: Checkpoint, tensors: dict[str, Tensor], records: dict[str, Any]) -> None:
    """The whole folder or nothing: it is written beside its place and then renamed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
            aside = Path(beside) / out.name
            aside.mkdir()
            save(aside / SINGLE, tensors)
            for path in checkpoint.companions():
                copyfile(path, aside / path.name)
            for name, record in records.items():
                (aside / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            os.replace(aside, out)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written ({error.strerror or error}). Make room, or choose another folder"
        ) from error


def main() -> None:
    """Write the folder; print how far channels stick out before and after, and how far the function has moved."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.outliers", description="A model with the same function and with activation outliers."
    )
    parser.add_argument("model", help="folder, Hub id, or builtin")
    parser.add_argument("out", help="folder of the result, new or empty")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"with commas (default: {','.join(KINDS)})")
    parser.add_argument("--channels", type=int, default=8, help="channels of a space that grow (default: 8)")
    parser.add_argument("--factor", type=float, default=30.0, help="by how much (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of channels (default: 0)")
    parser.add_argument("--text", default="builtin", help="text to find the principal axes on (default: the bundled one)")
    parser.add_argument("--dtype", default="float32", choices=_DTYPES, help="in which it is stored (default: float32)")
    given = parser.parse_args()
    kinds = tuple(kind.strip() for kind in given.kinds.split(","))
    try:
        wanted = Outliers(kinds, given.channels, given.factor, given.seed, given.text, given.dtype)
        add_outliers(given.model, given.out, wanted)
        before, after = (spread(model, given.text) for model in (given.model, given.out))
        moved = bitlathe.evaluate(given.out, against=given.model, seqlen=_TOKENS, windows=16)["kl_mean"]["value"]
    except BitlatheError as error:
        parser.exit(2, f"Error: {error}\n")
    print("| inputs of | max / median RMS of a channel, before | after |\n|---|---|---|")
    for name, ratio in before.items():
        print(f"| {name} | {ratio:.1f} | {after[name]:.1f} |")
    print(f"\nKL to the original: {moved:.1e} nats a token")


if __name__ == "__main__":
    main()
