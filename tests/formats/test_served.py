"""transformers with compressed-tensors runs every linear as it was tuned: the same inputs rounded to the same numbers.

The folder is written here without the rest of the program: a tiny random model, static scales of made-up ranges, every linear
but the head quantized.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen2 import Qwen2Config

from bitlathe.formats.base import QuantLayer
from bitlathe.formats.compressed_tensors import CompressedTensors
from bitlathe.numerics.activation import fake_quantize_input, static_scale
from bitlathe.numerics.project import dequantize, quantize
from bitlathe.numerics.scheme import PRESETS, SCHEMES, Scheme, per_tensor, per_token, static
from bitlathe.plan import LayerPlan, Plan
from format_samples import APART
from quantized_folder import LLAMA, TOKENS, random_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = {
    **{
        name: LayerPlan(weight=preset.weight, input=preset.input)
        for name, preset in PRESETS.items()
        if preset.input is not None and name not in APART
    },
    "asymmetric activations": LayerPlan(weight=SCHEMES["W4A16"], input=per_token("INT4", asymmetric=True)),
    "asymmetric and static": LayerPlan(weight=SCHEMES["W8A16_CHANNEL"], input=per_tensor("INT8", asymmetric=True)),
    "asymmetric bytes": LayerPlan(weight=SCHEMES["W8A16_CHANNEL_ASYM"], input=per_token("INT8")),
    "clipped and static": LayerPlan(weight=SCHEMES["W8A16_CHANNEL"], input=per_tensor("INT8"), clip=0.7),
    "a scale for 64 inputs": LayerPlan(
        weight=SCHEMES["FP8_CHANNEL"], input=Scheme(grid="E4M3", block=(1, 64), scale=Scheme(grid="BF16"))
    ),
    "MXFP4 with MXFP8": LayerPlan(weight=SCHEMES["MXFP4A16"], input=SCHEMES["MXFP8A16"]),
}
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
BIASED = Qwen2Config(**{key: value for key, value in LLAMA.to_dict().items() if key in SHAPE})


@torch.no_grad()
def write(folder: Path, model: PreTrainedModel, rows: dict[str, LayerPlan]) -> dict[str, QuantLayer]:
    """The model in `folder`, and its layers. rows: ending of a linear's name -> its row, the first that fits."""
    tensors, layers, linears = dict(model.state_dict()), {}, {}
    format = CompressedTensors()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears[name] = next((row for ending, row in rows.items() if name.endswith(ending)), LayerPlan())
    plan = Plan(linears=linears)
    shapes = {name: tuple(tensors[f"{name}.weight"].shape) for name in linears}
    format.check(plan, shapes, fused_in(plan))
    for name in plan.quantized:
        row = linears[name]
        assert row.weight is not None
        fixed = None
        if row.input is not None and static(row.input):
            # What q, k and v see is one thing, and so is its range; some of it lies beyond.
            largest = torch.tensor(1.5 + len(name.rpartition(".")[0]) % 3)
            fixed = static_scale(-largest, largest / 2, row.input, "bf16", clip=row.clip)
        layers[name] = QuantLayer(quantize(tensors.pop(f"{name}.weight"), row.weight), fixed)
        tensors |= {f"{name}.{key}": tensor for key, tensor in format.encode(layers[name], row, "bf16").items()}
    assert_fused_alike(plan, layers)
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": format.config(plan)}))
    return layers


def fused_in(plan: Plan) -> dict[str, str]:
    """Linear -> the linears that see the same input and are served with it as one matrix."""
    groups = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
    parts = {name: name.rpartition(".") for name in plan.linears}
    return {name: f"{parent}.{groups[own]}" for name, (parent, _, own) in parts.items() if own in groups}


def assert_fused_alike(plan: Plan, layers: dict[str, QuantLayer]) -> None:
    """What serving engines run as one matrix has one static scale of its input."""
    firsts: dict[str, Tensor] = {}
    for name, group in fused_in(plan).items():
        if name in layers and (fixed := layers[name].input) is not None:
            assert torch.equal(firsts.setdefault(group, fixed.scale), fixed.scale)


def runs_as_tuned(folder: Path, rows: dict[str, LayerPlan], model: PreTrainedModel) -> None:
    layers = write(folder, model, rows)
    read = AutoModelForCausalLM.from_pretrained(folder)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in read.named_modules():
        if name in layers:
            module.register_forward_hook(lambda _module, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    with torch.no_grad():
        read(TOKENS)
    assert seen.keys() == layers.keys()
    plan = CompressedTensors().parse(json.loads((folder / "config.json").read_text())["quantization_config"], list(layers))
    for name, (x, output) in seen.items():
        scheme, bias = plan.linears[name].input, read.get_submodule(name).bias
        rounded = x if scheme is None else fake_quantize_input(x, scheme, fixed=layers[name].input)
        assert scheme is None or not torch.equal(rounded, x), name
        expected = F.linear(rounded, dequantize(layers[name].weight, torch.bfloat16), bias)
        assert torch.equal(output.view(torch.int16), expected.view(torch.int16)), name


@pytest.mark.parametrize("name", ROWS)
def test_each_scheme(name: str, tmp_path: Path) -> None:
    runs_as_tuned(tmp_path, {"proj": ROWS[name]}, random_model())


def test_one_scheme_for_all_and_the_head(tmp_path: Path) -> None:
    runs_as_tuned(tmp_path, {"": ROWS["W8A8"]}, random_model())


def test_a_scheme_for_every_kind_of_linear(tmp_path: Path) -> None:
    rows = {
        "layers.1.mlp.down_proj": "W8A8_STATIC",
        "down_proj": "NVFP4",
        "gate_proj": "MXFP4",
        "up_proj": "MXFP4",
        "layers.0.self_attn.o_proj": "FP8_STATIC",
        "o_proj": "W4A16",
        "proj": "W4A4",
        "lm_head": "W8A8",
    }
    presets = {ending: PRESETS[name] for ending, name in rows.items()}
    plan_rows = {ending: LayerPlan(weight=preset.weight, input=preset.input) for ending, preset in presets.items()}
    runs_as_tuned(tmp_path, plan_rows, random_model(BIASED))
