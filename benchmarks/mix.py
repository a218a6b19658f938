"""Mixed precision: what a mix gains over uniform schemes, how well scores foretell, and what scoring costs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import exp, log
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import bitlathe
from benchmarks.clock import now
from benchmarks.quality import SETTINGS, WINDOWS
from benchmarks.rotation import Source
from bitlathe.autoscheme.ground import Ground
from bitlathe.autoscheme.kept import Kept
from bitlathe.autoscheme.measure import measure
from bitlathe.autoscheme.score import score
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.calib import characters_for, text_of, tokenizer_of, windows_of
from bitlathe.model.hidden import Budget
from bitlathe.model.walk import begin, walk
from bitlathe.plan import KEEP
from bitlathe.prepare import prepare_search
from bitlathe.recipe import merge
from bitlathe.report import inspect
from bitlathe.searching import ground_of, sweep

BUDGETS = (2.5, 3.0, 3.5, 4.5, 5.0, 6.0)
WEIGHTS = "W2A16G64,W3A16,W4A16,W5A16,W6A16,W8A16"
# What is rounded -> fields of the recipe, with a way to keep a linear, so that one group can be quantized alone.
_KINDS: dict[str, dict[str, Any]] = {
    "weights": {"schemes": f"{WEIGHTS},keep"},
    "weights, rotated": {"schemes": f"{WEIGHTS},keep", "rotate": "R1,R2,R4"},
    "INT4, INT8, rotated": {"schemes": "INT4,INT8,keep", "rotate": "R1,R2,R4"},
}
_RANKED_ON = 8  # windows of the evaluation text
_RANKED = ("weights", "INT4, INT8, rotated")
_AT_ONCE = 16
_TURNS = 5


def gains(source: Source) -> Iterator[str]:
    """KL of the mixes and of the uniform schemes, all rounded to nearest on searched ranges, written, and evaluated."""
    yield "| | bits | KL mean | standard error | predicted | best uniform within | interpolated | ratio |"
    yield "|---|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        found = sweep(_asked(source, {"schemes": WEIGHTS, "scores": f"{folder}/scores"}), BUDGETS, lambda event: None)
        uniform = []
        for scheme in WEIGHTS.split(","):
            bits, kl, error = _evaluated(source, {"scheme": scheme})
            uniform.append((bits, kl))
            yield f"| {scheme} for all | {bits:.3f} | {kl:.5f} | {error:.5f} | | | | |"
        ratios = []
        for plan, record in zip(found.plans, found.records, strict=True):
            bits, kl, error = _evaluated(source, {"plan": plan})
            within = min(loss for size, loss in uniform if size <= record["asked"])
            between = _interpolated(uniform, record["asked"])
            ratios.append(kl / between)
            yield (
                f"| {record['asked']:g} asked for | {bits:.4f} | {kl:.5f} | {error:.5f} | {record['kl']:.5f} | {within:.5f} | "
                f"{between:.5f} | {ratios[-1]:.3f} |"
            )
        yield f"\nMean ratio to the interpolation of log KL between the neighbouring uniform schemes: {mean(ratios):.3f}."


def foretold(source: Source) -> Iterator[str]:
    """Rank correlation of scores with the true KL of one group quantized alone, over all groups and options."""
    yield "| rounded | groups | options | rank correlation | correlation of logs | true / predicted, median (10% to 90%) |"
    yield "|---|---|---|---|---|---|"
    for kind in _RANKED:
        with tempfile.TemporaryDirectory() as folder, Kept(Path(folder), {}) as kept:
            ground = _ground(source, _KINDS[kind])
            space = ground.space
            score(ground, kept, lambda *_: None)
            pairs = [(group, option) for group in space.groups for option in space.options if option != KEEP]
            nothing = dict.fromkeys(space.groups, KEEP)
            plans = [space.planned(nothing), *(space.planned({**nothing, group: option}) for group, option in pairs)]
            kl: list[float] = []
            for first in range(0, len(plans), _AT_ONCE):
                kl += [one.kl for one in measure(ground, kept, plans[first : first + _AT_ONCE], lambda *_: None)]
            # Turned weights are held in 16 bits: what that loses is in all of them.
            true = [one - kl[0] for one in kl[1:]]
            scores = [sum(kept.scores[name][option].loss for name in space.groups[group]) for group, option in pairs]
        ratios = sorted(a / b for a, b in zip(true, scores, strict=True))
        ends = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        options = len(space.options) - 1
        ranks = _correlation(*(torch.tensor(values).argsort().argsort().double() for values in (true, scores)))
        logs = _correlation(*(torch.tensor(values).clamp(min=1e-12).log() for values in (true, scores)))
        spread = f"{median(ratios):.2f} ({ends[0]:.2f} to {ends[1]:.2f})"
        yield f"| {kind} | {len(space.groups)} | {options} | {ranks:.4f} | {logs:.4f} | {spread} |"


def cost(source: Source) -> Iterator[str]:
    """Seconds of scoring all options against one forward pass of the model over the same tokens, the two taking turns."""
    yield "| rounded | options | forward, s | scoring, s | ratio, median (min to max) |"
    yield "|---|---|---|---|---|"
    for kind, fields in _KINDS.items():
        ground = _ground(source, fields)
        pairs = [(_seconds_forward(ground), _seconds_score(ground)) for _ in range(_TURNS + 1)][1:]
        ratios = [b / a for a, b in pairs]
        one, other = (median(column) for column in zip(*pairs, strict=True))
        yield (
            f"| {kind} | {len(ground.space.options)} | {one:.2f} | {other:.2f} | {median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) |"
        )


def _asked(source: Source, fields: Mapping[str, Any]) -> Any:
    own = {"model": source.model, "out": ".", "calib": source.calib, "device": source.device, "seqlen": SETTINGS["seqlen"]}
    return merge({**own, "bits": 8.1, **fields})


def _evaluated(source: Source, fields: Mapping[str, Any]) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"calib": source.calib, "device": source.device, "tuner": "rtn", **SETTINGS}
        bitlathe.quantize(source.model, out=f"{folder}/q", **settings, **fields)
        found = bitlathe.evaluate(
            f"{folder}/q",
            against=source.model,
            text=source.text,
            seqlen=SETTINGS["seqlen"],
            windows=WINDOWS,
            device=source.device,
        )["kl_mean"]
        return inspect(f"{folder}/q")["bits_quantized"], found["value"], found["error"] or 0.0


def _interpolated(uniform: Sequence[tuple[float, float]], bits: float) -> float:
    """What lies at `bits` on the line between the neighbouring points of log KL."""
    ordered = sorted(uniform)
    for (low, a), (high, b) in pairwise(ordered):
        if low <= bits <= high:
            part = (bits - low) / (high - low)
            return exp((1 - part) * log(a) + part * log(b))
    raise ValueError(f"no uniform schemes around {bits} bits")


def _ground(source: Source, fields: Mapping[str, Any]) -> Ground:
    ready = prepare_search(_asked(source, fields), [8.1])
    tokenizer = tokenizer_of(Checkpoint(source.model).path)
    documents = text_of(source.text, "evaluation", characters=characters_for(_RANKED_ON, SETTINGS["seqlen"]))
    held_out = windows_of(tokenizer, documents, seqlen=SETTINGS["seqlen"], count=_RANKED_ON)
    return replace(ground_of(ready), held_out=held_out)


@torch.no_grad()
def _seconds_forward(ground: Ground) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = now()
        start = begin(ground.skeleton, ground.scored, ground.tokens, Budget(ground.memory, Path(folder)), streams=1)
        for _ in walk(ground.skeleton, ground.scored, start, batch_size=ground.batch_size):
            pass
        head = ground.skeleton.head(ground.scored)
        for window in range(len(ground.tokens)):
            for part in head.parts(start.streams[0][window : window + 1]):
                head(part)
        return now() - started


def _seconds_score(ground: Ground) -> float:
    with tempfile.TemporaryDirectory() as folder, Kept(Path(folder), {}) as kept:
        started = now()
        score(ground, kept, lambda *_: None)
        return now() - started


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()
