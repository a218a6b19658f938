"""Quantized folders for tests: a tiny random model, its linears quantized by a plan, written in a format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.llama import LlamaConfig

from bitlathe.formats import CONFIG_KEYS
from bitlathe.formats.base import Format, QuantLayer
from bitlathe.numerics.project import dequantize, quantize
from bitlathe.numerics.scheme import Scheme
from bitlathe.plan import LayerPlan, Plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)
TOKENS = torch.arange(2, 50).view(2, 24)


@dataclass(frozen=True)
class Made:
    """A folder and what is in it. weights: linear -> its dequantized weight in the plan's dtype."""

    folder: Path
    plan: Plan
    weights: dict[str, Tensor]
    logits: Tensor


def random_model(config: PretrainedConfig = LLAMA, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zeros and ones would hide one that got lost
                nn.init.normal_(parameter, 0.5, 0.1)
    return model


def plan_for(model: PreTrainedModel, schemes: dict[str, Scheme | None], dtype: str = "bf16") -> Plan:
    """schemes: ending of a linear's name -> its scheme, the first that fits; others are kept."""
    rows = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            scheme = next((scheme for ending, scheme in schemes.items() if name.endswith(ending)), None)
            rows[name] = LayerPlan(weight=scheme and scheme.served_in(dtype))
    return Plan.model_validate({"linears": rows, "dtype": dtype})


@torch.no_grad()
def make(folder: Path, format: Format, model: PreTrainedModel, plan: Plan) -> Made:
    """Write `model` quantized by `plan` into `folder`. The model is left with the dequantized weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, tensors = {}, {name: tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, scheme in plan.quantized.items():
        linear = model.get_submodule(name)
        layer = QuantLayer(quantize(tensors.pop(f"{name}.weight"), scheme))
        tensors |= {f"{name}.{key}": tensor for key, tensor in format.encode(layer, plan.linears[name], plan.dtype).items()}
        weights[name] = dequantize(layer.weight, DTYPES[plan.dtype])
        linear.weight = nn.Parameter(weights[name])
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": {"bf16": "bfloat16", "fp16": "float16"}[plan.dtype],
    }
    if (quantization := format.config(plan)) is not None:
        config |= dict.fromkeys(("quantization_config", *CONFIG_KEYS.get(format.name, ())), quantization)
    (folder / "config.json").write_text(json.dumps(config))
    return Made(folder, plan, weights, model(TOKENS).logits)
