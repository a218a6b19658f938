"""A folder back into a model: what was measured when it was made, ready to generate."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from bitlathe.errors import RecipeError
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.block import attach_cache
from bitlathe.model.buffers import materialise_buffers
from bitlathe.model.layers import QuantLinear, Stage, StagedLinear
from bitlathe.model.saving import refuse_to_save
from bitlathe.model.source import device_named, open_model
from bitlathe.model.weights import DTYPES, Weights

GENERATION = "generation_config.json"


def load(folder: str | Path, device: str = "auto", *, dtype: str = "auto") -> PreTrainedModel:
    """The model in a folder, in eval mode and without gradients.

    folder: a quantized model in any format that is read here, a dense one, an original, or a Hub id. device: "auto", "cpu",
    "cuda" or "cuda:i". dtype: what it runs in, "bf16", "fp16" or "fp32"; "auto" is what its config.json gives. Quantized
    linears run their dequantized codes, the weights that were measured, in whatever dtype. Weights come from the file one
    module at a time; on the CPU those that are not quantized stay mapped from it. Its `save_pretrained` writes dense weights,
    and raises FormatError where a plan says more than weights can.

    Raises CheckpointError for a folder that is incomplete or whose quantization is not read here, UnsupportedModel for a
    family without a table, RecipeError for a device that is not there or an unknown dtype.
    """
    checkpoint = Checkpoint(folder)
    if dtype != "auto" and dtype not in DTYPES:
        raise RecipeError(f"the dtype {dtype!r} is not known: give auto, {', '.join(DTYPES)}")
    skeleton, weights = open_model(checkpoint, device=device_named(device), dtype=DTYPES.get(dtype))
    model = skeleton.model
    plan = weights.plan
    quantized = {} if plan is None else plan.quantized
    for name, module in list(model.named_modules()):
        if name in quantized and isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).register_module(child, _coded(name, module, weights))
        else:
            _fill(name, module, weights)
    if plan is not None:
        attach_cache([model.get_submodule(f"{block}.{skeleton.arch.attention}") for block in skeleton.blocks], plan)
        refuse_to_save(model, plan, checkpoint.path)
    materialise_buffers(model, [model], weights.device)
    model.tie_weights()
    if (checkpoint.path / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    assert not left, f"without a value after loading: {left}"
    return model.requires_grad_(requires_grad=False).eval()


def _coded(name: str, linear: nn.Module, weights: Weights) -> QuantLinear:
    assert isinstance(linear, nn.Linear) and weights.plan is not None
    layer = weights.layer(name)
    _fill_bias(name, linear, weights)
    stage = Stage(weights.plan.linears[name], layer.input, quantized=True)
    made = DTYPES[weights.plan.dtype]
    return QuantLinear(layer.weight, StagedLinear(linear, stage), made).to(weights.device, weights.dtype)


def _fill_bias(name: str, linear: nn.Linear, weights: Weights) -> None:
    if linear.bias is not None:
        linear.bias = nn.Parameter(weights.read([f"{name}.bias"])[f"{name}.bias"])


def _fill(name: str, module: nn.Module, weights: Weights) -> None:
    """Give a module, without its children, the tensors of the file; tied ones get theirs later."""
    prefix = f"{name}." if name else ""
    own = [key for key in module.state_dict() if "." not in key and f"{prefix}{key}" not in weights.tied]
    read = weights.read(f"{prefix}{key}" for key in own)
    module.load_state_dict({key: read[f"{prefix}{key}"] for key in own}, strict=False, assign=True)
