"""How far a quantized model is from its original, by scheme and tuner."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import bitlathe
from bitlathe.report import inspect

# The settings of the figures: 128 samples of 512 tokens, 200 steps of 8 sequences; 64 windows of 512 tokens to evaluate on.
SETTINGS = {"samples": 128, "seqlen": 512, "iters": 200, "batch_size": 8}
WINDOWS = 64
SCHEMES = ("W4A16", "W3A16", "W2A16G32")
TUNERS = (
    ("rtn, plain", {"tuner": "rtn", "rtn": {"scale": "min-max"}}),
    ("rtn, searched", {"tuner": "rtn"}),
    ("signround", {"tuner": "signround"}),
)


def table(model: str, calib: str, text: str, *, device: str, seeds: int) -> Iterator[str]:
    """One row for every scheme and tuner, medians over seeds."""
    yield "| scheme | tuner | bits | KL mean | KL 99% | perplexity | original | top-1 | seconds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for scheme in SCHEMES:
        for name, fields in TUNERS:
            rows = [
                _measure(model, calib, text, {"scheme": scheme, "device": device, "seed": seed, **fields})
                for seed in range(seeds)
            ]
            figures = [median(column) for column in zip(*rows, strict=True)]
            yield "| {} | {} | {:.3f} | {:.5f} | {:.4f} | {:.3f} | {:.3f} | {:.4f} | {:.0f} |".format(scheme, name, *figures)


def _measure(model: str, calib: str, text: str, fields: dict[str, object]) -> tuple[float, ...]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "q"
        started = time.perf_counter()
        bitlathe.quantize(model, out=out, calib=calib, **SETTINGS, **fields)
        seconds = time.perf_counter() - started
        found = bitlathe.evaluate(out, against=model, text=text, seqlen=SETTINGS["seqlen"], windows=WINDOWS)
        bits = inspect(out)["bits_quantized"]
    names = ("kl_mean", "kl_99", "perplexity", "perplexity_against", "top1_agreement")
    return (bits, *(found[name]["value"] for name in names), seconds)
