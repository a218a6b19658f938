"""GGUF: blocks against the gguf package, folders against transformers, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as their_weights
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import bitlathe
from bitlathe.arch import ARCHS
from bitlathe.errors import FormatError
from bitlathe.formats.gguf import Gguf
from bitlathe.mixes import MIXES, expanded
from bitlathe.numerics.project import dequantize
from bitlathe.numerics.scheme import LLAMA_CPP, SCHEMES
from bitlathe.plan import LayerPlan
from format_samples import bits_of, facts, layer_of, plan_of

SHAPE = (12, 768)


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_blocks_are_those_of_the_gguf_package_and_come_back(name: str) -> None:
    row = LayerPlan(weight=LLAMA_CPP[name])
    layer = layer_of(row, "bf16", shape=SHAPE)
    tensors = Gguf().encode(layer, row, "bf16")
    assert Gguf().bits(row, SHAPE) == 8 * tensors["weight"].nbytes == LLAMA_CPP[name].bits(SHAPE)
    assert facts(Gguf().decode(tensors, row, SHAPE).weight) == facts(layer.weight)
    theirs = torch.from_numpy(np.asarray(their_weights(tensors["weight"].numpy(), GGMLQuantizationType[name])))
    assert bits_of(theirs) == bits_of(dequantize(layer.weight, torch.float32))


def test_any_bytes_come_back() -> None:
    """Every code, scale and minimum that bytes can say."""
    for name, scheme in LLAMA_CPP.items():
        row = LayerPlan(weight=scheme)
        generator = torch.Generator().manual_seed(1)
        packed = torch.randint(256, (64, scheme.bits((1, 768)) // 8), generator=generator, dtype=torch.uint8)
        layer = Gguf().decode({"weight": packed}, row, (64, 768))
        assert torch.equal(Gguf().encode(layer, row, "bf16")["weight"], packed), name


def test_plans_come_back() -> None:
    plan = plan_of({f"layers.{index}.q": scheme for index, scheme in enumerate(LLAMA_CPP.values())} | {"lm_head": None})
    assert Gguf().parse(Gguf().config(plan), list(plan.linears)) == plan


def test_what_it_cannot_hold_is_refused() -> None:
    for scheme, shape, said in ((SCHEMES["W4A16"], SHAPE, "Choose one of Q4_0"), (LLAMA_CPP["Q4_K"], (4, 96), "blocks of 256")):
        with pytest.raises(FormatError, match=said):
            Gguf().check(plan_of({"a": scheme}), {"a": shape}, {})


def test_mixes_are_those_of_llama_cpp() -> None:
    """What llama-quantize said it chose for a model of 8 blocks with tied embeddings."""
    shapes = {f"model.layers.{index}.{part}": (256, 256) for index in range(8) for part in PARTS}
    shapes |= {"model.embed_tokens": (512, 256), "lm_head": (512, 256)}
    found = {mix: expanded(mix, ARCHS["llama"], shapes, depth=8, tied=True) for mix in MIXES}
    more = [index for index in range(8) if found["Q4_K_M"][f"model.layers.{index}.mlp.down_proj"] == "Q6_K"]
    assert more == [0, 3, 6, 7]
    assert {types["model.embed_tokens"] for types in found.values()} == {"Q6_K"}
    assert [name for name, kind in found["Q2_K_S"].items() if kind == "Q4_K"] == ["model.layers.0.mlp.down_proj"]
    narrow = {name: (256, 96) for name in shapes}
    assert set(expanded("Q4_K_M", ARCHS["llama"], narrow, depth=8, tied=True).values()) == {"Q5_0", "Q8_0"}


PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def test_a_folder_is_what_transformers_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    common = {"scheme": "Q4_K_M", "formats": ["gguf"], "tuner": "rtn", "rtn": {"scale": "min-max"}, "device": "cpu"}
    bitlathe.quantize(str(tmp_path / "model"), out=tmp_path / "q", **common)
    assert not list((tmp_path / "q").glob("*.safetensors*"))
    ours = bitlathe.load(tmp_path / "q", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", gguf_file="model.gguf", dtype=torch.bfloat16)
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    tokens = torch.arange(32)[None]
    logits = [model(tokens).logits.detach().float().log_softmax(-1) for model in (ours, theirs)]
    assert (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean() <= 1e-5
    bitlathe.quantize(str(tmp_path / "model"), out=tmp_path / "again", **common)
    assert (tmp_path / "q" / "model.gguf").read_bytes() == (tmp_path / "again" / "model.gguf").read_bytes()
