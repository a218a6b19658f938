"""Law 4: a walk over a checkpoint is the plain forward pass, bit for bit."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import AutoModelForCausalLM

from bitlathe.errors import UnsupportedModel
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.block import Block
from bitlathe.model.hidden import Budget
from bitlathe.model.source import open_model
from bitlathe.model.walk import begin, walk
from bitlathe.model.weights import Weights
from families import FAMILIES, VOCABULARY, save_model

CPU = torch.device("cpu")
TOKENS = torch.randint(3, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def streamed(folder: Path, dtype: torch.dtype, *, budget: int = 2**30, batch_size: int = 3) -> Tensor:
    skeleton, weights = open_model(Checkpoint(folder), device=CPU, dtype=dtype)
    start = begin(skeleton, weights, TOKENS, Budget(budget, folder / "spill"), streams=1)
    for _ in walk(skeleton, weights, start, batch_size=batch_size):
        pass
    return skeleton.head(weights)(start.streams[0][0:3])


@torch.no_grad()
def plain(folder: Path, dtype: torch.dtype) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_streamed_forward_is_the_plain_forward(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    save_model(tmp_path, family)
    assert torch.equal(streamed(tmp_path, dtype), plain(tmp_path, dtype))


@pytest.mark.parametrize(
    ("stored", "changes"),
    [
        (torch.float16, {}),
        (torch.float32, {}),
        (torch.bfloat16, {"tie_word_embeddings": True}),
        (torch.bfloat16, {"attention_bias": True, "mlp_bias": True}),
    ],
    ids=["fp16", "fp32", "tied", "biases"],
)
def test_sources_of_every_kind(tmp_path: Path, stored: torch.dtype, changes: dict[str, Any]) -> None:
    save_model(tmp_path, "llama", stored, **changes)
    assert torch.equal(streamed(tmp_path, stored), plain(tmp_path, stored))


def test_sharded_source(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(streamed(tmp_path, torch.bfloat16), plain(tmp_path, torch.bfloat16))


def test_hidden_states_on_disk_change_nothing(tmp_path: Path) -> None:
    save_model(tmp_path)
    assert torch.equal(streamed(tmp_path, torch.float32, budget=0), streamed(tmp_path, torch.float32))
    assert list((tmp_path / "spill").iterdir()) == []  # the file has no name, so nothing is left of it


def test_a_second_read_of_a_block_gives_the_same_bytes(tmp_path: Path) -> None:
    save_model(tmp_path)
    skeleton, weights = open_model(Checkpoint(tmp_path), device=CPU)
    names = skeleton.parameters_of(skeleton.blocks[1])
    first, second = weights.read(names), weights.read(names)
    assert list(first) == names
    assert all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize(("streams", "beside"), [(0, False), (1, False), (2, False), (2, True)])
def test_only_two_blocks_are_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: int, *, beside: bool) -> None:
    """The block whose turn it is and the one that is read ahead, at any moment, though the body keeps its steps."""
    save_model(tmp_path, num_hidden_layers=6)
    skeleton, weights = open_model(Checkpoint(tmp_path), device=CPU)
    start = begin(skeleton, weights, TOKENS, Budget(2**30, tmp_path), streams=streams, beside=beside)
    seen: list[weakref.WeakSet[Tensor]] = []
    alive: list[int] = []
    read_all, run = Weights.read, Block.__call__

    def count() -> None:
        alive.append(sum(len(tensors) > 0 for tensors in seen))

    def read(self: Weights, names: Iterable[str]) -> dict[str, Tensor]:
        # Parameters go into a module as they are, where tensors are wrapped.
        tensors = {name: Parameter(x, requires_grad=False) for name, x in read_all(self, names).items()}
        seen.append(weakref.WeakSet(tensors.values()))
        count()
        return tensors

    def counted(self: Block, x: Tensor) -> Tensor:
        count()
        return run(self, x)

    monkeypatch.setattr(Weights, "read", read)
    monkeypatch.setattr(Block, "__call__", counted)
    steps = []
    for step in walk(skeleton, weights, start, batch_size=3):
        steps.append(step)
        count()
    assert len(seen) == 6
    assert max(alive) <= 2
    assert not any(len(tensors) for tensors in seen)


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "phi3")
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "deepseek_v3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"'deepseek_v3'.*llama.*phi3"):
        open_model(Checkpoint(tmp_path), device=CPU)
