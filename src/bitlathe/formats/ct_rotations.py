"""Rotations that run online, as the `transform_config` of compressed-tensors.

A group is a matrix and where it is applied; ours are named as rotations are, "R4" for the inputs of down_proj. Each linear has
it twice: on its input, which readers do as they run, and on its weight, inverted, which was done before the weight was
quantized. Rotations that are folded away need no entry. transformers 5 ignores all of it (bitlathe.hf does not).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformLocation, TransformScheme
from compressed_tensors.utils.match import match_name
from pydantic import ValidationError

from bitlathe.errors import FormatError
from bitlathe.formats.stored import some
from bitlathe.numerics.rotation import Rotation
from bitlathe.plan import Plan

_NAMES: dict[str, str] = {"residual": "R1", "value": "R2", "mid": "R4"}
_SPACES = {name: space for space, name in _NAMES.items()}
_ONLINE = (TransformLocation.INPUT, TransformLocation.OUTPUT, TransformLocation.K_CACHE, TransformLocation.Q_ATTN)


def reason_against(rotation: Rotation) -> str | None:
    """Why readers cannot turn inputs by a rotation, with the way out; None when they can."""
    name = _NAMES.get(rotation.space, "R3")
    if rotation.kind != "hadamard":
        return f"{name} runs online with random signs, for which there is no place; use --rotate {name}:hadamard"
    if rotation.block & (rotation.block - 1):
        least = rotation.block & -rotation.block
        return f"{name} runs online in blocks of {rotation.block}, and readers know powers of two; use --rotation-block {least}"
    return None


def transforms_of(plan: Plan) -> dict[str, Any] | None:
    """The transform_config of a plan; None where nothing runs online."""
    online: dict[Rotation, list[str]] = {rotation: [] for rotation in plan.rotations}
    for name, row in plan.linears.items():
        if row.online is not None:
            online.setdefault(row.online, []).append(name)
    groups: dict[str, TransformScheme] = {}
    for rotation, linears in online.items():
        if not linears:
            continue
        apply = [
            TransformArgs(targets=linears, location=TransformLocation.INPUT),
            TransformArgs(targets=linears, location=TransformLocation.WEIGHT_INPUT, inverse=True),
        ]
        name = _NAMES[rotation.space]
        groups[f"{name}_{len(groups)}" if name in groups else name] = TransformScheme(
            type="hadamard", apply=apply, head_dim=rotation.block or None, precision=torch.float32
        )
    return TransformConfig(config_groups=groups).model_dump(mode="json") if groups else None


def online_of(config: Mapping[str, Any], linears: list[str]) -> dict[str, Rotation]:
    """Linear -> the rotation of its input, in the order of the groups; the inverse of `transforms_of`.

    config: a transform_config, of this program or of another. A group that was only ever folded into weights is passed over.
    Raises FormatError for what cannot be run here.
    """
    try:
        stored = TransformConfig.model_validate(config)
    except ValidationError as error:
        raise FormatError(f"the compressed-tensors library does not accept the transform_config: {error}") from error
    online: dict[str, Rotation] = {}
    for name, group in stored.config_groups.items():
        applied = [place for place in group.apply if place.location in _ONLINE]
        if not applied:
            continue
        rotation = _rotation_of(name, group, applied)
        for place in applied:
            for linear in linears:
                if _matches(linear, place.targets) and not _matches(linear, place.ignore):
                    if linear in online:
                        raise FormatError(f"the transform_config turns the input of {linear} twice, which no plan can say")
                    online[linear] = rotation
    return online


def _rotation_of(name: str, group: TransformScheme, applied: list[TransformArgs]) -> Rotation:
    space = _SPACES.get(name.partition("_")[0])
    places = sorted({str(place.location) for place in applied} - {TransformLocation.INPUT.value})
    trouble = None
    if places:
        trouble = f"turns {some(places)} while the model runs"
    elif group.type != "hadamard" or group.randomize:
        trouble = f"is of the type {group.type}{', randomized' if group.randomize else ''}"
    elif space not in get_args(Rotation.model_fields["space"].annotation):
        trouble = "has a name that is no rotation's (R1, R2, R4)"
    if trouble is not None:
        raise FormatError(
            f"the group {name!r} of the transform_config {trouble}, which this program does not run: the model would be "
            "another. Load the folder with its own reader"
        )
    # A Hadamard matrix of an order that is a power of two is its own inverse: `inverse` changes nothing.
    rotation = Rotation.model_validate({"space": space, "block": group.head_dim or 0, "kind": "hadamard"})
    if (reason := reason_against(rotation)) is not None:
        raise FormatError(f"the group {name!r} of the transform_config cannot be run: {reason}")
    return rotation


def _matches(name: str, targets: list[str]) -> bool:
    return any(match_name(name, target) for target in targets)
