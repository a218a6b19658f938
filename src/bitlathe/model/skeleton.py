"""A model without weights: what transformers would build, from which blocks are taken one at a time.

The blocks of the skeleton stay on the meta device. To learn how the model calls its blocks, a second skeleton is run whose
blocks are taps: they record the call they receive and pass the hidden states on.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from bitlathe.arch import Arch, Linear, arch_for
from bitlathe.errors import CheckpointError, UnsupportedModel
from bitlathe.io.checkpoint import CONFIG, Checkpoint
from bitlathe.model.block import Block, staged
from bitlathe.model.buffers import materialise_buffers
from bitlathe.model.experts import split_experts
from bitlathe.model.weights import Weights

# Tokens whose logits are held at a time.
_PART = 128


class _Tap(nn.Module):
    """Stands where a block was and remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.call: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        self.hidden, self.call = hidden_states, call
        return hidden_states


class _Tail(nn.Module):
    """Stands where the base model was: the hidden states it is given are those after the last block."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, *, inputs_embeds: Tensor, **_: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.norm(inputs_embeds))


class Head(Block):
    """The end of the model, as the block after the last: final norm, output head, and what the family does to logits."""

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """[batch, tokens, width] to logits [batch, tokens, vocabulary]."""
        return self.module(inputs_embeds=x_BTD, use_cache=False).logits

    def parts(self, x_BTD: Tensor) -> Sequence[Tensor]:
        """A few tokens [1, tokens, width] at a time: no token's logits depend on another's, and a vocabulary is wide."""
        return x_BTD.reshape(1, -1, x_BTD.shape[-1]).split(_PART, dim=1)


@dataclass(frozen=True)
class Skeleton:
    """The shape of a model, and its parts on demand. model: on the meta device, never filled. linears: every linear, routers
    among them, with its shape, in the model's order."""

    model: PreTrainedModel
    arch: Arch
    linears: dict[str, tuple[int, int]] = field(repr=False)

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self._layers)

    @property
    def blocks(self) -> list[str]:
        """The blocks' paths in the model."""
        return [f"{self.arch.blocks}.{index}" for index in range(self.depth)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a checkpoint of the model must have, tied ones once, with its shape."""
        return {name: tuple(t.shape) for name, t in self.model.state_dict().items() if name not in self.tied}

    @property
    def tied(self) -> dict[str, str]:
        """Parameter -> the parameter whose tensor it shares."""
        head, embed = f"{self.arch.head}.weight", f"{self.arch.embed}.weight"
        return {head: embed} if self.model.config.tie_word_embeddings else {}

    @property
    def fused(self) -> dict[str, str]:
        """Linear -> label of the group of linears that is served as one matrix."""
        return {name: row.fused for name, row in self.rows.items() if row.fused}

    @cached_property
    def rows(self) -> dict[str, Linear]:
        """Every linear with its row of the family's table, all names in full."""
        return {name: row for name in self.linears if (row := self.arch.row(name)) is not None}

    def matrices(self, quantized: Container[str]) -> dict[str, tuple[int, int]]:
        """All that a plan may have rows for, with its shape: the linears, and the embeddings [vocabulary, width] if they are in
        `quantized`, for they have no row otherwise."""
        table = self.arch.embed
        rows, columns = self.model.get_submodule(table).get_parameter("weight").shape
        return {**self.linears, **({table: (rows, columns)} if table in quantized else {})}

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        size = self.model.get_submodule(f"{self.blocks[0]}.{self.arch.attention}").head_dim
        assert isinstance(size, int)
        return size

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Space that a rotation may name -> the sizes it has in the model; of one head for "value" and "qk"."""
        mid = {self.linears[name][1] for name, row in self.rows.items() if row.reads == "mid"}
        return {
            "residual": (self.model.config.hidden_size,),
            "value": (self.head_size,),
            "qk": (self.head_size,),
            "mid": tuple(sorted(mid)),
        }

    @property
    def attended(self) -> int:
        """How much the linear that ends the first block's attention reads."""
        return next(self.linears[name][1] for name, row in self.rows.items() if row.reads == "value")

    @property
    def value_width(self) -> int:
        """Width of the values of all heads of a block."""
        return self.head_size * self.model.config.num_key_value_heads

    def share(self, name: str) -> Fraction:
        """The part of all tokens for which a linear runs: 1, but for those of experts."""
        config, row = self.model.config, self.rows[name]
        expert = self.arch.experts is not None and row.fused is not None and row.fused.endswith(f".{self.arch.experts}")
        return Fraction(config.num_experts_per_tok, config.num_experts) if expert else Fraction(1)

    def parameters_of(self, name: str) -> list[str]:
        """Full names of the parameters and buffers saved for the module `name`."""
        return [f"{name}.{key}" for key in self.model.get_submodule(name).state_dict()]

    def shard(self, index: int) -> list[str]:
        """The tensors of block `index`; after the last block, those outside of all blocks."""
        if index < self.depth:
            return self.parameters_of(self.blocks[index])
        return [name for name in self.shapes if not name.startswith(f"{self.arch.blocks}.")]

    def untie(self) -> Skeleton:
        """The skeleton of the same model with an output head of its own."""
        config = copy.deepcopy(self.model.config)
        config.tie_word_embeddings = False
        return _built(config, self.arch, self.model.dtype)

    def block(self, index: int, tensors: dict[str, Tensor], call: dict[str, Any], weights: Weights) -> Block:
        """Block `index` with `tensors`, all of its parameters by their full names, which were read from `weights`."""
        name = self.blocks[index]
        module = _filled(self.model, name, tensors, weights.dtype)
        prefix = f"{name}."
        linears = tuple(linear for linear in self.linears if linear.startswith(prefix) and not self.rows[linear].router)
        attention = f"{name}.{self.arch.attention}"
        order = {"stages": self._stages(linears), "onto": self._onto(linears)}
        block = Block(index, name, module, linears, self.fused, call, weights.dtype, weights.held, attention, **order)
        return staged(block, weights)

    def _stages(self, linears: Iterable[str]) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """See `Block.stages`. The table names the linears of a family in the order in which they run."""
        order = [row.name for row in self.arch.linears]
        stages: dict[tuple[str, str], dict[str, list[str]]] = {}
        for name in sorted(linears, key=lambda name: order.index(self.arch.template(name))):
            parent, reads = name.rpartition(".")[0], self.rows[name].reads
            kind = self.arch.template(name).rpartition(".")[0]
            stages.setdefault((kind, reads), {}).setdefault(parent, []).append(name)
        return tuple(tuple(map(tuple, groups.values())) for groups in stages.values())

    def _onto(self, linears: Iterable[str]) -> dict[str, str]:
        """See `Block.onto`."""
        return {name: norm for name in linears if (norm := self.rows[name].onto) is not None}

    def head(self, weights: Weights) -> Head:
        """The end of the model, with its weights."""
        names = [self.arch.norm, self.arch.head]
        read = weights.read(key for name in names for key in self.parameters_of(name))
        norm, head = (_filled(self.model, name, read, weights.dtype) for name in names)
        model = copy.deepcopy(self.model)
        _put(model, self.arch.base, _Tail(norm))
        _put(model, self.arch.head, head)
        linears = (self.arch.head,)
        return staged(Head(self.depth, "", model, linears, {}, {}, weights.dtype, weights.held), weights)

    def front(self, weights: Weights) -> Front:
        """What comes before the blocks: embeddings and the calls that the blocks will receive."""
        model = copy.deepcopy(self.model)
        taps = [_Tap() for _ in range(self.depth)]
        _put(model, self.arch.blocks, nn.ModuleList(taps))
        _put(model, self.arch.norm, nn.Identity())
        base = model.get_submodule(self.arch.base)
        materialise_buffers(model, [base], weights.device)
        embed = weights.read(self.parameters_of(self.arch.embed))
        base.load_state_dict(
            {key.removeprefix(f"{self.arch.base}."): tensor for key, tensor in embed.items()}, strict=False, assign=True
        )
        return Front(base.eval(), taps)

    @property
    def _layers(self) -> nn.ModuleList:
        layers = self.model.get_submodule(self.arch.blocks)
        assert isinstance(layers, nn.ModuleList)
        return layers


@dataclass(frozen=True)
class Front:
    """Embeddings, rotary tables and masks: everything of a model that runs before its first block."""

    base: nn.Module
    taps: list[_Tap]

    def embed(self, tokens_1T: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """First hidden states [1, tokens, width] of one window, and each block's call.

        The calls depend on the window's length only and have a batch of one in front, so they serve any batch of windows of
        that length.
        """
        with torch.no_grad():
            self.base(input_ids=tokens_1T, use_cache=False)
        hidden = self.taps[0].hidden
        assert isinstance(hidden, Tensor)
        return hidden, [tap.call for tap in self.taps]


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The model's configuration, without what an earlier quantization put into it."""
    try:
        config = AutoConfig.from_pretrained(checkpoint.path)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(
            f"transformers does not accept {checkpoint.path / CONFIG}: {error}. Take the {CONFIG} that belongs to these weights"
        ) from error
    vars(config).pop("quantization_config", None)
    return config


def skeleton_of(checkpoint: Checkpoint, dtype: torch.dtype) -> Skeleton:
    """The skeleton of the model in a checkpoint, to be run in `dtype`.

    Raises UnsupportedModel for a family without a table, or with linears that its table does not name, and CheckpointError
    for a configuration that its family does not allow.
    """
    # First: to a family that it does not know transformers has other answers, among them to offer to run the model's code.
    arch = arch_for(checkpoint.config)
    config = read_config(checkpoint)
    return _built(config, arch, dtype)


def _built(config: PretrainedConfig, arch: Arch, dtype: torch.dtype) -> Skeleton:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    split_experts(model, arch)
    model.requires_grad_(requires_grad=False)
    model.eval()
    return Skeleton(model, arch, linears_of(model, arch))


def linears_of(model: PreTrainedModel, arch: Arch) -> dict[str, tuple[int, int]]:
    """Every linear of the model, whose experts are split, with its shape, in the model's order, routers among them.

    Raises UnsupportedModel for one that the table of the family does not name.
    """
    found = {}
    for name, module in model.named_modules():
        row = arch.row(name)
        if isinstance(module, nn.Linear) and row is None:
            raise UnsupportedModel(
                f"{name} is a linear that the table of the family {model.config.model_type!r} does not name, so it would "
                "be left out without a word. This variant of the family needs a table of its own"
            )
        if row is not None:
            outputs, inputs = module.get_parameter("weight").shape
            found[name] = (outputs, inputs)
    return found


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent).register_module(child, module)


def _filled(model: PreTrainedModel, name: str, weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    module = copy.deepcopy(model.get_submodule(name))
    prefix = f"{name}."
    inner = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    module.load_state_dict(inner, assign=True)
    device = next(iter(inner.values())).device
    materialise_buffers(model, [module], device)
    assert all(parameter.dtype == dtype for parameter in module.parameters())
    return module.requires_grad_(requires_grad=False).eval()
