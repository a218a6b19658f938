"""Experts as linears: the numbers of transformers' fused ones, and the names that checkpoints have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from bitlathe.arch import Arch, arch_for
from bitlathe.arch.moe import MOE
from bitlathe.errors import UnsupportedModel
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.experts import Experts, split_experts
from bitlathe.model.skeleton import skeleton_of
from families import config_of, save_model
from quantized_folder import random_model

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("qwen2_moe", "qwen3_moe", "olmoe")
EXPERTS, WIDTH, SIZE, CHOSEN, TOKENS = 6, 48, 80, 2, 33


class Holder(nn.Module):
    """A model with experts and nothing else."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = experts


def fused(dtype: torch.dtype) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        num_experts=EXPERTS, hidden_size=WIDTH, moe_intermediate_size=SIZE, experts_implementation="eager", dtype=dtype
    )
    experts = Qwen3MoeExperts(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return experts


def split(experts: Qwen3MoeExperts) -> Experts:
    """The same experts, one by one."""
    holder: Any = Holder(experts)
    assert split_experts(holder, Arch(linears=(), experts="experts")) == ["mlp.experts"]
    parts = {}
    for number, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        weights = (*gate_up.chunk(2), down)
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
            parts[f"{number}.{name}.weight"] = weight.detach().clone()
    made = holder.mlp.experts
    made.load_state_dict(parts, assign=True)
    return made


def routed(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and experts with their weights for each token; the last expert is chosen by none."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    scores = torch.rand(TOKENS, EXPERTS - 1, generator=generator)
    weights, chosen = scores.topk(CHOSEN)
    return hidden, chosen, weights.to(dtype)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_the_numbers_are_those_of_fused_experts(dtype: torch.dtype, most: float) -> None:
    """But for the order of sums: matrix products of gate and up apart may add up in another than of both in one."""
    experts = fused(dtype)
    with torch.no_grad():
        expected, found = experts(*routed(dtype)), split(experts)(*routed(dtype))
    assert found.dtype == dtype
    assert (found.float() - expected.float()).norm() <= most * expected.float().norm()


def test_gradients_reach_the_chosen_and_the_inputs() -> None:
    hidden, chosen, weights = routed(torch.float32)
    experts, ours, theirs = fused(torch.float32), hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    parts = split(experts)
    parts(ours, chosen, weights).square().sum().backward()
    experts(theirs, chosen, weights).square().sum().backward()
    assert ours.grad is not None and theirs.grad is not None and experts.down_proj.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    *reached, last = (parts.get_parameter(f"{number}.down_proj.weight").grad for number in range(EXPERTS))
    assert last is None
    for number, gradient in enumerate(reached):
        assert gradient is not None and torch.allclose(gradient, experts.down_proj.grad[number], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_on_disk(tmp_path: Path, family: str) -> None:
    save_model(tmp_path, family)
    checkpoint = Checkpoint(tmp_path)
    skeleton = skeleton_of(checkpoint, torch.bfloat16)
    assert skeleton.shapes == {name: info.shape for name, info in checkpoint.header.items()}
    block = "model.layers.1"
    experts = [name for name in skeleton.linears if name.startswith(f"{block}.mlp.experts.")]
    assert len(experts) == 3 * 4
    assert {skeleton.fused[name] for name in experts} == {f"{block}.mlp.experts"}
    routers = {name.removeprefix(f"{block}.") for name, row in skeleton.rows.items() if row.router and name.startswith(block)}
    assert routers == {"mlp.gate", *(["mlp.shared_expert_gate"] if family == "qwen2_moe" else [])}
    down = skeleton.rows[f"{block}.mlp.experts.3.down_proj"]
    assert (down.reads, down.writes, down.norm) == ("mid", "residual", None)
    assert skeleton.rows[f"{block}.mlp.gate"].norm == f"{block}.post_attention_layernorm"
    assert (skeleton.share(down.name), skeleton.share(f"{block}.self_attn.q_proj")) == (0.5, 1.0)


def test_experts_of_another_shape_are_refused() -> None:
    model = random_model(config_of("qwen3_moe"))
    experts = model.get_submodule("model.layers.1.mlp.experts")
    experts.register_parameter("down_proj_bias", nn.Parameter(torch.zeros(2)))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.experts holds .*down_proj_bias.*transformers"):
        split_experts(model, MOE)


def test_what_the_table_does_not_know_is_refused() -> None:
    assert arch_for({"model_type": "olmoe", "clip_qkv": None}) is MOE
    with pytest.raises(UnsupportedModel, match="clip_qkv"):
        arch_for({"model_type": "olmoe", "clip_qkv": 8.0})
