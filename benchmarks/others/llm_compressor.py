"""GPTQ (Frantar et al., 2022) of llm-compressor, in its own environment, with its settings as they come."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM

from benchmarks.others.job import Job, Made, answer


def scheme_of(name: str) -> dict[str, Any]:
    """Our scheme in the words of the modifier."""
    groups = {"W4A16": (4, 128), "W3A16": (3, 128), "W2A16G32": (2, 32)}
    if name not in groups:
        return {"scheme": name, "targets": "Linear"}
    bits, size = groups[name]
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=size)
    return {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}


def work(job: Job, **settings: Any) -> Made:
    """settings: of the modifier."""
    tokens = job.windows()
    samples, seqlen = tokens.shape
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto", device_map=job.device)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}),
        recipe=[GPTQModifier(ignore=["lm_head"], **scheme_of(job.scheme), **settings)],
        batch_size=job.batch,
        num_calibration_samples=samples,
        max_seq_length=seqlen,
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job.out, save_compressed=True)
    return Made(job.out)


if __name__ == "__main__":
    answer(work, "llmcompressor")
