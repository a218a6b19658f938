"""GPTQ as it was published, by llm-compressor: the columns in their own order."""

from __future__ import annotations

from functools import partial

from benchmarks.others.job import answer
from benchmarks.others.llm_compressor import work

if __name__ == "__main__":
    answer(partial(work, actorder=None), "llmcompressor")
