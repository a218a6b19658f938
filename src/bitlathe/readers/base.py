"""What an opened folder answers, whoever opened it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Opened(Protocol):
    """A folder as a reader sees it."""

    def weight(self, linear: str, inputs: int) -> Tensor | None:
        """The weight [outputs, `inputs`] that a linear multiplies by, in the dtype that the reader holds it in; None where it
        does not show it."""
        ...

    def logits(self, tokens_BT: Tensor) -> Tensor | None:
        """Logits [batch, tokens, vocabulary], float32; None where the reader runs no models."""
        ...


class OpenedModel:
    """A transformers model."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def weight(self, linear: str, inputs: int) -> Tensor | None:
        """See `Opened`. Of a module that holds codes, what it makes of the identity: 1 * w + 0 + ... is w in any dtype."""
        if (fused := self._fused(linear)) is not None:
            return fused.detach()
        module = self.model.get_submodule(linear)
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.is_floating_point() and weight.ndim == 2 and weight.element_size() > 1:
            return weight.detach()
        identity, nothing = torch.eye(inputs, dtype=self.model.dtype), torch.zeros(1, inputs, dtype=self.model.dtype)
        return (module(identity) - module(nothing)).T.contiguous()  # less its bias

    def _fused(self, linear: str) -> Tensor | None:
        """The weight of an expert that the model holds in one parameter with the others of its block, or None."""
        expert, _, own = linear.rpartition(".")
        experts, _, number = expert.rpartition(".")
        held = dict(self.model.get_submodule(experts).named_parameters(recurse=False)) if number.isdigit() else {}
        if "gate_up_proj" not in held:
            return None
        if own in held:
            return held[own][int(number)]
        return held["gate_up_proj"][int(number)].chunk(2)[own == "up_proj"]

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor | None:
        """See `Opened`."""
        return self.model(tokens_BT.to(self.model.device), use_cache=False).logits.float().cpu()
