"""Rotations and quantized activations: what they gain in accuracy, whether they leave the function alone, what they cost."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import bitlathe
from benchmarks.clock import now
from benchmarks.outliers import Outliers, add_outliers, spread
from benchmarks.quality import SETTINGS, TUNERS, WINDOWS
from bitlathe.arch import ARCHS
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.block import attach_cache
from bitlathe.model.fold import edits_of
from bitlathe.model.hidden import Budget
from bitlathe.model.source import device_named, open_model
from bitlathe.model.walk import begin, walk
from bitlathe.plan import Plan
from bitlathe.prepare import prepare
from bitlathe.recipe import merge

# What the model is turned by -> fields of the recipe.
Turns = Mapping[str, Mapping[str, object]]

WHOLE: Turns = {
    "none": {},
    "R1, R2, R4": {"rotate": "R1,R2,R4"},
    "R1, R2, R4, clip .9": {"rotate": "R1,R2,R4", "act_clip": 0.9},
}
BLOCKS: Turns = {"none": {}, "R1, R2, R4 by 32": {"rotate": "R1,R2,R4", "rotation_block": 32}}

# Weights that are rounded without text, where rounding is beside the point.
_ROUGH: dict[str, Any] = {"scheme": "W4A16_CHANNEL", "tuner": "rtn", "rtn": {"scale": "min-max"}}
# Nothing here is a power of two but the block that R4 finds in 320.
_RANDOM = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.07,  # 1 / sqrt(hidden size): every linear keeps the length of what it reads
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SHAPES = ((4, 512), (1, 1))
# The two sides take turns, a pass each, so that what else the machine does falls on both.
_TURNS = 40


@dataclass(frozen=True)
class Source:
    """What is measured. settings: fields of the recipe that all rows share; windows: of 512 tokens to evaluate on."""

    model: str
    calib: str
    text: str
    device: str
    settings: Mapping[str, object] = field(default_factory=lambda: SETTINGS)
    windows: int = WINDOWS


def accuracy(source: Source, schemes: tuple[str, ...], turns: Turns) -> Iterator[str]:
    """One row for every scheme, rotation and tuner, each as soon as it is there; then ratios to the last of each scheme."""
    yield "| scheme | rotation | tuner | KL mean | standard error | KL 99% | perplexity | top-1 | seconds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    found: dict[str, dict[str, float]] = {}
    for scheme in schemes:
        for turn, rotated in turns.items():
            for tuner, tuned in TUNERS:
                figures = _measure(source, {"scheme": scheme, **rotated, **tuned})
                found.setdefault(scheme, {})[f"{turn} | {tuner}"] = figures[0]
                row = "{:.5f} | {:.5f} | {:.4f} | {:.3f} | {:.4f} | {:.0f}".format(*figures)
                yield f"| {scheme} | {turn} | {tuner} | {row} |"
    yield "\n| scheme | rotation | tuner | its share of the KL of | |\n|---|---|---|---|---|"
    for scheme, means in found.items():
        last, best = means.popitem()
        for name, mean in means.items():
            yield f"| {scheme} | {last} | {name.replace(' | ', ', ')} | {best / mean:.3f} |"


def with_outliers(source: Source, schemes: tuple[str, ...], turns: Turns) -> Iterator[str]:
    """The same on the model with all kinds of outliers, in 8 channels that are 30 times larger."""
    with tempfile.TemporaryDirectory() as folder:
        made = f"{folder}/outliers"
        add_outliers(source.model, made, Outliers(text=source.calib))
        before, after = (spread(model, source.calib) for model in (source.model, made))
        ratios = ", ".join(f"{name} {ratio:.1f} to {after[name]:.1f}" for name, ratio in before.items())
        yield f"Largest over median RMS of the channels that are read, before and after: {ratios}.\n"
        yield from accuracy(replace(source, model=made), schemes, turns)


def unmoved(model: str, *, device: str) -> Iterator[str]:
    """How far float32 logits move under all rotations: of the model, and of a random one of every family."""
    yield "| model | R1 | logits moved, all | worst token |"
    yield "|---|---|---|---|"
    place = device_named(device)
    with tempfile.TemporaryDirectory() as folder:
        yield _moved("the model", model, place)
        for family in ARCHS:
            yield _moved(f"random {family}", str(_random(Path(folder) / family, family)), place)


def cost(model: str, *, device: str) -> Iterator[str]:
    """Forward passes with R4 online against the same without it: the same loader, the same weights but for the rotation."""
    yield "| dtype | sequences x tokens | without, ms | with R4, ms | ratio, median (middle half) |"
    yield "|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for rotate in ("none", "R4"):
            bitlathe.quantize(model, out=f"{folder}/{rotate}", rotate=rotate, device=device, **_ROUGH)
            models.append(bitlathe.load(f"{folder}/{rotate}", device))
        for dtype in (torch.float32, torch.bfloat16):
            plain, turned = (each.to(dtype) for each in models)
            for shape in _SHAPES:
                tokens = _tokens(shape, plain.config.vocab_size, plain.device)
                first, second, ratios = _alternate(plain, turned, tokens)
                low, middle, high = quantiles(ratios, n=4)
                yield (
                    f"| {str(dtype).removeprefix('torch.')} | {shape[0]} x {shape[1]} | {first:.2f} | {second:.2f} | "
                    f"{middle:.3f} ({low:.3f} to {high:.3f}) |"
                )


def _measure(source: Source, fields: dict[str, Any]) -> tuple[float, ...]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        settings = {**source.settings, **fields, "calib": source.calib, "device": source.device}
        bitlathe.quantize(source.model, out=f"{folder}/q", **settings)
        seconds = time.perf_counter() - started
        found = bitlathe.evaluate(
            f"{folder}/q",
            against=source.model,
            text=source.text,
            seqlen=SETTINGS["seqlen"],
            windows=source.windows,
            device=source.device,
        )
    values = (found[name]["value"] for name in ("kl_99", "perplexity", "top1_agreement"))
    return (found["kl_mean"]["value"], found["kl_mean"]["error"] or 0.0, *values, seconds)


def _moved(name: str, model: str, device: torch.device) -> str:
    with tempfile.TemporaryDirectory() as folder:
        recipe = merge({"model": model, "out": f"{folder}/q", "rotate": "R1,R2,R3,R4", **_ROUGH})
        ready = prepare(recipe)
    checkpoint = Checkpoint(model)
    tokens = _tokens((8, 128), ready.skeleton.model.config.vocab_size, torch.device("cpu"))
    before, after = (_logits(checkpoint, plan, tokens, device).double() for plan in (None, ready.plan))
    apart, size = (after - before).norm(dim=-1), before.norm(dim=-1)
    folded = "folded" if ready.skeleton.arch.folds("residual") else "online"
    return f"| {name} | {folded} | {apart.norm() / size.norm():.1e} | {(apart / size).max():.1e} |"


@torch.no_grad()
def _logits(checkpoint: Checkpoint, plan: Plan | None, tokens_NT: Tensor, device: torch.device) -> Tensor:
    """Logits [sequences, tokens, vocabulary] in float32, of the model turned as the plan says and not rounded."""
    skeleton, weights = open_model(checkpoint, device=device, dtype=torch.float32)
    if plan is not None:
        skeleton = skeleton.untie() if plan.untied else skeleton
        weights = replace(weights, plan=plan, edits=edits_of(skeleton, plan))
    with tempfile.TemporaryDirectory() as folder:
        start = begin(skeleton, weights, tokens_NT, Budget(2**32, Path(folder)), streams=1)
        for step in walk(skeleton, weights, start, batch_size=len(tokens_NT)):
            if plan is not None:
                # Without a scheme of the cache a run leaves R3 out.
                attach_cache([step.block.module.get_submodule(skeleton.arch.attention)], plan)
        return skeleton.head(weights)(start.streams[0][:])


@torch.no_grad()
def _random(folder: Path, family: str) -> Path:
    """A random float32 model, with gains and biases that a wrong fold would show."""
    known = {key: value for key, value in _RANDOM.items() if (family, key) != ("phi3", "head_dim")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **known), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(parameter, 0.5, 0.1)
    model.save_pretrained(folder)
    return folder


def _alternate(plain: PreTrainedModel, turned: PreTrainedModel, tokens_NT: Tensor) -> tuple[float, float, list[float]]:
    """Milliseconds a pass of both sides, medians, and their ratio turn by turn; the first turns warm up."""
    pairs = [(_milliseconds(plain, tokens_NT), _milliseconds(turned, tokens_NT)) for _ in range(_TURNS + 3)][3:]
    return median(a for a, _ in pairs), median(b for _, b in pairs), [b / a for a, b in pairs]


def _milliseconds(model: PreTrainedModel, tokens_NT: Tensor) -> float:
    started = now()
    with torch.inference_mode():
        model(tokens_NT, use_cache=False)
    return (now() - started) * 1000


def _tokens(shape: tuple[int, int], vocabulary: int, device: torch.device) -> Tensor:
    """Random tokens [sequences, tokens], the same ones every time."""
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)
