"""From a recipe to a plan that is known to be possible, without a weight being read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bitlathe.arch import Arch
from bitlathe.autoscheme.space import Space
from bitlathe.errors import CalibrationError, CheckpointError, OutputError
from bitlathe.formats import FORMATS
from bitlathe.formats.base import Format
from bitlathe.formats.ct_experts import read_alone
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.io.writer import refuse_foreign
from bitlathe.model.calib import characters_for, refuse_strange_tokens, text_of, tokenizer_of, windows_of
from bitlathe.model.dequantized import Dequantized, as_original
from bitlathe.model.fold import edits_of
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.source import computed_in, device_named, open_model, stored_dtype
from bitlathe.model.weights import DTYPES, Weights
from bitlathe.numerics.scheme import static
from bitlathe.plan import Plan
from bitlathe.planning import planned, spaced
from bitlathe.recipe import Recipe
from bitlathe.registry import resolve as named
from bitlathe.tune import TUNERS
from bitlathe.tune.base import Tuner
from bitlathe.version import VERSION

# The stream of shards that a resumed run reads its finished blocks from, whatever formats are asked for.
CODES = "native"


@dataclass(frozen=True)
class Text:
    """Windows [windows, tokens] of the calibration text: to tune on, for a search to score on, and to measure on."""

    tokens: Tensor | None = None
    scored: Tensor | None = None
    held_out: Tensor | None = None


@dataclass(frozen=True)
class Prepared:
    """A recipe that has been found possible: everything that is known before the first weight is read.

    space: what a search may choose from, where the recipe asks for one; found: what it found, as JSON, once it has. Until then
    `plan` gives the linears in play some scheme of the space. factors: what channels are smoothed by, once that is known.
    """

    recipe: Recipe
    skeleton: Skeleton
    weights: Weights
    plan: Plan
    kept: dict[str, str]
    formats: dict[str, Format]
    tuner: Tuner
    text: Text
    notes: tuple[str, ...]
    space: Space | None = None
    found: dict[str, Any] | None = None
    factors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> Tensor | None:
        """The windows to tune on; None where no text is read."""
        return self.text.tokens

    @property
    def text_streams(self) -> int:
        """Streams of hidden states: what the tuner wants, and one to measure static scales of activations on."""
        measured = any(static(row.input) for row in self.plan.linears.values())
        return max(self.tuner.needs.streams, int(measured))

    @property
    def streams(self) -> tuple[str, ...]:
        """What is written while the run goes on: every format asked for, and the codes to resume from."""
        return tuple(dict.fromkeys((CODES, *self.formats)))

    def planned(self, plan: Plan) -> Prepared:
        """The same with another plan of the same linears, and the weights read as it says."""
        edits = edits_of(self.skeleton, plan, self.factors)
        return replace(self, plan=plan, weights=replace(self.weights, plan=plan, edits=edits))

    def smoothed(self, factors: Mapping[str, Tensor]) -> Prepared:
        """The same with channels smoothed; see `edits_of`."""
        return replace(self, factors=factors).planned(self.plan)

    def reseeded(self, by: int) -> Prepared:
        """The same with other random signs: see `Plan.reseeded`."""
        return replace(self.planned(self.plan.reseeded(by)), space=self.space and self.space.reseeded(by))

    def bytes_needed(self) -> int:
        """What the streams and spilled hidden states will take on the disk: their numbers, without headers and small files."""
        plan = self.plan
        if self.space is not None and self.found is None and self.recipe.bits is not None:
            plan = self.space.planned(self.space.full(self.recipe.bits))
        names = {f"{name}.weight" for name in plan.quantized}
        kept = sum(2 * prod(shape) for name, shape in self.skeleton.shapes.items() if name not in names)
        streams: list[Format] = [named(name, FORMATS, "format")() for name in self.streams]
        return bytes_written(plan, self.skeleton, streams, kept=kept) + self._bytes_spilled()

    def _bytes_spilled(self) -> int:
        if self.tokens is None:
            return 0
        width = self.skeleton.model.config.hidden_size
        stream = self._bytes_of(len(self.tokens), width)
        gradients = [self._bytes_of(min(self.tuner.needs.gradients, len(self.tokens)), width)] * (self.skeleton.depth + 2)
        left, spilled = self.recipe.memory.activations, 0
        # As `Budget` does it: what lies in memory does so as a whole.
        rooms = [self._bytes_of(len(self.tokens), self.skeleton.attended)] * (2 if self.tuner.needs.beside else 0)
        for nbytes in [stream] * self.text_streams + rooms + gradients:
            fits = nbytes <= left
            left, spilled = (left - nbytes, spilled) if fits else (left, spilled + nbytes)
        return spilled

    def _bytes_of(self, sequences: int, width: int) -> int:
        """Of hidden states of so many windows."""
        return sequences * self.recipe.seqlen * width * self.weights.dtype.itemsize

    def fingerprint(self) -> dict[str, str]:
        """What the result depends on, part by part."""
        text = b"" if self.tokens is None else self.tokens.numpy().tobytes()
        return {
            **{f"recipe.{name}": json.dumps(value) for name, value in self.recipe.settings().items()},
            "rotations": json.dumps([rotation.model_dump() for rotation in self.plan.rotations]),
            "device": self.weights.device.type,
            "arithmetic": str(self.weights.dtype),
            "model": self.weights.checkpoint.fingerprint(),
            "calibration": hashlib.sha256(text).hexdigest(),
            "version": f"bitlathe {VERSION}, torch {torch.__version__}, transformers {transformers.__version__}",
        }


def prepare(recipe: Recipe) -> Prepared:
    """Everything that can be refused is refused here, before a weight is read."""
    if Path(recipe.model).expanduser().is_dir():
        refuse_nested(recipe.out, Path(recipe.model).expanduser())
    refuse_foreign(recipe.out)  # before anything is downloaded
    return prepare_search(recipe, [] if recipe.bits is None else [recipe.bits])


def prepare_search(recipe: Recipe, budgets: Sequence[float]) -> Prepared:
    """The same but for the folder of the result, which a search alone does not have.

    budgets: the bits a weight that are searched for; none where nothing is.
    """
    device = device_named(recipe.device)
    formats = {name: named(name, FORMATS, "format")() for name in recipe.formats}
    tuner = named(recipe.tuner, TUNERS, "tuner").of(recipe.tuning())
    checkpoint = as_original(Checkpoint(recipe.model))
    stored = stored_dtype(checkpoint)
    forced = [format.dtype for format in formats.values() if format.dtype is not None]
    asked = recipe.dtype if recipe.dtype != "auto" else next(iter(forced), stored)
    dtype = "fp16" if asked == "fp16" else "bf16"
    skeleton, weights = open_model(checkpoint, device=device, dtype=computed_in(DTYPES[dtype], device))
    weights = replace(weights, through=DTYPES[dtype])
    if weights.plan is not None:
        raise CheckpointError(f"{checkpoint.path} is quantized already. Quantize the original model instead")
    notes = _unused(checkpoint, skeleton)
    space = None
    if budgets:
        space, reasons, told = spaced(recipe, skeleton, dtype, formats=list(formats.values()), budgets=budgets)
        plan, notes = space.plan, (*notes, *told)
    else:
        plan, reasons, told = planned(recipe, skeleton, dtype)
        notes = (*notes, *told)
    skeleton = skeleton.untie() if plan.untied else skeleton
    refuse_unheld(plan, skeleton, formats.values(), checkpoint)
    ready = Prepared(recipe, skeleton, weights, plan, reasons, formats, tuner, Text(), (), space).planned(plan)
    reads = ready.text_streams or recipe.rotation_trials > 1 or space is not None
    text, told = _calibration(recipe, skeleton, checkpoint.path, searched=space is not None) if reads else (Text(), ())
    notes = (*told, *notes, *notes_on(plan, skeleton.arch, recipe.formats), *notes_of_files(formats.values(), checkpoint))
    if isinstance(checkpoint, Dequantized):
        notes = (*notes, "the model is published in FP8: its weights are read as floats, and its activations are not rounded")
    if dtype != stored:
        why = f", which readers of {', '.join(recipe.formats)} hold scales in" if dtype in forced else ""
        notes = (
            *notes,
            f"the model is stored in {stored}; the result, and the model that is measured on the way, is in {dtype}{why}",
        )
    if reads and weights.dtype != weights.held:
        notes = (*notes, f"this CPU has no products of {dtype}: what is computed on the way is in fp32, of weights in {dtype}")
    return replace(ready, text=text, notes=notes)


def refuse_unheld(plan: Plan, skeleton: Skeleton, formats: Iterable[Format], checkpoint: Checkpoint) -> None:
    """Raise FormatError where a format cannot hold a plan, or the one file that it makes not the model of `checkpoint`."""
    for format in formats:
        format.check(plan, skeleton.linears, skeleton.fused)
        if format.container is not None:
            format.container.refuse(checkpoint.config, checkpoint.path)


def notes_of_files(formats: Iterable[Format], checkpoint: Checkpoint) -> tuple[str, ...]:
    """What to say of the files of whole models that formats make of `checkpoint`."""
    return tuple(note for made in formats if made.container is not None for note in made.container.notes(checkpoint.config))


def bytes_written(plan: Plan, skeleton: Skeleton, formats: Sequence[Format], *, kept: int) -> int:
    """What a plan takes on the disk in all of `formats`, without headers and small files. kept: bytes of what has no codes."""
    # What becomes one file is there twice until that is whole.
    streams = [*formats, *(format for format in formats if format.container is not None)]
    shapes = skeleton.matrices(plan.quantized)
    bits = sum(stream.bits(plan.linears[name], shapes[name]) for stream in streams for name in plan.quantized)
    return bits // 8 + len(streams) * kept


def notes_on(plan: Plan, arch: Arch, formats: Iterable[str]) -> tuple[str, ...]:
    """What to say of a plan's rotations before the run begins."""
    notes = []
    online = [name for name, row in plan.linears.items() if row.online is not None]
    spaces = {rotation.space for rotation in plan.rotations}
    if plan.untied:
        notes.append(
            "the embeddings and the output head share one weight in the original. A rotation of the residual stream changes "
            "them differently, so the result has both, and is larger by the head"
        )
    if "residual" in spaces and not arch.folds("residual"):
        notes.append(
            "R1 cannot be folded into this family: norms with gains write its residual stream. The linears that read the "
            f"stream turn their inputs while they run, {len(online)} in all"
        )
    if "qk" in spaces and plan.kv is None:
        notes.append("R3 turns keys for a quantized cache, and the cache is not quantized: it changes nothing. Add --kv KV4")
    if "compressed-tensors" in formats and not read_alone(plan):
        notes.append(
            "transformers alone does not read the experts of this compressed-tensors folder as they are: it keeps their "
            "activations in 16 bits, and decodes not all of their schemes. Load it with bitlathe.load, or with `import "
            "bitlathe.hf` before AutoModelForCausalLM"
        )
    if "fp8" in formats:
        notes.append(
            "transformers rounds the activations of this fp8 folder on a GPU that has FP8 (compute capability 8.9); on a CPU "
            "or an older GPU it dequantizes the weights and keeps activations in 16 bits. bitlathe.load rounds them everywhere"
        )
    running = [name for name, row in plan.linears.items() if row.input is not None or row.online is not None]
    if running and "dense" in formats:
        notes.append(
            f"{len(running)} linears turn or round their inputs while they run, which other programs would leave out: of the "
            "dense folder these linears are no ordinary tensors, so that transformers alone stops at them. Load it with "
            "bitlathe.load, or with `import bitlathe.hf` before AutoModelForCausalLM"
        )
    if arch.experts is not None and any(f".{arch.experts}." in name for name in online):
        notes.append("serving engines fuse experts, and are not known to turn their inputs: leave R4 out of --rotate for them")
    if online and "compressed-tensors" in formats:
        notes.append(
            f"{len(online)} linears turn their inputs while they run. The compressed-tensors folder says so in its "
            "transform_config, and transformers alone ignores it and would be silently wrong: load it with bitlathe.load, or "
            "with `import bitlathe.hf` before AutoModelForCausalLM"
        )
    return tuple(notes)


def _unused(checkpoint: Checkpoint, skeleton: Skeleton) -> tuple[str, ...]:
    """What to say of tensors that the model has no place for; one that belongs to a linear is refused."""
    unused = [
        name for name in checkpoint.expect(skeleton.shapes) if name not in skeleton.tied and not name.endswith("inv_freq")
    ]
    astray = [name for name in unused if name.rpartition(".")[0] in skeleton.linears]
    if astray:
        raise CheckpointError(
            f"{checkpoint.path} holds {astray[0]}, which the linear of its config.json does not have: without it the model is "
            "another one. Take the config.json that belongs to these weights"
        )
    shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
    return (
        (f"the model has no place for these tensors of the checkpoint, and the result goes without them: {shown}",)
        if unused
        else ()
    )


def refuse_nested(out: Path, source: Path) -> None:
    """Raise OutputError where the result's folder and the model's are one inside of the other."""
    here, there = out.resolve(), source.resolve()
    if here.is_relative_to(there):
        raise OutputError(f"--out {out} is the model's own folder, or inside it. Choose another folder for the result")
    if there.is_relative_to(here):
        # The model may be an earlier result in `out`, and a restart would delete it.
        raise OutputError(f"the model {source} is inside of --out {out}. Choose another folder for the result")


def _calibration(recipe: Recipe, skeleton: Skeleton, folder: Path, *, searched: bool) -> tuple[Text, tuple[str, ...]]:
    """The text's windows, and what to say of them. searched: some are for a search, and some are held out from it."""
    tokenizer = tokenizer_of(folder)
    sizes = (recipe.search.tokens, recipe.search.held_out) if searched else (0, 0)
    score, hold = (ceil(tokens / recipe.seqlen) for tokens in sizes)
    wanted = max(recipe.samples, score) + hold
    documents = text_of(recipe.calib, "calibration", characters=characters_for(wanted, recipe.seqlen))
    tokens = windows_of(tokenizer, documents, seqlen=recipe.seqlen, count=wanted, seed=recipe.seed)
    refuse_strange_tokens(tokens, skeleton.model.config.vocab_size, folder)
    if searched and len(tokens) < 2:
        raise CalibrationError(
            f"the calibration text {recipe.calib!r} holds one window of {recipe.seqlen} tokens, and a search needs another "
            "one to measure on. Use a longer text, or a shorter --seqlen"
        )
    # A short text keeps a quarter for that.
    hold = min(hold, max(1, len(tokens) // 4))
    rest = tokens[: len(tokens) - hold]
    text = Text(rest[: recipe.samples], rest[:score], tokens[len(rest) :]) if searched else Text(tokens)
    assert text.tokens is not None
    if len(text.tokens) == recipe.samples:
        return text, ()
    rest_of_it = f" and {hold} to measure a search on" if searched else ""
    return text, (
        f"the calibration text holds {len(tokens)} windows of {recipe.seqlen} tokens, fewer than --samples {recipe.samples}"
        f"{rest_of_it}: all of them are used",
    )
