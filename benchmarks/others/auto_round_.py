"""auto-round, in its own environment: SignRound with `steps` steps, and its other settings as they come.

W2A16G32 is tuned by its extension for low widths. W4A4 is its rotated round-to-nearest (R1, R2, R4): no folder holds
activations in 4 bits together with a rotation that runs online, so that one is judged by the live model.
"""

from __future__ import annotations

from typing import Any

import torch
from auto_round import AutoRound
from auto_round.algorithms.transforms.spinquant.preprocessor import SpinQuantConfig

from benchmarks.others.job import Job, Made, answer

# Our scheme -> its name, the format that is written, and what else it is told.
SCHEMES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "W4A16": ("W4A16", "auto_round", {}),
    "W3A16": ("W3A16", "auto_round", {}),
    "W2A16G32": ("W2A16G32", "auto_round", {"enable_alg_ext": True}),
    "MXFP4": ("MXFP4", "llm_compressor", {}),
    "NVFP4": ("NVFP4", "llm_compressor", {}),
    "W4A4": ("INT4", "fake", {}),
}


def work(job: Job) -> Made:
    """Every window is one sequence without padding."""
    scheme, format, extra = SCHEMES[job.scheme]
    tokens = job.windows()
    samples, seqlen = tokens.shape
    steps = job.steps
    if job.scheme == "W4A4":
        rotation = SpinQuantConfig(r1=True, r2=True, r4=True, online_r1_rotation=False)
        steps, extra = 0, {"alg_configs": ["rtn", rotation]}
    tool = AutoRound(
        job.model,
        scheme=scheme,
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens],
        iters=steps,
        seqlen=seqlen,
        nsamples=samples,
        batch_size=job.batch,
        seed=job.seed,
        device_map=job.device,
        **extra,
    )
    model, folder = tool.quantize_and_save(job.out, format=format)
    if format == "fake":
        return Made(model=model, bits=_bits(model))
    return Made(folder if isinstance(folder, str) else folder[0])


def _bits(model: torch.nn.Module) -> float:
    """Of codes of 4 bits with a 16-bit scale a row."""
    shapes = [layer.weight.shape for name, layer in model.named_modules() if name.endswith("_proj.orig_layer")]
    return 4 + 16 * sum(rows for rows, _ in shapes) / sum(rows * columns for rows, columns in shapes)


if __name__ == "__main__":
    answer(work, "auto-round")
