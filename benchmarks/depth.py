"""Peak resident memory of quantizing two generated models that differ in depth alone.

Weights are streamed, so the deeper model may need next to nothing more. Random weights: this shows memory and nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitlathe.io.checkpoint import find_folder
from bitlathe.io.sizes import human
from bitlathe.report import inspect

_DEPTHS = (8, 32)
_RUNS = 3
_WIDTH, _MID = 512, 1536
_QUANTIZE = (
    "import sys, json, torch, bitlathe; from bitlathe.report import peak_memory; "
    "fields = {'calib': 'builtin', 'samples': 4, 'seqlen': 128, 'batch_size': 4, **json.loads(sys.argv[3])}; "
    "bitlathe.quantize(sys.argv[1], out=sys.argv[2], scores=sys.argv[2] + '-scores', **fields); "
    "print(peak_memory(torch.device('cpu'))[0])"
)
_RUN: dict[str, dict[str, object]] = {
    "rtn": {"tuner": "rtn"},
    "signround, 2 steps": {"tuner": "signround", "iters": 2},
    # What every block receives is kept for the way back: beyond the budget for hidden states it lies in a file.
    "search, then rtn": {
        "tuner": "rtn",
        "bits": 4.5,
        "schemes": "W3A16,W4A16,W8A16",
        "search": {"tokens": 512, "held_out": 256},
        "memory": {"activations": "256KiB"},
    },
}


def table() -> Iterator[str]:
    """One row for every tuner: peaks at both depths, and what the deeper one needs more for each extra byte of weights."""
    yield f"| tuner | {' | '.join(f'peak, {depth} blocks' for depth in _DEPTHS)} | extra weights | more memory | share |"
    yield "|---|" + "---|" * (len(_DEPTHS) + 3)
    with tempfile.TemporaryDirectory() as folder:
        models = [_model(Path(folder) / str(depth), depth) for depth in _DEPTHS]
        extra = inspect(models[1])["bytes"] - inspect(models[0])["bytes"]
        for name, fields in _RUN.items():
            peaks: list[list[int]] = [[], []]
            for _ in range(_RUNS):
                for index, model in enumerate(models):
                    peaks[index].append(_peak(model, fields))
            small, large = (median(column) for column in peaks)
            more = large - small
            yield f"| {name} | {human(small)} | {human(large)} | {human(extra)} | {human(max(more, 0))} | {more / extra:.1%} |"


def _model(folder: Path, depth: int) -> Path:
    source = find_folder("builtin")
    config = AutoConfig.from_pretrained(source)
    config.update({"hidden_size": _WIDTH, "intermediate_size": _MID, "num_hidden_layers": depth, "head_dim": 64})
    config.update({"num_attention_heads": _WIDTH // 64, "num_key_value_heads": _WIDTH // 128})
    torch.manual_seed(depth)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copyfile(source / name, folder / name)
    return folder


def _peak(model: Path, fields: dict[str, object]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _QUANTIZE, str(model), f"{folder}/q", json.dumps(fields)]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
