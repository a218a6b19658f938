"""Opening a model folder, original or quantized: its skeleton, and its weights as the forward pass sees them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from bitlathe.errors import CheckpointError, RecipeError
from bitlathe.formats import FORMATS
from bitlathe.formats.base import Format
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.skeleton import Skeleton, skeleton_of
from bitlathe.model.weights import DTYPES, Weights
from bitlathe.plan import LayerPlan
from bitlathe.registry import resolve

# quant_method of config.json -> format that reads it
_METHODS: dict[str, str] = {
    "bitlathe": "native",
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptq",
    "awq": "awq",
    "auto-round": "auto-round",
    "mlx": "mlx",
    "gguf": "gguf",
    "fp8": "fp8",
}

_LONG: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def device_named(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:i" means here. Raises RecipeError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        there = f"{torch.cuda.device_count()} CUDA device(s)" if torch.cuda.is_available() else "no CUDA device"
        raise RecipeError(f"device {name!r} was asked for, and this machine has {there}. Use --device auto or --device cpu")
    return device


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a device computes in where weights are held in `dtype`: float32 for bfloat16 on a CPU that has no products of it.

    There a pass forwards in bfloat16 takes eight times as long, and one back hundreds of times. float16 stays: float32 would
    hide what overflows in it.
    """
    if dtype != torch.bfloat16 or device.type != "cpu":
        return dtype
    has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if has else torch.float32


def open_model(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Skeleton, Weights]:
    """The skeleton and weights of a checkpoint; dtype: to run it in, by default the one it is stored in.

    Raises CheckpointError for tensors that are missing or wrongly shaped, and for a quantization that cannot be read here.
    """
    stored = stored_dtype(checkpoint)
    skeleton = skeleton_of(checkpoint, dtype or DTYPES[stored])
    linears = skeleton.linears
    weights = Weights(checkpoint, skeleton.matrices({skeleton.arch.embed}), skeleton.tied, dtype or DTYPES[stored], device)
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None:
        checkpoint.expect(skeleton.shapes)
        return skeleton, weights
    format = _format_of(quantization, checkpoint)
    # Another program's config may leave the dtype of the scales to the model's.
    table = skeleton.arch.embed
    shape = skeleton.matrices({table})[table]
    # Embeddings that are ordinary have no row; codes are flat.
    tables = [table] if (info := checkpoint.header.get(f"{table}.weight")) is not None and info.shape != shape else []
    plan = format.parse({"dtype": _LONG[stored], **quantization}, [*linears, *tables])
    # To other programs a router may be no linear, so that their config does not except it.
    routers = {name: LayerPlan() for name in linears if skeleton.rows[name].router}
    plan = plan.model_copy(update={"linears": plan.linears | routers})
    coded = {f"{name}.weight" for name in plan.quantized}
    checkpoint.expect({name: shape for name, shape in skeleton.shapes.items() if name not in coded})
    return skeleton, replace(weights, plan=plan, format=format)


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype config.json names ("bf16", "fp16" or "fp32"), under its new or its old key; if none, that of most tensors."""
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if name is None:
        counts = Counter(info.dtype for info in checkpoint.header.values())
        name = {"BF16": "bfloat16", "F16": "float16"}.get(counts.most_common(1)[0][0], "float32")
    for short, long in _LONG.items():
        if name == long:
            return short
    raise CheckpointError(f"config.json names the dtype {name!r}; what can be read is {', '.join(_LONG.values())}")


def _format_of(quantization: dict[str, Any], checkpoint: Checkpoint) -> Format:
    # mlx-lm writes no name, only the groups and widths.
    method = quantization.get("quant_method", "mlx" if {"group_size", "bits"} <= quantization.keys() else None)
    if method not in _METHODS:
        raise CheckpointError(
            f"{checkpoint.path} is quantized already, by the method {method!r}, which is not read here "
            f"({', '.join(_METHODS)} are). Use the original model"
        )
    return resolve(_METHODS[method], FORMATS, "format")()
