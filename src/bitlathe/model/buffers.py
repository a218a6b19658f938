"""The tensors of a model that no checkpoint holds: rotary frequencies, embedding scales.

A model built on the meta device has them as shapes only. transformers computes their values in `_init_weights`, the same
function that draws random weights; here it runs on a stand-in of each module whose parameters stay on the meta device, so
that it can fill buffers and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitlathe.errors import UnsupportedModel


def materialise_buffers(model: PreTrainedModel, submodules: Iterable[nn.Module], device: torch.device | str) -> None:
    """Give every meta non-persistent buffer at or below `submodules` its value, on `device`.

    model: the model they are part of; its family's rules are followed. Parameters, persistent buffers and buffers that have a
    value already are left as they are. The values are computed on the CPU whatever the device is, so that they are the same
    on all. Raises UnsupportedModel for a buffer that transformers gives no value.
    """
    for submodule in submodules:
        for module in submodule.modules():
            buffers = dict(module.named_buffers(recurse=False))
            names = [name for name in buffers if name in module._non_persistent_buffers_set and buffers[name].is_meta]
            for name, value in _computed(model, module, names).items():
                setattr(module, name, value.to(device))


def _computed(model: PreTrainedModel, module: nn.Module, names: list[str]) -> dict[str, Tensor]:
    if not names:
        return {}
    twin = copy(module)  # shares everything with the module but the two dictionaries that hold its tensors
    object.__setattr__(twin, "_parameters", {name: _weightless(value) for name, value in module._parameters.items()})
    blank = {
        name: torch.full_like(module.get_buffer(name), torch.nan, device="cpu") for name in names if _floating(module, name)
    }
    spare = {name: None if value is None else value.clone() for name, value in module._buffers.items()}
    object.__setattr__(twin, "_buffers", spare | blank)
    model._init_weights(twin)
    for name in names:
        if name not in blank or blank[name].isnan().any():
            raise UnsupportedModel(
                f"{type(module).__name__} of {type(model).__name__} holds the buffer {name!r}, which is not in the checkpoint "
                "and to which this version of transformers gives no value. Another version of transformers may know it"
            )
    return blank


def _weightless(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _floating(module: nn.Module, name: str) -> bool:
    return module.get_buffer(name).is_floating_point()
