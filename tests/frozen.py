"""The model that a run has in memory, block by block as each is frozen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bitlathe.model.buffers import materialise_buffers
from bitlathe.model.walk import walk
from bitlathe.model.weights import Weights


class Frozen:
    """Takes the blocks of a run as they are frozen, and makes the whole model of them at the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: list[Any] = []
        monkeypatch.setattr("bitlathe.pipeline.walk", self._watched)

    def _watched(self, skeleton: Any, weights: Weights, *args: Any, **kwargs: Any) -> Any:
        self.skeleton, self.weights = skeleton, weights
        for step in walk(skeleton, weights, *args, **kwargs):
            self.blocks.append(step.block)
            yield step

    def model(self) -> PreTrainedModel:
        """In the dtype of a result, which its weights were rounded to, whatever the run computes in."""
        model, arch = copy.deepcopy(self.skeleton.model), self.skeleton.arch
        for block in self.blocks:
            parent, _, child = block.name.rpartition(".")
            model.get_submodule(parent).register_module(child, block.module)
        names = [name for part in (arch.embed, arch.norm, arch.head) for name in self.skeleton.parameters_of(part)]
        model.load_state_dict(self.weights.read(names), strict=False, assign=True)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.weights.held)
        materialise_buffers(model, [model], torch.device("cpu"))
        model.tie_weights()
        return model
