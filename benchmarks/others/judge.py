"""One judge for all: bitlathe.evaluate reads the folders, and logits are measured by the same figures over the same windows."""

from __future__ import annotations

from collections import Counter
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
    names = {"kl": "kl_mean", "kl_99": "kl_99", "perplexity": "perplexity", "top1": "top1_agreement"}
    return {"bits": bits, **{name: said[long]["value"] for name, long in names.items()}}


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
    nll, kl, agree = [], [], []
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice("logits")
        for row, window in enumerate(windows):
            log_q = F.log_softmax(stored[row].to(device), dim=-1)
            log_p = F.log_softmax(original(window[None].to(device)).logits[0], dim=-1)
            nll.append(F.nll_loss(log_q[:-1], window[1:].to(device), reduction="none").double().cpu())
            kl.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().cpu())
            agree.append((log_q.argmax(-1) == log_p.argmax(-1)).double().cpu())
    every: Any = torch.cat(kl)
    at = 1 + round(0.99 * (every.numel() - 1))
    return {
        "kl": every.mean().item(),
        "kl_99": every.kthvalue(at).values.item(),
        "perplexity": torch.cat(nll).mean().exp().item(),
        "top1": torch.cat(agree).mean().item(),
    }
