"""Law 4, the other way: a walk back over a checkpoint is the backward pass of the whole model."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.block import Block
from bitlathe.model.hidden import Budget
from bitlathe.model.skeleton import Skeleton
from bitlathe.model.source import open_model
from bitlathe.model.walk import Tape, begin, go_back, record, walk_back
from bitlathe.model.weights import Weights
from families import FAMILIES, VOCABULARY, save_model

CPU = torch.device("cpu")
TOKENS = torch.randint(3, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("one_thread")


class Sums:
    """Gradients by weights, as sums over what the walk shows."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor, gradient: Tensor) -> None:
        found = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        self.sums[name] = self.sums[name] + found if name in self.sums else found


def opened(folder: Path) -> tuple[Skeleton, Weights]:
    return open_model(Checkpoint(folder), device=CPU, dtype=torch.float32)


def gone_back(folder: Path, sums: Sums, *, batch_size: int = 3, budget: int = 2**30) -> Tensor:
    """The gradient of the sum of all squared logits by the embedded tokens; what the linears add goes to `sums`."""
    skeleton, weights = opened(folder)
    budgeted = Budget(budget, folder / "spill")
    start = begin(skeleton, weights, TOKENS, budgeted, streams=1)
    inputs = record(skeleton, weights, start, budgeted, batch_size=batch_size)
    last = start.streams[0]
    gradient = budgeted.allocate(last.shape, torch.float32, CPU)
    head = skeleton.head(weights)
    for batch in last.batches(batch_size):
        gradient[batch] = go_back(head, last[batch], lambda logits: 2 * logits, sums)
    for _ in walk_back(skeleton, weights, Tape(start.calls, inputs, gradient), batch_size=batch_size, watch=lambda block: sums):
        pass
    return gradient[0 : len(TOKENS)]


def plain(folder: Path) -> tuple[PreTrainedModel, Tensor]:
    """The model with gradients of the same loss by its linears, and the gradient by its embedded tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.get_input_embeddings().register_forward_hook(keep)
    model(TOKENS).logits.square().sum().backward()
    (gradient,) = (each.grad for each in embedded)
    assert gradient is not None
    return model, gradient


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_backward_pass(tmp_path: Path, family: str) -> None:
    save_model(tmp_path, family, torch.float32)
    sums = Sums()
    found = gone_back(tmp_path, sums)
    model, wanted = plain(tmp_path)
    assert close(found, wanted)
    own = {name: module.weight.grad for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    compared = [name for name in own if name in sums.sums and name != "lm_head"]
    assert len(compared) >= 6
    for name in compared:
        assert close(sums.sums[name], own[name]), name


def test_batches_and_files_change_nothing_but_the_order_of_sums(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", torch.float32)
    whole = gone_back(tmp_path, Sums())
    assert torch.equal(gone_back(tmp_path, Sums(), budget=0), whole)
    assert close(gone_back(tmp_path, Sums(), batch_size=2), whole)


def test_what_is_not_watched_is_not_seen_and_the_gradient_is_the_same(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", torch.float32)
    skeleton, weights = opened(tmp_path)
    budget = Budget(2**30, tmp_path)
    start = begin(skeleton, weights, TOKENS, budget, streams=1)
    inputs = record(skeleton, weights, start, budget, batch_size=3)
    results, sums = [], Sums()
    for watch in (lambda block: None, lambda block: sums if block.index else None):
        gradient = budget.allocate(start.streams[0].shape, torch.float32, CPU)
        gradient[0:3] = torch.ones(3, 40, 64)
        order = [
            block.index
            for block in walk_back(skeleton, weights, Tape(start.calls, inputs, gradient), batch_size=3, watch=watch)
        ]
        assert order == [1, 0]
        results.append(gradient[0:3].clone())
    assert torch.equal(*results)
    assert all(name.startswith("model.layers.1.") for name in sums.sums)


def test_only_two_blocks_are_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, num_hidden_layers=6)
    skeleton, weights = opened(tmp_path)
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    most = []
    original = Skeleton.block

    def counted(self: Skeleton, *args: Any) -> Block:
        block = original(self, *args)
        alive.add(block.module)
        most.append(len(alive))
        return block

    monkeypatch.setattr(Skeleton, "block", counted)
    budget = Budget(2**30, tmp_path)
    start = begin(skeleton, weights, TOKENS, budget, streams=1)
    inputs = record(skeleton, weights, start, budget, batch_size=3)
    gradient = budget.allocate(start.streams[0].shape, torch.float32, CPU)
    gradient[0:3] = torch.ones(3, 40, 64)
    for block in walk_back(skeleton, weights, Tape(start.calls, inputs, gradient), batch_size=3, watch=lambda block: Sums()):
        del block
    assert len(most) == 12
    assert max(most) <= 2
