"""Whether vLLM would load a compressed-tensors configuration: its rules, retold, so that tests can ask without vLLM.

Read in vLLM 0.33.0 (commit 4ba787ec9), the default, and 0.20.0 (commit b8160878f); what differs is in vllm_schemes.VERSIONS:

    layers/quantization/compressed_tensors/compressed_tensors.py, utils.py    groups, targets, classes
    layers/quantization/compressed_tensors/schemes/, .../compressed_tensors_moe/, transform/    what each class takes
    layers/quantization/utils/config_utils.py, models/interfaces.py, model_loader/utils.py      ignore, names of fused modules
    kernels/linear/, layers/fused_moe/oracle/, layers/vocab_parallel_embedding.py               kernels, experts, the head
    models/{llama,mistral,qwen2,qwen3,gemma2,gemma3,phi3,qwen2_moe,qwen3_moe,olmoe}.py, models/transformers/ (for olmo2)

How it goes. vLLM builds its own modules: q, k and v are one, gate and up are one, all experts of a block are one. Each asks the
configuration by its own name. It is ignored when the list names it or all of its parts; when the list names some of them, the
start stops. Else its group is that of the first target, in the order of the configuration, that is its name or a pattern that
its name begins with; or, where all of its parts have such a target, the one of its first part; or one that its class contains
as text ("Linear" is in QKVParallelLinear, but not in ParallelLMHead). Experts ask for the linears of expert 0, which must
agree. Nobody compares the parts of other modules, so a split group is loaded as if it were all of the first part's scheme.

What the file holds of each linear is read here as the compressed-tensors library reads it: exact names, then patterns, then
the class. Where a module is built otherwise than one of its parts is stored, there are tensors without a place, or a place
without tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.utils.match import match_name

from vllm_schemes import ROUNDING, VERSIONS, Group, Version, holds, refusal, shown

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_HEAD, _EXPERTS = "ParallelLMHead", "RoutedExperts"
_CLASSES = {
    "qkv_proj": "QKVParallelLinear",
    "gate_up_proj": "MergedColumnParallelLinear",
    "experts": _EXPERTS,
    "lm_head": _HEAD,
}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.\w+")


@dataclass(frozen=True)
class Complaint:
    """Why vLLM does not load a configuration. severity: "structural" where groups, names or formats are at odds with what it
    builds, "scheme" where it has nothing that runs the numbers. module: vLLM's module, or a name in the configuration."""

    severity: Literal["structural", "scheme"]
    module: str
    reason: str


@dataclass(frozen=True)
class Module:
    """A module that vLLM builds. kind: its class. parts: the linears of the checkpoint it holds. asks: it looks at the
    configuration; some routers do not."""

    name: str
    kind: str
    parts: tuple[str, ...]
    asks: bool


class _Stops(Exception):
    """vLLM raises while it builds a module."""


def complaints(config: Mapping[str, Any], family: str, linears: Sequence[str], *, version: str = "0.33.0") -> list[Complaint]:
    """What keeps vLLM from loading a configuration; empty when it loads.

    config: the quantization_config of a config.json. family: its model_type. linears: all linears of the checkpoint by their
    names in it, experts one by one, routers and head among them. version: a key of VERSIONS.
    """
    reader = VERSIONS[version]
    groups = {name: _group(group, config) for name, group in config["config_groups"].items()}
    found = [complaint for name, group in groups.items() for complaint in _of_group(name, group)]
    targets = {target: groups[name] for name, group in config["config_groups"].items() for target in group["targets"]}
    build = _Build(targets, list(config.get("ignore") or ()), _packing(family, linears), reader)
    for module in modules_of(family, linears):
        found += _of_module(module, build, targets)
        found += _of_rotations(module, config.get("transform_config") or {})
    return found


def modules_of(family: str, linears: Sequence[str]) -> list[Module]:
    """The modules that vLLM builds of a model's linears, in their order."""
    parts: dict[str, list[str]] = {}
    for linear in linears:
        parts.setdefault(_home(linear), []).append(linear)
    return [_module(family, name, tuple(held)) for name, held in parts.items()]


def _home(linear: str) -> str:
    if (expert := _EXPERT.fullmatch(linear)) is not None:
        return expert[1]
    parent, _, own = linear.rpartition(".")
    fused = next((whole for whole, parts in FUSED.items() if own in parts), None)
    return linear if fused is None else f"{parent}.{fused}"


def _module(family: str, name: str, parts: tuple[str, ...]) -> Module:
    own = name.rpartition(".")[2]
    kind = _CLASSES.get(own, "ReplicatedLinear" if own.endswith("gate") else "RowParallelLinear")
    asks = own != "shared_expert_gate" and (own != "gate" or family == "qwen3_moe")
    return Module(name, kind, parts, asks)


def _packing(family: str, linears: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Fused module -> its parts, as far as the model's class tells the configuration."""
    known = {
        **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"), tuple(FUSED)),
        "phi3": (),
        # It tells of gate and up where it has a shared expert.
        "qwen2_moe": tuple(FUSED) if any(".shared_expert." in name for name in linears) else ("qkv_proj",),
        # They do not, though qwen3_moe may have dense blocks.
        **dict.fromkeys(("qwen3_moe", "olmoe"), ("qkv_proj",)),
    }
    return {whole: FUSED[whole] for whole in known[family]}


def _group(group: Mapping[str, Any], config: Mapping[str, Any]) -> Group:
    if group.get("output_activations"):
        raise NotImplementedError("output_activations, which no configuration of this program has, are not retold here")
    inputs = group.get("input_activations")
    return Group(
        weights=QuantizationArgs.model_validate(group["weights"]),
        inputs=QuantizationArgs.model_validate(inputs) if inputs else None,
        format=str(group.get("format") or config.get("format")),
    )


def _of_group(name: str, group: Group) -> Iterator[Complaint]:
    if not holds(group):
        yield Complaint("structural", name, f"the format {group.format} does not store {shown(group)}")
    elif group.format in ROUNDING and group.inputs is None and group.weights.type == "int":
        yield Complaint("structural", name, f"the format {group.format} wants quantized activations beside integers")


@dataclass(frozen=True)
class _Build:
    """How a version chooses the group of a module."""

    targets: Mapping[str, Group]
    ignore: Sequence[str]
    packing: Mapping[str, tuple[str, ...]]
    version: Version

    def group_of(self, module: Module) -> Group | None:
        """None for a module that is kept in 16 bits. Raises _Stops."""
        if not module.asks:
            return None
        if module.kind != _EXPERTS:
            return self._chosen(module.name, module.kind)
        targets, kind = dict(self.targets), self.version.experts
        if "Linear" in targets:  # what it says of linears holds for experts, which are no linears here
            targets.setdefault(kind, targets["Linear"])
        build = _Build(targets, self.ignore, self.packing, self.version)
        found = [build._chosen(f"{module.name}.0.{own}", kind) for own in ("gate_proj", "up_proj", "down_proj")]
        if any(group != found[0] for group in found):
            raise _Stops("the projections of its first expert are of different groups")
        return found[0]

    def _chosen(self, name: str, kind: str) -> Group | None:
        if self._ignored(name):
            return None
        target = self._target(name, kind)
        if target is None and self.version.early and kind != _HEAD:
            raise _Stops("no target names it, or all of its parts, and it is not ignored")
        return None if target is None else self.targets[target]

    def _ignored(self, name: str) -> bool:
        parts = self._parts(name)
        whole = any(_says(pattern, name) for pattern in self.ignore)
        if name in self.ignore or (whole and not (parts and self.version.early)):
            return True
        found = [any(_says(pattern, part) for pattern in self.ignore) for part in parts]
        if any(found) and not all(found):
            raise _Stops("some of its parts are ignored and some are not")
        return bool(found) and all(found)

    def _target(self, name: str, kind: str) -> str | None:
        named = self._first(name)
        parts = [self._first(part) for part in self._parts(name)]
        of_parts = parts[0] if parts and all(parts) else None
        of_class = next((target for target in self.targets if _says(target, kind, within=True)), None)
        others = (of_class, of_parts) if self.version.early else (of_parts, of_class)
        return named or others[0] or others[1]

    def _first(self, name: str) -> str | None:
        return next((target for target in self.targets if _says(target, name)), None)

    def _parts(self, name: str) -> list[str]:
        parent, _, own = name.rpartition(".")
        return [f"{parent}.{part}" for part in self.packing.get(own, ())]


def _says(target: str, text: str, *, within: bool = False) -> bool:
    """Whether a target is `text`, or a pattern that it begins with; or, for names of classes, stands within it."""
    if target.startswith("re:"):
        return re.match(target[3:], text) is not None
    return target.lower() in text.lower() if within else target == text


def _stored(linear: str, ignore: Sequence[str], targets: Mapping[str, Group]) -> Group | None:
    """How the file holds a linear; None in 16 bits. Raises LookupError for one that nothing is said of."""
    if any(match_name(linear, pattern) for pattern in ignore):
        return None
    for target in sorted(targets, key=lambda target: ("re:" in target, target)):
        if match_name(linear, target):
            return targets[target]
    return targets["Linear"]


def _of_module(module: Module, build: _Build, targets: Mapping[str, Group]) -> Iterator[Complaint]:
    try:
        group = build.group_of(module)
    except _Stops as stop:
        yield Complaint("structural", module.name, str(stop))
        return
    for part in module.parts:
        try:
            stored = _stored(part, build.ignore, targets)
        except LookupError:
            yield Complaint("structural", module.name, f"{part} is in no group and not ignored")
            return
        if stored != group:
            made, held = ("16 bits" if one is None else shown(one) for one in (group, stored))
            yield Complaint("structural", module.name, f"it is built for {made}, and the file holds {part} in {held}")
            return
    if group is not None and (reason := refusal(group, build.version, kind=module.kind)) is not None:
        yield Complaint("scheme", module.name, reason)


def _of_rotations(module: Module, transforms: Mapping[str, Any]) -> Iterator[Complaint]:
    """Inputs are turned by linears alone, and the parts of one share a turn."""
    applied = [apply for group in transforms.get("config_groups", {}).values() for apply in group["apply"]]
    places = [apply["targets"] for apply in applied if apply["location"] == "input"]
    turned = [[any(match_name(part, target) for target in targets) for targets in places] for part in module.parts]
    if any(map(any, turned)) and module.kind in (_EXPERTS, _HEAD):
        yield Complaint("structural", module.name, f"the class {module.kind} does not turn its inputs")
    elif any(one != turned[0] for one in turned):
        yield Complaint("structural", module.name, "its parts are turned differently")
