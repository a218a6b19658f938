"""Quantized keys and values, and R3: what an attention module puts into its cache, rounded on the way in.

Attention modules of transformers call `past_key_values.update(keys, values, layer)` once a pass, after RoPE and after norms of
queries and keys. So the place to round is a stand-in for the cache that rounds what is new and passes it on to the real one;
the module's own forward stays as it is. Without a cache the stand-in gives the rounded numbers back, so that prefill,
token-by-token decoding and evaluation see the same ones, each made once, when its token is new.

Keys are turned, rounded, and turned back before they are stored. Queries then need no turning, since
q . (Q(k R) R^T) = (q R) . Q(k R). (QuaRot, arXiv:2404.00456, turns both.)
"""

from __future__ import annotations

from inspect import signature
from typing import Any, Protocol

from torch import Tensor, nn

from bitlathe.errors import UnsupportedModel
from bitlathe.numerics.activation import fake_quantize_input
from bitlathe.numerics.hadamard import Turner, turner
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import Scheme

_STAGE = "kv_stage"
_CACHE = "past_key_values"


class KeyValueStage(nn.Module):
    """What happens to new keys and values [batch, heads, tokens, head size] of the attention module it is a child of.

    rotation: the basis in which keys are rounded; None is their own. scheme: of a matrix [tokens, head size] of every head;
    None rounds nothing, and keys that are turned and turned back are the same but for the rounding of their dtype. It has
    neither parameters nor buffers; the matrices of the rotation are made when the first keys tell their width and device.
    """

    def __init__(self, rotation: Rotation | None, scheme: Scheme | None) -> None:
        super().__init__()
        self.rotation, self.scheme = rotation, scheme
        self._there_and_back: tuple[Turner, Turner] | None = None

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that are stored, in the shapes and dtypes they came in."""
        if self.rotation is None:
            return self._rounded(keys), self._rounded(values)
        there, back = self._turners(keys, self.rotation)
        return back.turn(self._rounded(there.turn(keys))), self._rounded(values)

    def _rounded(self, x: Tensor) -> Tensor:
        return x if self.scheme is None else fake_quantize_input(x, self.scheme)

    def _turners(self, keys: Tensor, rotation: Rotation) -> tuple[Turner, Turner]:
        """The rotation and its inverse for keys like these: made once, because that takes longer than to turn a token's."""
        if self._there_and_back is None or not self._there_and_back[0].serves(keys):
            there = turner(rotation, keys.shape[-1], like=keys)
            self._there_and_back = there, there.inverse()
        return self._there_and_back

    def extra_repr(self) -> str:
        return f"rotation={self.rotation}, grid={None if self.scheme is None else self.scheme.grid}"


def attach(attention: nn.Module, *, rotation: Rotation | None, scheme: Scheme | None) -> None:
    """Make an attention module of transformers round its new keys and values; see `KeyValueStage` for the two.

    What was attached before is replaced. It goes where the module goes: deep copies have it, and its state_dict is the same.
    Raises UnsupportedModel for a module that takes no `past_key_values`.
    """
    if _CACHE not in signature(attention.forward).parameters:
        raise UnsupportedModel(
            f"{type(attention).__name__} takes no {_CACHE}, so its keys and values cannot be quantized on their way into a "
            "cache. Leave the scheme of the cache and the rotation R3 out for this model"
        )
    hooked = _STAGE in dict(attention.named_children())
    attention.register_module(_STAGE, KeyValueStage(rotation, scheme))
    if not hooked:
        attention.register_forward_pre_hook(_stand_in, with_kwargs=True)


class _Cache(Protocol):
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any: ...


class _Rounding:
    """Stands where an attention module expects its cache. behind: the model's own, or None where it keeps none."""

    def __init__(self, stage: nn.Module, behind: _Cache | None) -> None:
        self.stage, self.behind = stage, behind

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values of all tokens so far [batch, heads, tokens, head size], the new ones rounded."""
        keys, values = self.stage(key_states, value_states)
        return (keys, values) if self.behind is None else self.behind.update(keys, values, layer_idx, *args, **kwargs)


def _stand_in(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, _CACHE: _Rounding(attention.get_submodule(_STAGE), kwargs.get(_CACHE))}
