"""A checkpoint that its makers publish in FP8, as the original that it is: floats.

Some makers have no wider weights to give (quant_method "fp8"): beside `weight`, in E4M3, lies `weight_scale_inv`, one number
for each block of `weight_block_size`, or one for all, by which codes are multiplied. A weight is dequantized when it is read,
in float32, and whoever reads it rounds once, to the dtype that is asked for. Activations, which the method rounds, stay as
they are: that is how a model is run, and no part of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from bitlathe.errors import CheckpointError
from bitlathe.formats.fp8 import METHOD
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.io.tensor_info import TensorInfo
from bitlathe.io.writer import report_of
from bitlathe.numerics.project import QuantTensor, dequantize
from bitlathe.numerics.scheme import Scheme

_CODES = "F8_E4M3"
_SCALE = "_scale_inv"
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_BESIDE = (f"weight{_SCALE}", "activation_scale")  # the latter is for activations with a static scale


def as_original(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, as floats where another program published it in FP8; any other one, and a result of ours, as it is.

    Raises CheckpointError for FP8 weights whose scales are missing or of other blocks than config.json says.
    """
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None or quantization.get("quant_method") != METHOD:
        return checkpoint
    # A result of ours has an original elsewhere.
    return checkpoint if report_of(checkpoint.path) is not None else Dequantized(checkpoint)


class Dequantized(Checkpoint):
    """A view of an FP8 checkpoint that has no scales and no quantization_config, and whose weights are float32.

    stored: the checkpoint itself. Nothing is read before `read`, and nothing is kept.
    """

    def __init__(self, stored: Checkpoint) -> None:
        self.stored = stored
        self.source, self.path, self.from_hub = stored.source, stored.path, stored.from_hub
        self.config: dict[str, Any] = {key: said for key, said in stored.config.items() if key != "quantization_config"}
        self._scheme = Scheme(grid="E4M3", block=_block_of(stored), scale=Scheme(grid="FP32"))
        self.header: dict[str, TensorInfo] = {}
        for name, info in stored.header.items():
            if name.endswith(_BESIDE):
                continue
            self.header[name] = info
            if info.dtype == _CODES or _scale_of(name) in stored.header:
                self._refuse(name)
                self.header[name] = replace(info, dtype="F32", nbytes=4 * prod(info.shape))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, those in FP8 dequantized. Raises CheckpointError like `Checkpoint.read`."""
        wanted = list(dict.fromkeys(names))
        coded = [name for name in wanted if _scale_of(name) in self.stored.header]
        found = self.stored.read([*wanted, *map(_scale_of, coded)])
        for name in coded:
            found[name] = self._floats(found[name], found[_scale_of(name)])
        return {name: found[name] for name in wanted}

    def fingerprint(self) -> str:
        """That of the checkpoint itself."""
        return self.stored.fingerprint()

    def _floats(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Codes [outputs, inputs] times the scales of their blocks, float32."""
        assert self._scheme.scale is not None
        shape = (codes.shape[0], codes.shape[1])
        blocks = self._scheme.blocks(shape)
        held = QuantTensor(self._scheme.scale, blocks, scale.float().reshape(blocks))
        return dequantize(QuantTensor(self._scheme, shape, codes, held), torch.float32)

    def _refuse(self, name: str) -> None:
        """Raise CheckpointError for a weight that cannot be dequantized."""
        info, scale = self.stored.header[name], self.stored.header.get(_scale_of(name))
        if info.dtype != _CODES or len(info.shape) != 2:
            reason = f"is {info.dtype} {list(info.shape)} with scales beside it, where matrices of {_CODES} are read"
        elif scale is None:
            reason = f"is in FP8, and there is no {_scale_of(name)}"
        else:
            reason = self._misfit((info.shape[0], info.shape[1]), scale)
        if reason:
            raise CheckpointError(
                f"{self.path}: {name} {reason}. Take the config.json that belongs to these weights, or another publication of "
                "the model, in 16 bits"
            )

    def _misfit(self, shape: tuple[int, int], scale: TensorInfo) -> str:
        """What is wrong with the scales of a weight of `shape`; "" if nothing is."""
        if not self._scheme.fits(shape):
            return f"has {shape[1]} inputs, which are no multiple of {self._scheme.block[1]}"
        blocks = self._scheme.blocks(shape)
        if scale.dtype not in _SCALES or (scale.shape != blocks and not prod(scale.shape) == prod(blocks) == 1):
            return f"has scales {scale.dtype} {list(scale.shape)}, where its blocks need {list(blocks)}"
        return ""


def _scale_of(name: str) -> str:
    return f"{name}{_SCALE}"


def _block_of(checkpoint: Checkpoint) -> tuple[int, int]:
    """Rows and columns of a block, (0, 0) for one scale a matrix."""
    said = checkpoint.config["quantization_config"].get("weight_block_size")
    if said is None:
        return 0, 0
    if not isinstance(said, list) or len(said) != 2 or not all(isinstance(side, int) and side > 0 for side in said):
        raise CheckpointError(
            f"{checkpoint.path}: weight_block_size is {said!r}, where two numbers are wanted. Take the config.json that "
            "belongs to these weights"
        )
    return said[0], said[1]
