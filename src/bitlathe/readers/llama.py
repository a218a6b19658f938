"""llama.cpp, through llama-cpp-python."""

from __future__ import annotations

from pathlib import Path

import torch
from llama_cpp import Llama  # pyright: ignore[reportMissingImports]
from torch import Tensor

from bitlathe.io.gguf import FILE
from bitlathe.readers.base import Opened


class _Engine:
    """Logits alone: the engine does not show weights."""

    def __init__(self, folder: Path) -> None:
        self.engine = Llama(str(folder / FILE), n_ctx=512, logits_all=True, verbose=False, type_k=0, type_v=0)

    def weight(self, linear: str, inputs: int) -> Tensor | None:
        """None; see above."""

    def logits(self, tokens_BT: Tensor) -> Tensor | None:
        """See `Opened`."""
        rows = []
        for sequence in tokens_BT:
            self.engine.reset()
            self.engine.eval(sequence.tolist())
            rows.append(torch.from_numpy(self.engine.scores[: len(sequence)].copy()))
        return torch.stack(rows).float()


def opened(folder: Path) -> Opened:
    """A GGUF folder."""
    return _Engine(folder)
