"""Keeping `save_pretrained` from writing a model without what it does beyond its weights.

transformers asks a model's `hf_quantizer` whether the model can be saved, and writes none whose quantizer says no.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import ref

from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitlathe.errors import FormatError
from bitlathe.plan import Plan


class Refusal:
    """Why `save_pretrained` must not write a model. Adapters on it may be saved, except on a copy of it."""

    def __init__(self, model: PreTrainedModel, reason: str) -> None:
        self._model: ref[PreTrainedModel] | None = ref(model)
        self.reason = reason

    def is_serializable(self) -> bool:
        """The answer of a quantizer: False where adapters are all that is written, otherwise it raises FormatError."""
        model = None if self._model is None else self._model()
        if model is not None and model._hf_peft_config_loaded:
            return False
        raise FormatError(self.reason)

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": None, "reason": self.reason}  # a weak reference can be neither copied to a copy nor pickled


class LoadedQuantizer(HfQuantizer):
    """The quantizer of a model that `bitlathe.load` gave; all it does is to refuse."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(QuantizationConfigMixin(quant_method="bitlathe"))  # pyright: ignore[reportArgumentType]
        self.refusal = refusal

    def is_serializable(self) -> Any:
        """See `Refusal`."""
        return self.refusal.is_serializable()

    @property
    def is_trainable(self) -> Any:
        """False: the weights are those of codes."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True: it is a model like any other."""
        return True


def refuse_to_save(model: PreTrainedModel, plan: Plan, folder: Path) -> None:
    """Have `save_pretrained` raise FormatError if a model loaded from `folder` does more than its weights say.

    What is only in the weights, folded rotations included, is saved as the dense weights that it is.
    """
    beyond = {
        "quantized activations": any(row.input is not None for row in plan.linears.values()),
        "rotations that run online": any(row.online is not None for row in plan.linears.values())
        or any(rotation.space == "qk" for rotation in plan.rotations),
        "quantized keys and values": plan.kv is not None,
    }
    lost = [what for what, there in beyond.items() if there]
    if lost:
        model.hf_quantizer = LoadedQuantizer(  # pyright: ignore[reportArgumentType] a module may hold any object
            Refusal(
                model,
                f"save_pretrained would write the weights of {folder} without its {' and its '.join(lost)}, as a model that "
                f"gives other numbers. Copy the files of {folder} instead",
            )
        )
