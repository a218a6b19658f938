"""Gradients of the likelihood of drawn labels are those of the whole model, block by block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.fisher import gradients_of
from bitlathe.model.hidden import Budget
from bitlathe.model.source import open_model
from families import VOCABULARY, save_model

TOKENS = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("limit", [0, 2**30])
def test_gradients_are_the_whole_models(tmp_path: Path, limit: int) -> None:
    """In memory and in files."""
    save_model(tmp_path, dtype=torch.float32, num_hidden_layers=3)
    skeleton, weights = open_model(Checkpoint(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    found = gradients_of(skeleton, weights, TOKENS, Budget(limit, tmp_path / "spill"), batch_size=2, seed=5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    made: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: made.append(output))
    logits = model(TOKENS).logits
    labels = []
    for window, row in enumerate(logits.detach().softmax(-1)):
        chances = torch.rand(TOKENS.shape[1], generator=torch.Generator().manual_seed(5 * 1_000_003 + window))
        sums = row.cumsum(-1)
        labels.append((sums <= chances[:, None] * sums[:, -1:]).sum(-1))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.cat(labels), reduction="sum")
    expected = torch.autograd.grad(loss, made)
    assert len(found) == len(expected) == 3
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own[slice(None)], wanted, rtol=1e-3, atol=1e-5)


def test_labels_are_the_seeds(tmp_path: Path) -> None:
    save_model(tmp_path)
    skeleton, weights = open_model(Checkpoint(tmp_path), device=torch.device("cpu"), dtype=torch.bfloat16)
    first, same, other = (
        gradients_of(skeleton, weights, TOKENS, Budget(2**30, tmp_path), batch_size=3, seed=seed)[0][slice(None)]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
