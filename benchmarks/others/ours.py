"""bitlathe, as a process of its own."""

from __future__ import annotations

from benchmarks.others.job import Job, Made, answer
from bitlathe.pipeline import run
from bitlathe.recipe import Recipe, merge


def recipe_of(job: Job) -> Recipe:
    """The calibration windows are those in the job's file: the same text, the same choice."""
    samples, seqlen = job.windows().shape
    settings = {"samples": samples, "seqlen": seqlen, "iters": job.steps, "batch_size": job.batch, "seed": job.seed}
    said = {"model": job.model, "out": job.out, "scheme": job.scheme, "calib": job.calib, "device": job.device}
    return merge({**said, **settings, **job.fields})


def work(job: Job) -> Made:
    """What `bitlathe.quantize` does."""
    run(recipe_of(job), restart=False, listen=lambda event: None)
    return Made(job.out)


if __name__ == "__main__":
    answer(work, "bitlathe")
