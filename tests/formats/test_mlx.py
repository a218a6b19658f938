"""Folders that mlx-lm reads: to the byte, by their configuration, and as the model that the native folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitlathe
from bitlathe.errors import CheckpointError, FormatError
from bitlathe.formats.base import QuantLayer
from bitlathe.formats.mlx import Mlx
from bitlathe.numerics.project import QuantTensor
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import KV_SCHEMES, SCHEMES, Scheme
from bitlathe.plan import LayerPlan
from families import VOCABULARY, save_model, write_text
from format_samples import TURNED, bits_of, layer_of, plan_of, row_named

MLX = Mlx()
TOKENS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
W4, W3 = SCHEMES["W4A16G32"], SCHEMES["W3A16G32"]


def test_bytes() -> None:
    """As `mlx.core.quantize` lays them: low bits first, codes of three bits across the bytes of a word and across words."""
    scale = QuantTensor(Scheme(grid="BF16"), (1, 1), torch.tensor([[-1.5]], dtype=torch.bfloat16))
    codes = torch.tensor([[*range(-4, 4)] * 4], dtype=torch.int8)  # + 4: 0 1 2 ... 7, three bits each
    tensors = MLX.encode(QuantLayer(QuantTensor(W3, (1, 32), codes, scale)), LayerPlan(weight=W3), "bf16")
    stream = int.from_bytes(bytes([0b10_001_000, 0b1_100_011_0, 0b111_110_10]) * 4, "little")
    assert tensors["weight"].dtype == torch.uint32
    assert tensors["weight"].tolist() == [[stream >> shift & 0xFFFFFFFF for shift in (0, 32, 64)]]
    assert (tensors["scales"].tolist(), tensors["biases"].tolist()) == ([[-1.5]], [[6.0]])
    codes = torch.tensor([[*range(-8, 8)] * 2], dtype=torch.int8)
    tensors = MLX.encode(QuantLayer(QuantTensor(W4, (1, 32), codes, scale)), LayerPlan(weight=W4), "bf16")
    assert tensors["weight"].tolist() == [[0x76543210, 0xFEDCBA98] * 2]
    assert tensors["biases"].tolist() == [[12.0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_biases_are_exact(bits: int) -> None:
    row = row_named(f"W{bits}A16G32", "fp16")
    tensors = MLX.encode(layer_of(row, "fp16"), row, "fp16")
    assert torch.equal(tensors["biases"].double(), tensors["scales"].double() * -(2.0 ** (bits - 1)))


def test_other_biases_and_larger_ones_are_refused() -> None:
    row = row_named("W4A16G32", "bf16")
    tensors = MLX.encode(layer_of(row, "bf16"), row, "bf16")
    tensors["biases"][3, 2] *= 1.5
    with pytest.raises(CheckpointError, match=r"biases are not -8 times.*mlx-lm"):
        MLX.decode(tensors, row, (160, 256))
    row = row_named("W8A16G32", "fp16")
    assert row.weight is not None
    scale = QuantTensor(Scheme(grid="FP16"), (1, 1), torch.tensor([[600.0]], dtype=torch.float16))
    layer = QuantLayer(QuantTensor(row.weight, (1, 32), torch.ones(1, 32, dtype=torch.int8), scale))
    with pytest.raises(FormatError, match=r"scale is 600: fp16 .*--dtype bf16"):
        MLX.encode(layer, row, "fp16")


def test_configuration() -> None:
    """What most have, then by name what others have, as mlx-lm's loader asks for it."""
    plan = plan_of({"a": W4, "b": SCHEMES["W6A16"], "c": W4, "lm_head": None})
    assert MLX.config(plan) == {
        "quant_method": "mlx",
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "b": {"group_size": 128, "bits": 6, "mode": "affine"},
        "lm_head": False,
    }
    written = {"group_size": 32, "bits": 4, "b": {"group_size": 128, "bits": 6}, "lm_head": False}  # of older versions
    assert MLX.parse(written, list(plan.linears)) == plan
    for said, told in (
        ({"mode": "mxfp4"}, "mode 'mxfp4'"),
        ({"bits": 7}, "7 bits"),
        ({"dtype": "float32"}, "dtype is float32"),
    ):
        with pytest.raises(FormatError, match=f"{told}.*mlx-lm"):
            MLX.parse(written | said, ["a"])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (row_named("W4A16G32_ASYM", "bf16"), "W4A16G32_ASYM: .*use a symmetric scheme"),
        (row_named("W4A16_CHANNEL", "bf16"), "W4A16_CHANNEL: .*use W4A16G64"),
        (row_named("MXFP4A16", "bf16"), "MXFP4A16: .*use W4A16G64"),
        (row_named("W4A16G32", "fp16"), "not of the plan's bf16"),
        (row_named("W4A8", "bf16"), "INT8 per token.*weights alone"),
        (LayerPlan(weight=W4, online=TURNED), "leave R4 out of --rotate"),
    ],
)
def test_rows_that_are_refused(row: LayerPlan, told: str) -> None:
    plan = plan_of({"a": row, "b": W4})
    with pytest.raises(FormatError, match=f"mlx cannot hold a: .*{told}.*native format"):
        MLX.check(plan, {"a": (64, 128), "b": (64, 128)}, {})


def test_plans_that_are_refused() -> None:
    plan, shapes = plan_of({"a": W4, "b": None}), {"a": (64, 128), "b": (64, 128)}
    for refused, told in (
        (plan_of({"a": None, "b": None}), "quantizes nothing: write the dense"),
        (plan.model_copy(update={"kv": KV_SCHEMES["KV4"]}), "Leave out --kv"),
        (plan.model_copy(update={"rotations": (Rotation(space="qk", block=32),)}), "Leave R3 out"),
        (plan_of({"m.mlp.experts.0.up_proj": W4}), "m.mlp.experts.0.up_proj: a quantized expert.*keep experts"),
    ):
        with pytest.raises(FormatError, match=told):
            MLX.check(refused, shapes, {})
    with pytest.raises(FormatError, match="different schemes for a, b"):
        MLX.check(plan, shapes, {"a": "ab", "b": "ab"})


MIXED: dict[str, Any] = {
    "*.down_proj": "W3A16G64",
    "*.layers.1.*_proj": "W6A16G32",
    "*.o_proj": "keep",
    "*embed_tokens": "W8A16G64",
}


@pytest.mark.parametrize(("dtype", "tied"), [("bf16", False), ("fp16", True)])
def test_the_folder_is_the_native_one(tmp_path: Path, dtype: str, *, tied: bool) -> None:
    save_model(tmp_path / "m", tie_word_embeddings=tied)
    asked: dict[str, Any] = {"scheme": "W4A16G32", "overrides": MIXED, "tuner": "rtn", "samples": 4, "seqlen": 24}
    text = write_text(tmp_path / "text.txt", 400)
    asked |= {"dtype": dtype, "rotate": "R1,R2", "calib": str(text), "formats": "native,mlx"}
    plan = bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", **asked)
    assert len(set(plan.quantized.values())) == 4
    config = json.loads((tmp_path / "q" / "mlx" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    native, mlx = (bitlathe.load(tmp_path / "q" / name, "cpu") for name in ("native", "mlx"))
    with torch.no_grad():
        assert bits_of(native(TOKENS).logits) == bits_of(mlx(TOKENS).logits)
    theirs = {row["name"]: row["bytes"] for row in bitlathe.inspect(tmp_path / "q" / "mlx")["linears"]}
    sizes = {"model.embed_tokens": (64, 8, 64), "model.layers.0.self_attn.q_proj": (64, 4, 32)}
    for name, (columns, bits, group) in sizes.items():
        rows = VOCABULARY if "embed" in name else 64
        assert theirs[name] == rows * columns * bits // 8 + rows * (columns // group) * 4
