"""What a checkpoint format is: pure functions between codes and the tensors of a file.

A format permutes bits and never rounds: it has no way to, because it sees codes and never the float weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from bitlathe.numerics.activation import StaticScale
from bitlathe.numerics.project import QuantTensor
from bitlathe.plan import LayerPlan, Plan


@dataclass(frozen=True)
class QuantLayer:
    """A finished linear.

    weight: its codes and scales, [outputs, inputs]. input: the static scale of its activations, or None.
    """

    weight: QuantTensor
    input: StaticScale | None = None


@dataclass(frozen=True)
class Source:
    """What a file of a whole model says beside its tensors. name: the model's own. config: the result's config.json. folder:
    the model's, with its tokenizer."""

    name: str
    config: Mapping[str, Any]
    folder: Path
    plan: Plan


class Container(Protocol):
    """One file that takes the place of a result's shards. file: its name."""

    file: str

    def refuse(self, config: Mapping[str, Any], folder: Path) -> None:
        """Raise FormatError for a model that cannot be written. config: its config.json; folder: with its tokenizer."""
        ...

    def notes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """What to say of a model that `refuse` lets pass: what some readers would leave out. config: its config.json."""
        ...

    def write(self, path: Path, shards: Sequence[Path], source: Source) -> None:
        """Write the tensors of `shards` to the file `path`, one at a time; the same shards give the same bytes."""
        ...


class Format(Protocol):
    """One checkpoint format; instances hold nothing.

    dtype: the only one that its readers hold scales in, "fp16" or "bf16"; None where that is the model's. container: what its
    shards become at the end; None where they stay.
    """

    name: str
    dtype: ClassVar[Literal["bf16", "fp16"] | None]
    container: Container | None

    def check(self, plan: Plan, shapes: Mapping[str, tuple[int, int]], fused: Mapping[str, str]) -> None:
        """Raise FormatError if `plan` cannot be held; shapes: linear -> (outputs, inputs), in which a quantized
        table of embeddings is not; fused: linear -> fused group."""
        ...

    def bits(self, row: LayerPlan, shape: tuple[int, int]) -> int:
        """What a linear's weight takes in a file, in bits: all that `encode` gives but what is static of its activations.

        Counted from row and shape alone, however large: codes, scales of every level, zero points, padding, and whatever else
        readers want. row: of a plan that `check` lets pass, with a weight scheme; shape: (outputs, inputs).
        """
        ...

    def encode(self, layer: QuantLayer, row: LayerPlan, dtype: str) -> dict[str, Tensor]:
        """The tensors of a linear, keyed by what follows "<linear>." in the file.

        row: its row of the plan; dtype: the plan's.
        """
        ...

    def decode(self, tensors: Mapping[str, Tensor], row: LayerPlan, shape: tuple[int, int]) -> QuantLayer:
        """The inverse of `encode`, bit for bit. row: of the plan, with a weight scheme; shape: (outputs, inputs)."""
        ...

    def decode_input(self, tensors: Mapping[str, Tensor], row: LayerPlan) -> StaticScale | None:
        """What `decode` gives as `input`, of the tensors alone whose names begin with "input_"."""
        ...

    def config(self, plan: Plan) -> dict[str, Any] | None:
        """What config.json holds under "quantization_config"; None where the result is an ordinary checkpoint."""
        ...

    def parse(self, config: Mapping[str, Any], linears: list[str]) -> Plan:
        """The inverse of `config`; linears: every linear of the model, in its order."""
        ...
