"""From a recipe to a plan that is known to be possible, without a weight being read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import Tensor

from bitlathe.arch import Arch
from bitlathe.errors import CheckpointError, OutputError, PlanError
from bitlathe.formats import FORMATS
from bitlathe.formats.base import Format
from bitlathe.formats.ct_experts import read_alone
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.io.writer import refuse_foreign
from bitlathe.model.calib import characters_for, refuse_strange_tokens, text_of, tokenizer_of, windows_of
from bitlathe.model.fold import edits_of
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.source import device_named, open_model, stored_dtype
from bitlathe.model.weights import DTYPES, Weights
from bitlathe.numerics.scheme import KV_SCHEMES, static
from bitlathe.plan import LayerPlan, Plan, resolve, rotated, with_inputs
from bitlathe.recipe import Recipe
from bitlathe.registry import resolve as named
from bitlathe.tune import TUNERS
from bitlathe.tune.base import Tuner
from bitlathe.tune.signs import drawn_for
from bitlathe.version import VERSION

# Why a router is kept.
_ROUTER = "routers choose the experts, and are never quantized"

# The stream of shards that a resumed run reads its finished blocks from, whatever formats are asked for.
CODES = "native"


@dataclass(frozen=True)
class Prepared:
    """A recipe that has been found possible: everything that is known before the first weight is read."""

    recipe: Recipe
    skeleton: Skeleton
    weights: Weights
    plan: Plan
    kept: dict[str, str]
    formats: dict[str, Format]
    tuner: Tuner
    tokens: Tensor | None
    notes: tuple[str, ...]

    @property
    def text_streams(self) -> int:
        """Streams of hidden states: what the tuner wants, and one to measure static scales of activations on."""
        measured = any(static(row.input) for row in self.plan.linears.values())
        return max(self.tuner.streams, int(measured))

    @property
    def streams(self) -> tuple[str, ...]:
        """What is written while the run goes on: every format asked for, and the codes to resume from."""
        return tuple(dict.fromkeys((CODES, *self.formats)))

    def planned(self, plan: Plan) -> Prepared:
        """The same with another plan of the same linears, and the weights read as it says."""
        return replace(self, plan=plan, weights=replace(self.weights, plan=plan, edits=edits_of(self.skeleton, plan)))

    def bytes_needed(self) -> int:
        """What the streams and spilled hidden states will take on the disk, about."""
        linears = self.skeleton.linears
        coded = sum(scheme.bits(linears[name]) // 8 for name, scheme in self.plan.quantized.items())
        dense = sum(2 * prod(linears[name]) for name in self.plan.quantized)
        names = {f"{name}.weight" for name in self.plan.quantized}
        kept = sum(2 * prod(shape) for name, shape in self.skeleton.shapes.items() if name not in names)
        # A format without a configuration of its own is an ordinary checkpoint.
        plain = sum(format.config(self.plan) is None for format in self.formats.values())
        return len(self.streams) * (coded + kept) + plain * (dense - coded) + self._bytes_spilled()

    def _bytes_spilled(self) -> int:
        if self.tokens is None:
            return 0
        # As `Budget` does it: a stream of hidden states lies in memory as long as there is room for the whole of it.
        stream = self.tokens.numel() * self.skeleton.model.config.hidden_size * self.weights.dtype.itemsize
        return stream * max(0, self.text_streams - self.recipe.memory.activations // stream)

    def fingerprint(self) -> dict[str, str]:
        """What the result depends on, part by part."""
        text = b"" if self.tokens is None else self.tokens.numpy().tobytes()
        return {
            **{f"recipe.{name}": json.dumps(value) for name, value in self.recipe.settings().items()},
            "rotations": json.dumps([rotation.model_dump() for rotation in self.plan.rotations]),
            "device": self.weights.device.type,
            "model": self.weights.checkpoint.fingerprint(),
            "calibration": hashlib.sha256(text).hexdigest(),
            "version": f"bitlathe {VERSION}, torch {torch.__version__}, transformers {transformers.__version__}",
        }


def prepare(recipe: Recipe) -> Prepared:
    """Everything that can be refused is refused here, before a weight is read."""
    device = device_named(recipe.device)
    formats = {name: named(name, FORMATS, "format")() for name in recipe.formats}
    tuner = named(recipe.tuner, TUNERS, "tuner").of(recipe.tuning())
    if Path(recipe.model).expanduser().is_dir():
        _refuse_nested(recipe.out, Path(recipe.model).expanduser())
    refuse_foreign(recipe.out)  # before anything is downloaded
    checkpoint = Checkpoint(recipe.model)
    stored = stored_dtype(checkpoint)
    asked = recipe.dtype if recipe.dtype != "auto" else stored
    dtype = "fp16" if asked == "fp16" else "bf16"
    skeleton, weights = open_model(checkpoint, device=device, dtype=DTYPES[dtype])
    if weights.plan is not None:
        raise CheckpointError(f"{checkpoint.path} is quantized already. Quantize the original model instead")
    notes = _unused(checkpoint, skeleton)
    plan, reasons = _planned(recipe, skeleton, dtype)
    skeleton = skeleton.untie() if plan.untied else skeleton
    for format in formats.values():
        format.check(plan, skeleton.linears, skeleton.fused)
    ready = Prepared(recipe, skeleton, weights, plan, reasons, formats, tuner, None, ()).planned(plan)
    reads = ready.text_streams or recipe.rotation_trials > 1
    tokens, told = _calibration(recipe, skeleton, checkpoint.path) if reads else (None, ())
    notes = (*told, *notes, *notes_on(plan, skeleton.arch, recipe.formats))
    if dtype != stored:
        notes = (*notes, f"the model is stored in {stored}; the result and everything measured on the way is in {dtype}")
    return replace(ready, tokens=tokens, notes=notes)


def _planned(recipe: Recipe, skeleton: Skeleton, dtype: Literal["bf16", "fp16"]) -> tuple[Plan, dict[str, str]]:
    """What happens to every linear, and why some are kept."""
    wanted = recipe.rotations()
    folds = skeleton.arch.folds("residual")
    unties = folds and any(rotation.space == "residual" for rotation in wanted)
    parted = "--rotate R1" if folds else ""
    shared = {} if unties else {name.removesuffix(".weight"): parted for name in skeleton.tied}
    head = skeleton.arch.head
    kept = {head: "shares its weight with the embeddings" if shared else "the output head stays in 16 bits unless asked for"}
    shapes = {name: shape for name, shape in skeleton.linears.items() if not skeleton.rows[name].router}
    plan, reasons = resolve(shapes, recipe.scheme, recipe.overrides, dtype=dtype, kept=kept, tied=shared)
    rows = {name: plan.linears.get(name, LayerPlan()) for name in skeleton.linears}
    plan = plan.model_copy(update={"linears": rows})
    reasons |= {name: _ROUTER for name in rows if name not in shapes}
    if not plan.quantized:
        raise PlanError("every linear is kept in 16 bits, so there is nothing to do: give a scheme, or fewer overrides")
    plan = with_inputs(plan, asymmetric=recipe.act_asymmetric, clip=recipe.act_clip)
    if recipe.kv is not None:
        plan = plan.model_copy(update={"kv": KV_SCHEMES[recipe.kv].served_in(dtype)})
    plan = rotated(plan, wanted, skeleton.arch, skeleton.rows, widths=skeleton.widths, tied=bool(skeleton.tied))
    if recipe.rotation_trials > 1 and not drawn_for(skeleton, plan):
        raise PlanError(
            "--rotation-trials keeps the random signs with the least error of the activations, and no linear of a block both "
            "rounds its activations and reads what a random rotation turns. Leave it out, or ask for a scheme such as W4A4 "
            "where R1, R2 or R4:random turns"
        )
    return plan, reasons


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


def _refuse_nested(out: Path, source: Path) -> None:
    here, there = out.resolve(), source.resolve()
    if here.is_relative_to(there):
        raise OutputError(f"--out {out} is the model's own folder, or inside it. Choose another folder for the result")
    if there.is_relative_to(here):
        # The model may be an earlier result in `out`, and a restart would delete it.
        raise OutputError(f"the model {source} is inside of --out {out}. Choose another folder for the result")


def _calibration(recipe: Recipe, skeleton: Skeleton, folder: Path) -> tuple[Tensor, tuple[str, ...]]:
    tokenizer = tokenizer_of(folder)
    documents = text_of(recipe.calib, "calibration", characters=characters_for(recipe.samples, recipe.seqlen))
    tokens = windows_of(tokenizer, documents, seqlen=recipe.seqlen, count=recipe.samples, seed=recipe.seed)
    refuse_strange_tokens(tokens, skeleton.model.config.vocab_size, folder)
    if len(tokens) < recipe.samples:
        return tokens, (
            f"the calibration text holds {len(tokens)} windows of {recipe.seqlen} tokens, fewer than --samples "
            f"{recipe.samples}: all of them are used",
        )
    return tokens, ()
