"""One judge for all: bitlathe.evaluate reads the folders, and logits are measured by the same figures over the same windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import bitlathe
from benchmarks.others.job import Answer
from benchmarks.others.tools import ToolFailed
from bitlathe.evaluation.perplexity import Tokenwise, nll, statistics
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.numerics.scheme import described, preset_named
from bitlathe.report import inspect

FIGURES = ("bits", "kl", "kl_99", "perplexity", "top1")


def judged(found: Answer, model: str, scheme: str, *, text: str, windows: Tensor, device: str) -> dict[str, float]:
    """FIGURES of what a tool made. windows [windows, tokens]: the first ones of the evaluation text `text`.

    Raises ToolFailed for a folder that is not what was asked: other schemes, or activations that are rounded otherwise.
    """
    if found.logits is not None:
        return {"bits": found.bits or float("nan"), **by_logits(found.logits, model, windows, device)}
    assert found.folder is not None
    folder = Path(found.folder)
    for path in Checkpoint(model).companions():
        if not (folder / path.name).exists():
            copyfile(path, folder / path.name)
    count, seqlen = windows.shape
    bits = refuse_other(folder, scheme)
    said = bitlathe.evaluate(folder, against=model, text=text, seqlen=seqlen, windows=count, device=device)
    return {"bits": bits, **_named(said)}


def _named(said: Mapping[str, Any]) -> dict[str, float]:
    names = {"kl": "kl_mean", "kl_99": "kl_99", "perplexity": "perplexity", "top1": "top1_agreement"}
    return {name: said[long]["value"] for name, long in names.items()}


def refuse_other(folder: Path, scheme: str) -> float:
    """Bits a quantized weight in the folder's files. Raises ToolFailed where not all but the head have the scheme."""
    preset, found = preset_named(scheme), inspect(folder)
    rows = [row for row in found["linears"] if row["name"] not in ("lm_head",)]
    wanted = (scheme, preset.input and described(preset.input))
    others = Counter((row["scheme"], row["activations"]) for row in rows)
    others.pop(wanted, None)
    if others:
        (name, activations), times = others.most_common(1)[0]
        raise ToolFailed(f"{times} linears have {name} with activations {activations}, not {wanted[0]} with {wanted[1]}")
    return found["bits_quantized"]


@torch.no_grad()
def by_logits(path: str, model: str, windows: Tensor, device: str) -> dict[str, float]:
    """The same figures of logits [windows, tokens, vocabulary], against the original in float32."""
    original = AutoModelForCausalLM.from_pretrained(Checkpoint(model).path, dtype=torch.float32).eval().to(device)
    found = Tokenwise.empty(*windows.shape, compared=True)
    whole = slice(0, windows.shape[1])
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice("logits")
        for row, window in enumerate(windows):
            log_q = F.log_softmax(stored[row].to(device), dim=-1)
            log_p = F.log_softmax(original(window[None].to(device)).logits[0], dim=-1)
            found.take(row, whole, nll(log_q, window[1:]))
            kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            found.compare(row, whole, kl, log_q.argmax(-1) == log_p.argmax(-1))
    return _named(statistics(found))
