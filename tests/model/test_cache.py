"""Keys and values on their way into a cache: rounded once, whatever cache there is, and nothing else of the model changes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from bitlathe.errors import UnsupportedModel
from bitlathe.model.cache import KeyValueStage, attach
from bitlathe.numerics.activation import fake_quantize_input
from bitlathe.numerics.hadamard import turn
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import KV_SCHEMES, Scheme
from families import FAMILIES, config_of
from quantized_folder import random_model

HEAD = 16  # the families' head size
R3 = Rotation(space="qk", block=HEAD, kind="hadamard")
SIGNED = Rotation(space="qk", block=HEAD, kind="random", seed=3)
HALVES = Rotation(space="qk", block=HEAD // 2, kind="random", seed=1)
TOKENS = torch.arange(3, 51).view(2, 24)
KINDS = [(None, "KV8"), (None, "KV4"), (R3, "KV4"), (SIGNED, "KV8"), (HALVES, "KV4")]
IDS = ["KV8", "KV4", "R3 KV4", "signed R3 KV8", "halves R3 KV4"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Keeper(nn.Module):
    """The least that is an attention module: its input is both its new keys and, doubled, its new values."""

    def forward(self, states: Tensor, past_key_values: Any = None) -> tuple[Tensor, Tensor]:
        return (states, 2 * states) if past_key_values is None else past_key_values.update(states, 2 * states, 0)


def keeper(rotation: Rotation | None, scheme: Scheme | None) -> Keeper:
    module = Keeper()
    attach(module, rotation=rotation, scheme=scheme)
    return module


def states(size: int, tokens: int = 7, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """New keys [2, 3, tokens, size] with a few large ones among them."""
    x = torch.randn(2, 3, tokens, size, generator=torch.Generator().manual_seed(size))
    x[..., 1] *= 10
    return x.to(dtype)


def with_stage(model: PreTrainedModel, rotation: Rotation | None, scheme: str | None) -> PreTrainedModel:
    for name, module in list(model.named_modules()):
        if name.endswith("self_attn"):
            attach(module, rotation=rotation, scheme=None if scheme is None else KV_SCHEMES[scheme])
    return model


def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return random_model(config_of(family), dtype)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor = TOKENS, **call: Any) -> Tensor:
    return model(tokens, **call).logits


@pytest.mark.parametrize("rotation", [R3, SIGNED, HALVES], ids=["R3", "signed", "halves"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotation_alone_leaves_the_function_as_it_was(family: str, rotation: Rotation) -> None:
    model = model_of(family)
    before, passes = logits(model), list[Tensor]()
    for module in with_stage(model, rotation, None).modules():
        if isinstance(module, KeyValueStage):
            module.register_forward_hook(lambda _module, inputs, _outputs: passes.append(inputs[0]))
    after = logits(model)
    assert [tuple(keys.shape) for keys in passes] == [(2, 2, 24, HEAD)] * 2
    assert (after - before).norm() <= 1e-5 * before.norm()


@pytest.mark.parametrize(("rotation", "scheme"), KINDS, ids=IDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_and_none_give_the_same_logits(family: str, rotation: Rotation | None, scheme: str) -> None:
    model = model_of(family, torch.bfloat16)
    before = logits(model, use_cache=False)
    with_stage(model, rotation, scheme)
    after = logits(model, use_cache=False)
    assert torch.equal(after, logits(model, use_cache=True))
    assert not torch.equal(after, before)


@pytest.mark.parametrize(("rotation", "scheme"), KINDS, ids=IDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_gives_the_prefill_s_logits(family: str, rotation: Rotation | None, scheme: str) -> None:
    """Not bit for bit: a matrix product rounds differently for one token, and a key may then fall to the next step."""
    model = with_stage(model_of(family), rotation, scheme)
    float_only = model_of(family)
    whole, cache = logits(model), DynamicCache(config=model.config)
    parts = [logits(model, part, past_key_values=cache) for part in TOKENS.split(1, dim=1)]
    assert cache.get_seq_length() == TOKENS.shape[1]
    stepwise = torch.cat(parts, dim=1)
    lost = (whole - logits(float_only)).norm()
    assert (stepwise - whole).norm() < 0.2 * lost


@pytest.mark.parametrize("scheme", KV_SCHEMES)
@pytest.mark.parametrize("rotation", [None, Rotation(space="qk", block=64, seed=5)], ids=["plain", "R3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_equal_keys_are_stored_equal_however_they_come(scheme: str, rotation: Rotation | None, dtype: torch.dtype) -> None:
    module, x = keeper(rotation, KV_SCHEMES[scheme]), states(64, dtype=dtype)
    together, one_by_one = DynamicCache(), DynamicCache()
    prefill = module(x, past_key_values=together)
    for part in x.split(1, dim=2):
        so_far = module(part, past_key_values=one_by_one)
    assert torch.equal(so_far[1], prefill[1])
    # A rotation is a matrix product, whose last bit may hang on the number of rows.
    assert torch.equal(so_far[0], prefill[0]) or rotation is not None
    assert (so_far[0].float() - prefill[0].float()).norm() < 1e-3 * (prefill[0].float() - x.float()).norm()
    for found, cache in ((prefill, together), (so_far, one_by_one), (prefill, None)):
        others = module(x) if cache is None else (cache.layers[0].keys, cache.layers[0].values)
        assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(others, found, strict=True))
    assert torch.equal(prefill[1], fake_quantize_input(2 * x, KV_SCHEMES[scheme]))


@pytest.mark.parametrize(("scheme", "size", "steps"), [("KV8", 1024, 256), ("KV4", 128, 16)])
def test_what_is_stored_lies_on_the_grid(scheme: str, size: int, steps: int) -> None:
    rotation = Rotation(space="qk", block=size, seed=5)
    x = states(size, dtype=torch.float32)
    keys, values = keeper(rotation, KV_SCHEMES[scheme])(x)
    for rows, error in ((turn(keys, rotation), 1e-4), (values, 0.0)):
        for row in rows.reshape(-1, size):
            distinct = row.sort().values
            gaps = distinct.diff()
            step = gaps[gaps > error].min()
            assert 2 < (gaps > error).sum() < steps
            torch.testing.assert_close(
                (distinct - distinct[0]) / step, ((distinct - distinct[0]) / step).round(), rtol=0, atol=0.05
            )
    assert len(values[0, 0].unique()) > steps  # tokens have scales of their own


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_holds_what_a_dynamic_one_does(family: str) -> None:
    """Equal where keys are equal: masked places change the last bit of a softmax, and then some keys of later blocks."""
    before, model = logits(model_of(family)), with_stage(model_of(family), SIGNED, "KV4")
    tokens, next_ones = TOKENS[:, :12], TOKENS[:, 12:13]  # within every family's window
    lost = (logits(model) - before)[:, :13].norm()
    dynamic, static = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)
    found = [
        torch.cat([logits(model, tokens, past_key_values=cache), logits(model, next_ones, past_key_values=cache)], dim=1)
        for cache in (dynamic, static)
    ]
    assert (found[0] - found[1]).norm() < 0.2 * lost
    for kind in ("keys", "values"):
        one, other = (getattr(cache.layers[0], kind) for cache in (dynamic, static))
        assert torch.equal(one[:, :, :12], other[:, :, :12])


def test_the_rotation_is_that_of_the_keys_alone() -> None:
    """Rounding in a turned basis costs keys with one large channel less, and is nothing to values."""
    x = states(64, dtype=torch.float32)
    plain, turned = (keeper(rotation, KV_SCHEMES["KV4"])(x) for rotation in (None, Rotation(space="qk", block=64)))
    assert (turned[0] - x).norm() < 0.7 * (plain[0] - x).norm()
    assert torch.equal(turned[1], plain[1])


@pytest.mark.parametrize("rotation", [None, SIGNED], ids=["plain", "R3"])
def test_gradients_pass_straight_through(rotation: Rotation | None) -> None:
    x = states(HEAD, dtype=torch.float32).requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    keys, values = keeper(rotation, KV_SCHEMES["KV8"])(x)
    (gradient,) = torch.autograd.grad((keys * weights).sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient, weights, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad((values * weights).sum(), x)
    torch.testing.assert_close(gradient, 2 * weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_can_be_tuned_with_it(family: str) -> None:
    model = with_stage(model_of(family), SIGNED, "KV4")
    weight = next(p for name, p in model.named_parameters() if name.endswith(("k_proj.weight", "qkv_proj.weight")))
    (gradient,) = torch.autograd.grad(model(TOKENS, use_cache=False).logits.square().mean(), weight)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


def test_a_deep_copy_has_a_stage_of_its_own() -> None:
    module = keeper(SIGNED, KV_SCHEMES["KV4"])
    copy = deepcopy(module)
    attach(copy, rotation=None, scheme=KV_SCHEMES["KV8"])
    x = states(HEAD)
    assert torch.equal(module(x)[1], fake_quantize_input(2 * x, KV_SCHEMES["KV4"]))
    assert torch.equal(copy(x)[0], fake_quantize_input(x, KV_SCHEMES["KV8"]))


def test_what_is_attached_again_replaces_what_was() -> None:
    module, x = keeper(SIGNED, KV_SCHEMES["KV4"]), states(HEAD)
    attach(module, rotation=None, scheme=KV_SCHEMES["KV8"])
    assert torch.equal(module(x)[0], fake_quantize_input(x, KV_SCHEMES["KV8"]))
    cache = DynamicCache()
    module(x, past_key_values=cache)
    assert cache.get_seq_length() == x.shape[2]
    attach(module, rotation=None, scheme=None)
    assert torch.equal(module(x)[0], x)


def test_it_adds_nothing_to_what_is_saved() -> None:
    model = model_of("qwen3")
    names = list(model.state_dict())
    assert list(with_stage(model, SIGNED, "KV4").state_dict()) == names


# torch.compile itself uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rounding_is_one_graph_with_the_attention_around_it() -> None:
    module, x = keeper(None, KV_SCHEMES["KV4"]), states(HEAD)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), module(x), strict=True))


def test_one_stage_serves_other_widths_and_dtypes() -> None:
    module, fresh = keeper(HALVES, None), keeper(HALVES, None)
    module(states(HEAD))
    for x in (states(2 * HEAD), states(HEAD).double()):
        assert all(torch.equal(a, b) for a, b in zip(module(x), fresh(x), strict=True))
    assert (module(x)[0] - x).abs().max() < 1e-12  # in float64, turned in it


def test_a_module_without_a_cache_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"Linear takes no past_key_values.*[Ll]eave"):
        attach(nn.Linear(2, 2), rotation=None, scheme=KV_SCHEMES["KV8"])
