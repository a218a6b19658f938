"""`import bitlathe.hf`: transformers learns to load the native format, and to run the rotations of compressed-tensors.

After it, `AutoModelForCausalLM.from_pretrained(folder)` gives the model that `bitlathe.load(folder)` gives, bit for bit, and
its own arguments (dtype, device_map) keep their meaning. Without it transformers stops at the first quantized linear of the
native format, which is that of dense folders too where inputs are turned or rounded; a compressed-tensors folder whose linears
turn their inputs it loads, and runs wrong.

While the weights are read, a module that holds the streams of codes stands where each quantized linear was; transformers casts
floats and finds only integers. Then each turns its codes into the weight they stand for. Embeddings stay the module they are,
which may do more than look rows up, and hold the streams themselves; so does a head that shares their weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitlathe.arch import ARCHS, Arch, arch_for
from bitlathe.errors import CheckpointError, FormatError
from bitlathe.formats.compressed_tensors import METHOD as CT_METHOD
from bitlathe.formats.compressed_tensors import CompressedTensors
from bitlathe.formats.native import METHOD, Native
from bitlathe.formats.stored import Layout, take
from bitlathe.io.checkpoint import DTYPES as STORED
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.block import attach_cache
from bitlathe.model.experts import split_experts
from bitlathe.model.layers import Stage
from bitlathe.model.saving import Refusal
from bitlathe.model.skeleton import linears_of
from bitlathe.model.weights import DTYPES
from bitlathe.numerics.project import dequantize
from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import name_of
from bitlathe.plan import LayerPlan, Plan


class CodedLinear(nn.Module):
    """A linear that is loaded as codes. Until `settle` its buffers are the streams of the native format; after, `weight`."""

    def __init__(self, linear: nn.Linear, row: LayerPlan) -> None:
        super().__init__()
        self.row, self.shape, self.dtype = row, (linear.out_features, linear.in_features), linear.weight.dtype
        for name, (dtype, shape) in Native().layout(row, self.shape).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.bias, self.stage = linear.bias, nn.Identity()

    def settle(self, dtype: torch.dtype) -> None:
        """Replace the streams by the weight they stand for. dtype: the plan's; the weight is cast to the model's own after."""
        streams = dict(self.named_buffers(recurse=False))
        layer = Native().decode(streams, self.row, self.shape)
        for name in streams:
            delattr(self, name)
        self.stage = Stage(self.row, layer.input, quantized=True)
        self.weight = nn.Parameter(dequantize(layer.weight, dtype).to(self.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return F.linear(self.stage(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        scheme = "none" if self.row.weight is None else name_of(self.row.weight, self.row.input)
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, bias={self.bias is not None}, scheme={scheme}"


def _hold(module: nn.Module, layout: Layout) -> None:
    """Put streams where a module's weight was. That of the codes is a parameter, as what is shared by a head must be."""
    streams = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
    module.register_parameter("weight", nn.Parameter(streams.pop("weight"), requires_grad=False))
    for name, stream in streams.items():
        module.register_buffer(name, stream)


@dataclass(frozen=True)
class _Table:
    """Embeddings that are loaded as codes. heads: the modules that share their weight. dtype: of that weight in the model."""

    module: nn.Module
    heads: tuple[nn.Module, ...]
    row: LayerPlan
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel, arch: Arch, row: LayerPlan) -> _Table:
        """Those of a model, from here on with streams where the weight was."""
        module = model.get_submodule(arch.embed)
        heads = (model.get_submodule(arch.head),) if model.config.tie_word_embeddings else ()
        weight = module.get_parameter("weight")
        table = cls(module, heads, row, (weight.shape[0], weight.shape[1]), weight.dtype)
        _hold(module, table.layout)
        # transformers gives a head what the embeddings hold as their weight, here a stream.
        for head in heads:
            _hold(head, {"weight": table.layout["weight"]})
        return table

    def settle(self, dtype: torch.dtype) -> None:
        """Like `CodedLinear.settle`."""
        streams = {name: self.module.get_buffer(name) for name in self.layout if name != "weight"}
        layer = Native().decode(streams | {"weight": self.module.get_parameter("weight").data}, self.row, self.shape)
        for name in streams:
            delattr(self.module, name)
        weight = nn.Parameter(dequantize(layer.weight, dtype).to(self.dtype), requires_grad=False)
        for module in (self.module, *self.heads):
            module.register_parameter("weight", weight)

    @property
    def layout(self) -> Layout:
        """Of the streams."""
        return Native().layout(self.row, self.shape)


@register_quantization_config(METHOD)
class BitlatheConfig(QuantizationConfigMixin):
    """The native format's part of config.json, as it is there."""

    def __init__(self, **stored: Any) -> None:
        self.quant_method: Any = METHOD
        self.stored = stored

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return dict(self.stored)


@register_quantizer(METHOD)
class BitlatheQuantizer(HfQuantizer):
    """Loads the native format; it quantizes nothing itself, and what it loaded is not trained or saved again."""

    requires_calibration = True
    _refusal: Refusal | None = None
    _tables: Mapping[str, _Table]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, *, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        arch = arch_for(model.config.to_dict())
        split_experts(model, arch)
        shapes = linears_of(model, arch)
        stored = {name for group in self.quantization_config.to_dict()["groups"] for name in group["linears"]}
        plan = self._plan([*shapes, *(name for name in (arch.embed,) if name in stored)])
        rows = {name: plan.linears[name] for name in plan.quantized}
        if not checkpoint_files:
            raise CheckpointError("there is no file to read codes from: give from_pretrained the folder that bitlathe wrote")
        folder = Path(checkpoint_files[0]).parent
        self._refusal = Refusal(
            model,
            f"save_pretrained would write dequantized weights under the configuration of codes of {folder}. Copy the files of "
            f"{folder} instead",
        )
        # transformers leaves a tensor that it does not find as the memory was, and that would be decoded.
        tokens, width = model.get_submodule(arch.embed).get_parameter("weight").shape
        _check_streams(Checkpoint(folder), rows, {**shapes, arch.embed: (tokens, width)})
        tables = [name for name in rows if name not in shapes]
        self._tables = {name: _Table.of(model, arch, rows.pop(name)) for name in tables}
        for name, row in rows.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).register_module(child, CodedLinear(linear, row))
        blocks = model.get_submodule(arch.blocks).children()
        attach_cache([block.get_submodule(arch.attention) for block in blocks], plan)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        dtype = DTYPES[str(self.quantization_config.to_dict()["dtype"])]
        linears = {name: module for name, module in model.named_modules() if isinstance(module, CodedLinear)}
        for name, coded in (linears | dict(self._tables)).items():
            if any(stream.is_meta for stream in model.get_submodule(name).state_dict().values()):
                raise FormatError(
                    f"the device_map moves {name} out of memory, where its codes cannot be decoded. Give a device_map that "
                    "keeps every quantized linear on one device, or use bitlathe.load"
                )
            coded.settle(dtype)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """transformers' own, without what fuses experts. args: the model, in some versions of transformers."""
        return super().update_weight_conversions(_unfused(weight_conversions), *args, **kwargs)

    def _plan(self, linears: list[str]) -> Plan:
        return Native().parse(self.quantization_config.to_dict(), linears)

    def is_serializable(self) -> Any:
        """Never: raises FormatError, or gives False where only adapters are saved."""
        return False if self._refusal is None else self._refusal.is_serializable()

    @property
    def is_trainable(self) -> Any:
        """False: a step on the weights would leave the codes behind."""
        return False


class TurningQuantizer(CompressedTensorsHfQuantizer):
    """transformers' own for compressed-tensors; after it, linears turn their inputs where the folder's config says so.

    Where they do, the model is not saved again: transformers drops the transform_config that says so.
    """

    _online: Mapping[str, Rotation]
    _refusal: Refusal | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, *, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        config = Checkpoint(folder).config.get("quantization_config", {}) if folder is not None else {}
        self._online = {}
        if model.config.model_type in ARCHS:
            split_experts(model, ARCHS[model.config.model_type])
        if config.get("transform_config"):
            linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            rows = CompressedTensors().parse(config, linears).linears
            self._online = {name: row.online for name, row in rows.items() if row.online is not None}
        if self._online:
            self._refusal = Refusal(
                model,
                f"save_pretrained would write {folder} without its transform_config, and readers would leave out the rotations "
                f"that run online. Copy the files of {folder} instead",
            )
        super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """transformers' own, without what fuses experts. args: the model, in some versions of transformers."""
        return super().update_weight_conversions(_unfused(weight_conversions), *args, **kwargs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **kwargs)
        if (arch := ARCHS.get(model.config.model_type)) is not None and arch.shared is not None:
            for name, module in model.named_modules():
                if name.endswith(f".{arch.shared}"):
                    module.register_forward_pre_hook(_batch_of_one)
                    module.register_forward_hook(_first_of_batch)
        for name, rotation in self._online.items():
            stage = Stage(LayerPlan(online=rotation))
            model.get_submodule(name).register_forward_pre_hook(partial(_turn_input, stage=stage))
        return model

    def is_serializable(self) -> Any:
        """As transformers' own, but where linears turn their inputs: see `Refusal`."""
        return super().is_serializable() if self._refusal is None else self._refusal.is_serializable()


def _batch_of_one(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tokens [tokens, width] as a batch: of a matrix the compressed-tensors library scales all rows as one token."""
    return (inputs[0][None],)


def _first_of_batch(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output[0]


def _unfused(conversions: list[Any]) -> list[Any]:
    """Without the conversions that merge the experts of a checkpoint into one parameter: here each has its own."""
    return [
        conversion
        for conversion in conversions
        if not isinstance(conversion, WeightConverter) or not any("experts" in target for target in conversion.target_patterns)
    ]


def _turn_input(_module: nn.Module, inputs: tuple[Tensor, ...], *, stage: Stage) -> tuple[Tensor, ...]:
    return (stage(inputs[0]), *inputs[1:])


# The table that transformers looks loaders up in: its own decorator adds methods and refuses to replace one.
AUTO_QUANTIZER_MAPPING[CT_METHOD] = TurningQuantizer


def _check_streams(checkpoint: Checkpoint, rows: Mapping[str, LayerPlan], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise CheckpointError for a linear whose streams the files do not hold. shapes: linear -> (outputs, inputs)."""
    for name, row in rows.items():
        layout = Native().layout(row, shapes[name])
        stored = {stream: info for stream in layout if (info := checkpoint.header.get(f"{name}.{stream}")) is not None}
        tensors = {key: torch.empty(info.shape, dtype=STORED[info.dtype], device="meta") for key, info in stored.items()}
        try:
            for stream, place in layout.items():
                take(tensors, stream, *place)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.path}, {name}: {error}") from error
