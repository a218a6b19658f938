"""The plan: which block a rotation gets in a space, what is folded and what runs online, and what is refused."""

from __future__ import annotations

from typing import Literal

import pytest

from bitlathe.arch import ARCHS, Arch
from bitlathe.errors import PlanError
from bitlathe.numerics.rotation import Rotation, cost
from bitlathe.numerics.scheme import preset_named
from bitlathe.plan import ROTATION_NAMES, LayerPlan, Plan, rotated
from bitlathe.turns import ROTATIONS

Space = Literal["residual", "value", "qk", "mid"]
W4A4 = LayerPlan(**dict(preset_named("W4A4")))


def turned(*wanted: Rotation, arch: Arch = ARCHS["llama"], kept: tuple[str, ...] = (), **widths: int) -> Plan:
    """One block of a family, all of it W4A4 but for what is kept, rotated."""
    rows = {row.name: row for row in arch.linears}
    plan = Plan(linears={name: LayerPlan() if name.endswith(kept) else W4A4 for name in rows})
    sizes = {"residual": 64, "value": 16, "qk": 16, "mid": 128} | widths
    return rotated(plan, wanted, arch, rows, widths={space: (width,) for space, width in sizes.items()}, tied=False)


def block(space: Space, width: int, asked: int = 0) -> int:
    rotation, *_ = turned(Rotation(space=space, block=asked), **{space: width}).rotations
    return rotation.block


def test_rotations_have_the_names_that_users_type() -> None:
    assert {name: turn.space for name, turn in ROTATIONS.items()} == {name: space for space, name in ROTATION_NAMES.items()}


@pytest.mark.parametrize(
    ("space", "width", "asked", "expected"),
    [
        ("residual", 1536, 0, 1536),
        ("residual", 1536, 32, 32),
        ("value", 64, 128, 64),
        ("value", 128, 32, 32),
        ("mid", 8960, 0, 256),
        ("mid", 11008, 0, 256),
        # The largest power of two is 4 or 8, and the whole width has a matrix of its own.
        ("mid", 108, 0, 108),
        ("mid", 232, 0, 232),
        ("mid", 108, 4, 4),
        ("mid", 8, 0, 8),
    ],
)
def test_the_block_of_a_rotation(space: Space, width: int, asked: int, expected: int) -> None:
    assert block(space, width, asked) == expected


@pytest.mark.parametrize(
    ("space", "width", "asked", "words"),
    [
        ("mid", 99, 0, ["order 99", "leave this rotation out of --rotate"]),
        ("mid", 270, 0, ["order 270", "--rotation-block 2 is the largest", "leave R4 out of --rotate"]),
        ("value", 40, 32, ["blocks of 32", "40", "--rotation-block 40", "of every rotation", "leave R2 out of --rotate"]),
        ("residual", 64, 48, ["blocks of 48", "--rotation-block 64", "leave R1 out"]),
        ("residual", 99, 0, ["order 99", "leave this rotation out"]),
    ],
)
def test_a_size_that_no_matrix_fits_is_refused_with_a_way_out(space: Space, width: int, asked: int, words: list[str]) -> None:
    with pytest.raises(PlanError) as found:
        block(space, width, asked)
    assert all(word in str(found.value) for word in words), str(found.value)


STREAM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.mark.parametrize(
    ("family", "space", "kept", "words"),
    [
        ("llama", "mid", ("down_proj",), ["R4", "'mid'", "mlp.down_proj", "Leave R4 out of --rotate"]),
        ("gemma2", "residual", STREAM, ["R1", "'residual'", "self_attn.q_proj", "Leave R1 out of --rotate"]),
        ("olmo2", "residual", STREAM, ["R1", "'residual'", "self_attn.q_proj", "Leave R1 out of --rotate"]),
    ],
)
def test_a_rotation_that_no_linear_would_run_is_refused(
    family: str, space: Space, kept: tuple[str, ...], words: list[str]
) -> None:
    wanted = Rotation(space=space)
    with pytest.raises(PlanError) as found:
        turned(wanted, arch=ARCHS[family], kept=kept)
    assert all(word in str(found.value) for word in words), str(found.value)
    # One reader is enough, and a rotation that folds needs none.
    assert [name for name, row in turned(wanted, arch=ARCHS[family], kept=kept[1:]).linears.items() if row.online]
    folded = turned(Rotation(space="value"), arch=ARCHS[family], kept=("o_proj",))
    assert [rotation.space for rotation in folded.rotations] == ["value"] and not any(r.online for r in folded.linears.values())


def test_a_settled_block_is_one_that_can_be_run() -> None:
    for width in (8, 24, 108, 232, 264, 8960, 13824, 18944):
        rotation, *_ = turned(Rotation(space="mid"), mid=width).rotations
        assert rotation.block >= min(width, 16)
        assert cost(width, rotation)[0] > 0
