"""One float forward pass of the calibration text through the model, by transformers: what other costs are counted in."""

from __future__ import annotations

import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.others.job import Job, Made, answer
from bitlathe.model.source import computed_in


@torch.no_grad()
def work(job: Job) -> Made:
    """In what our runs compute in there, logits included; after a batch to warm up."""
    stored = AutoConfig.from_pretrained(job.model).dtype
    dtype = computed_in(torch.float16 if stored == torch.float16 else torch.bfloat16, torch.device(job.device))
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval().to(job.device)
    batches = job.windows().to(job.device).split(job.batch)
    model(batches[0])
    _settle(job)
    started = time.perf_counter()
    for batch in batches:
        model(batch)
    _settle(job)
    return Made(seconds=time.perf_counter() - started)


def _settle(job: Job) -> None:
    if job.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    answer(work, "transformers")
