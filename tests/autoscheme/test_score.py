"""Scores are the formula of their docstring, and they foretell what a linear's error really does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitlathe.autoscheme.ground import Ground
from bitlathe.autoscheme.kept import Kept
from bitlathe.autoscheme.measure import measure
from bitlathe.autoscheme.score import HEAD, part_of, score
from bitlathe.numerics.activation import StaticScale, fake_quantize_input
from bitlathe.numerics.project import fake_quantize, search
from bitlathe.numerics.scheme import preset_named
from bitlathe.plan import KEEP
from bitlathe.searching import ground_of
from families import save_model, write_text
from searches import quiet, ready_for

pytestmark = pytest.mark.usefixtures("one_thread")


def scored(ground: Ground, folder: Path) -> Kept:
    with Kept(folder, {}) as kept:
        score(ground, kept, quiet)
    return kept


def labels_of(logits: Tensor, seed: int) -> Tensor:
    """One label a token, drawn as the docstrings say: a number in [0, 1) for each, and the first token it does not pass."""
    windows, length, _ = logits.shape
    chances = torch.stack(
        [torch.rand(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + window)) for window in range(windows)]
    )
    return (logits.softmax(-1).cumsum(-1) <= chances[..., None]).sum(-1)


def test_a_score_is_its_formula(tmp_path: Path) -> None:
    """Against the whole model, token by token. fp16, where scores are made in float32."""
    save_model(tmp_path / "m", "llama", torch.float16)
    write_text(tmp_path / "text.txt", 400)
    options = {"schemes": "W3A16G32,W8A8,W8A8_STATIC,keep", "calib": tmp_path / "text.txt", "include": "lm_head"}
    ground = ground_of(ready_for(8.1, model=tmp_path / "m", seqlen=16, search={"tokens": 64, "held_out": 16}, **options))
    kept = scored(ground, tmp_path / "kept")
    read: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()

    def keep(name: str, x: Tensor, y: Tensor) -> None:
        y.retain_grad()
        read[name], made[name] = x, y

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, inputs, output, name=name: keep(name, inputs[0], output))
    logits = model(ground.tokens).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), labels_of(logits.detach(), 0).flatten(), reduction="sum").backward()
    assert set(kept.scores) == set(made)
    for name, y in made.items():
        x, g, weight = read[name].detach(), y.grad, model.get_submodule(name).weight.detach()
        assert g is not None
        part = HEAD if name == "lm_head" else part_of(int(name.split(".")[2]))
        tensors = kept.tensors(part)
        for option, found in kept.scores[name].items():
            if option == KEEP:
                assert found.loss == 0
                continue
            preset = preset_named(option, "fp16")
            learned = search(weight, preset.weight, tensors[f"{name}|moments"])
            error = fake_quantize(weight, preset.weight, learned, dtype=torch.float16).float() - weight
            per_token = torch.einsum("bto,oi,bti->bt", g.square(), error.square(), x.square())
            assert found.weights == pytest.approx(0.5 * per_token.mean().item(), rel=1e-3)
            lost = 0.0
            if preset.input is not None:
                scale = tensors.get(f"{name}|{option}|scale")
                assert (scale is not None) == (option == "W8A8_STATIC")
                rounded = fake_quantize_input(x, preset.input, fixed=None if scale is None else StaticScale(scale))
                lost = 0.5 * ((rounded - x) @ weight.T * g).square().sum(-1).mean().item()
            assert found.inputs == pytest.approx(lost, rel=1e-3, abs=1e-15)


@pytest.mark.parametrize(
    "fields",
    [{"schemes": "W3A16,W6A16,keep"}, {"schemes": "INT4,INT8,keep", "rotate": "R1,R2,R4"}],
    ids=["weights", "activations, rotated"],
)
def test_a_score_foretells_the_true_divergence(tmp_path: Path, fields: dict[str, Any]) -> None:
    ready = ready_for(8.0, seqlen=128, search={"tokens": 4096, "held_out": 2048}, **fields)
    ground = ground_of(ready)
    space = ground.space
    with Kept(tmp_path, {}) as kept:
        score(ground, kept, quiet)
        low, high = (option for option in space.options if option != KEEP)
        pairs = [(group, option) for group in space.groups for option in (low, high)]
        nothing = dict.fromkeys(space.groups, KEEP)
        plans = [space.planned({**nothing, group: option}) for group, option in pairs]
        # What turning the weights loses, which are held in 16 bits, is in all of them.
        base, *measured = measure(ground, kept, [space.planned(nothing), *plans], quiet)
        true = [found.kl - base.kl for found in measured]
        predicted = [sum(kept.scores[name][option].loss for name in space.groups[group]) for group, option in pairs]
    ratios = [math.log(a / b) for a, b in zip(true, predicted, strict=True)]
    assert max(map(abs, ratios)) < math.log(3)
    ranks = torch.tensor([true, predicted]).argsort(dim=1).argsort(dim=1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.95


def test_a_plan_that_rounds_nothing_diverges_by_rounding_to_16_bits_alone(tmp_path: Path) -> None:
    ground = ground_of(ready_for(9.0, schemes="W8A16,keep", rotate="R1,R2"))
    with Kept(tmp_path, {}) as kept:
        score(ground, kept, quiet)
        space = ground.space
        plans = [space.planned(dict.fromkeys(space.groups, option)) for option in (KEEP, "W8A16")]
        nothing, eight = measure(ground, kept, plans, quiet)
    assert 0 < nothing.kl < eight.kl < 1e-3
    assert nothing.error is not None and nothing.error < nothing.kl
