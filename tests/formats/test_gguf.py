"""GGUF: blocks against the gguf package, folders against transformers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize as their_weights
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import bitlathe
from bitlathe.arch import ARCHS
from bitlathe.errors import FormatError
from bitlathe.formats.gguf import Gguf
from bitlathe.formats.gguf_file import GgufFile
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.mixes import MIXES, expanded
from bitlathe.numerics.project import dequantize
from bitlathe.numerics.scheme import LLAMA_CPP, SCHEMES
from bitlathe.plan import LayerPlan
from bitlathe.report import Note
from bitlathe.result import name_of_model
from families import save_model
from format_samples import bits_of, facts, layer_of, plan_of

SHAPE = (12, 768)


def value(folder: Path, key: str) -> Any:
    """What a file says under a key."""
    return GGUFReader(folder / "model.gguf").fields[key].contents()


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
    """For 8 blocks with tied embeddings. The expectations were read off the source of its quantizer (llama-quant.cpp); later
    `llama-quantize --dry-run` named the same types for such a model, of every matrix and mix."""
    shapes = {f"model.layers.{index}.{part}": (256, 256) for index in range(8) for part in PARTS}
    shapes |= {"model.embed_tokens": (512, 256), "lm_head": (512, 256)}
    found = {mix: expanded(mix, ARCHS["llama"], shapes, depth=8, tied=True) for mix in MIXES}
    more = [index for index in range(8) if found["Q4_K_M"][f"model.layers.{index}.mlp.down_proj"] == "Q6_K"]
    assert more == [0, 3, 6, 7]
    assert {types["model.embed_tokens"] for types in found.values()} == {"Q6_K"}
    assert [name for name, kind in found["Q2_K_S"].items() if kind == "Q4_K"] == ["model.layers.0.mlp.down_proj"]
    narrow = {name: (256, 96) for name in shapes}
    assert set(expanded("Q4_K_M", ARCHS["llama"], narrow, depth=8, tied=True).values()) == {"Q5_0", "Q8_0"}


def test_a_mix_says_what_gets_another_type(tmp_path: Path) -> None:
    """Rows of 128, and of 384."""
    notes: list[str] = []
    bitlathe.quantize(
        "builtin",
        out=tmp_path / "q",
        scheme="Q4_K_M",
        formats=["gguf"],
        overrides={"*.layers.1.*": "Q8_0"},
        tuner="rtn",
        rtn={"scale": "min-max"},
        listen=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    told = [note for note in notes if "no multiple of 256" in note]
    assert len(told) == 1
    assert told[0].startswith("22 of 22 matrices have rows that are no multiple of 256, the blocks of Q4_K_M")
    assert told[0].endswith("17 Q5_0, 5 Q8_0")
    report = json.loads((tmp_path / "q" / "report.json").read_bytes())
    assert told[0] in report["notes"]
    types = report["plan"]["linears"]
    assert sum(types[name]["weight"] == types["model.embed_tokens"]["weight"] for name in types) == 5 + 7


def test_the_model_keeps_its_own_name(tmp_path: Path) -> None:
    common = {"scheme": "Q4_0", "tuner": "rtn", "rtn": {"scale": "min-max"}}
    save_model(tmp_path / "tiny-model")
    bitlathe.quantize(str(tmp_path / "tiny-model"), out=tmp_path / "a", formats=["gguf"], **common)
    bitlathe.quantize(str(tmp_path / "tiny-model"), out=tmp_path / "b", **common)
    bitlathe.convert(tmp_path / "b", out=tmp_path / "c", formats=["gguf"])
    for folder in ("a", "c"):
        assert value(tmp_path / folder, "general.name") == "tiny-model"
    assert name_of_model("org/Some-Model@main") == "Some-Model"


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


def test_the_frequencies_of_llama_3_are_divided_as_transformers_does(tmp_path: Path) -> None:
    """llama.cpp divides those of every pair by the tensor rope_freqs; some stay, some are divided by all of the factor."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    model = save_model(tmp_path / "m", "llama", head_dim=64, rope_parameters=rope, max_position_embeddings=512)
    bitlathe.quantize(
        str(tmp_path / "m"), out=tmp_path / "q", scheme="Q4_0", formats=["gguf"], tuner="rtn", rtn={"scale": "min-max"}
    )
    (found,) = (tensor for tensor in GGUFReader(tmp_path / "q" / "model.gguf").tensors if tensor.name == "rope_freqs.weight")
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    inverse, scaled = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    assert scaled == 1
    factors = torch.from_numpy(found.data.copy())
    assert (factors == 1).any()
    assert (factors == 8).any()
    assert ((factors > 1) & (factors < 8)).any()
    torch.testing.assert_close(plain / factors, inverse)
    (note,) = json.loads((tmp_path / "q" / "report.json").read_bytes())["notes"]
    assert "transformers' loader of GGUF files does not read the scaling of rotary embeddings, takes its own" in note


def test_what_transformers_does_not_read_is_told(tmp_path: Path) -> None:
    gemma(tmp_path / "m", "gemma2", head_dim=64, query_pre_attn_scalar=64, attn_logit_softcapping=40.0)
    config = Checkpoint(tmp_path / "m").config
    (note,) = GgufFile().notes(config)
    assert "does not read query_pre_attn_scalar, attn_logit_softcapping, takes its own defaults" in note
    assert GgufFile().notes({**config, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0}) == ()


GEMMAS = ("gemma2", "gemma3_text")


def gemma(folder: Path, family: str, **changes: object) -> PreTrainedModel:
    """A random model whose sizes and caps are those that transformers takes where a GGUF file does not say them to it."""
    sizes = {"head_dim": 256, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}
    own = {"query_pre_attn_scalar": 256, "final_logit_softcapping": 30.0 if family == "gemma2" else None, "layer_types": None}
    depth = 2 if family == "gemma2" else 6
    return save_model(folder, family, **{**sizes, **own, "num_hidden_layers": depth, **changes})


@pytest.mark.parametrize("family", GEMMAS)
def test_gemma_is_what_transformers_reads(family: str, tmp_path: Path) -> None:
    """Norms too, as the model multiplies by them: 1 more than their weights, of which a file in float32 has the sum."""
    model = gemma(tmp_path / "model", family)
    norms = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("norm.weight")}
    assert len(norms) == 1 + model.config.num_hidden_layers * (4 if family == "gemma2" else 6)
    every = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16)
    every = every[every.isfinite() & (every.abs() < 100)]  # larger ones would be all that is left of the model
    tiny = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    norms["model.layers.0.input_layernorm.weight"].copy_(tiny[:256])
    model.save_pretrained(tmp_path / "model")
    common = {"scheme": "Q4_0", "formats": ["native", "gguf"], "tuner": "rtn", "rtn": {"scale": "min-max"}, "device": "cpu"}
    bitlathe.quantize(str(tmp_path / "model"), out=tmp_path / "q", **common)
    ours, native = (bitlathe.load(tmp_path / "q" / name, device="cpu").state_dict() for name in ("gguf", "native"))
    for name, written in norms.items():
        assert torch.equal(1 + ours[name].float(), 1 + written.float()), name
        large = written.abs() >= 2**-16  # smaller ones are less than float32 tells apart beside 1
        assert torch.equal(ours[name][large], written[large]), name
    assert all(torch.equal(tensor, native[name]) for name, tensor in ours.items() if name not in norms)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q" / "gguf", gguf_file="model.gguf", dtype=torch.bfloat16)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())
    tokens = torch.arange(3, 51)[None]
    with torch.no_grad():
        logits = [bitlathe.load(tmp_path / "q" / name, device="cpu")(tokens).logits for name in ("gguf", "native")]
        logits.append(theirs(tokens).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma2", {"query_pre_attn_scalar": 144}, r"queries scaled by 144 \(llama.cpp takes 256\)"),
        ("gemma2", {"attn_logit_softcapping": None}, "gemma2 without both of its soft caps"),
        ("gemma2", {"tie_word_embeddings": False}, "gemma2 with a head of its own"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "llama.cpp takes every one in 2"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "gemma3 with soft caps of attention"),
        ("gemma3_text", {"attention_bias": True}, "attention with biases"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 6}, "llama.cpp takes every one in 6"),
        ("gemma3_text", {"hidden_activation": "gelu"}, r"an MLP with gelu \(gelu_pytorch_tanh is written\)"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "a sliding window of attention"),
        ("olmo2", {}, "the family 'olmo2'"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(
    family: str, changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    made = gemma(tmp_path / "m", family, **changes) if family in GEMMAS else save_model(tmp_path / "m", family, **changes)
    assert made.config.model_type == family
    with pytest.raises(FormatError, match=f"does not write .*{said}.*Write the native format"):
        bitlathe.quantize(str(tmp_path / "m"), out=tmp_path / "q", scheme="Q4_0", formats=["gguf"], device="cpu")
