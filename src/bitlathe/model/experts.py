"""Experts as one linear for each projection of each, as checkpoints have them.

transformers 5 keeps the experts of a block in two parameters of three dimensions. Here a list of experts stands in their
place: what has a name of its own can be planned, tuned, stored and loaded as any other linear. The numbers are those of
transformers' own way of running them one after the other (`experts_implementation="eager"`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitlathe.arch import Arch
from bitlathe.errors import UnsupportedModel


class Expert(nn.Module):
    """A gated MLP. width: of its inputs and outputs; size: of what is between."""

    def __init__(self, width: int, size: int, act: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, size, bias=False, device="meta", dtype=dtype)
        self.up_proj = nn.Linear(width, size, bias=False, device="meta", dtype=dtype)
        self.down_proj = nn.Linear(size, width, bias=False, device="meta", dtype=dtype)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """[..., tokens, width] to the same."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The experts of a block. An expert that no token chose does not run."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the experts make of hidden states [tokens, width], each token by those of `top_k_index` [tokens, k], times
        their `top_k_weights` [tokens, k]."""
        total, chosen = torch.zeros_like(hidden_states), top_k_index.T
        for number in chosen.unique().tolist():
            place, token = torch.where(chosen == number)
            # A batch of one, as other linears get: of a matrix the compressed-tensors library scales all rows as one token.
            made = self[number](hidden_states[None, token])[0] * top_k_weights[token, place, None]
            total.index_add_(0, token, made.to(total.dtype))
        return total


def split_experts(model: PreTrainedModel, arch: Arch) -> list[str]:
    """Put `Experts`, on the meta device, where a model built without weights has fused ones, and give their paths.

    Raises UnsupportedModel where those are not as the families of the table have them.
    """
    if arch.experts is None:
        return []
    found = {name: module for name, module in model.named_modules() if name.endswith(f".{arch.experts}")}
    for name, fused in found.items():
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, _split(name, fused))
    return list(found)


def _split(name: str, fused: nn.Module) -> Experts:
    shapes = {key: tuple(parameter.shape) for key, parameter in fused.named_parameters()}
    count, width, size = shapes.get("down_proj", (0, 0, 0))
    act = dict(fused.named_children()).get("act_fn")
    if act is None or shapes != {"gate_up_proj": (count, 2 * size, width), "down_proj": (count, width, size)}:
        raise UnsupportedModel(
            f"{name} holds {shapes}, where fused experts have gate_up_proj [experts, 2 * size, width] and down_proj [experts, "
            "width, size]. This version of transformers keeps them in another way; versions 5.17 to 5.23 are known to work"
        )
    dtype = fused.get_parameter("down_proj").dtype
    return Experts(Expert(width, size, act, dtype) for _ in range(count))
