"""The model card: what it says of rotations, activations and the cache, and whom it warns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bitlathe.numerics.rotation import Rotation
from bitlathe.numerics.scheme import KV_SCHEMES, preset_named
from bitlathe.plan import ROTATION_NAMES, LayerPlan, Plan
from bitlathe.recipe import Recipe
from bitlathe.report import card

R1 = Rotation(space="residual", block=64, kind="random", seed=77)
R3 = Rotation(space="qk", block=16, kind="hadamard")
R4 = Rotation(space="mid", block=128, kind="hadamard")
WARNING = "> [!WARNING]"


def written(format: str, plan: Plan, *, online: tuple[str, ...] = ("R3", "R4"), method: str | None = None) -> str:
    """The card of a result of this plan, of whose rotations these run online. method: the quant_method of its config.json."""
    rotations = [{"name": ROTATION_NAMES[rotation.space], **rotation.model_dump()} for rotation in plan.rotations]
    return card(
        {
            "version": "0",
            "format": format,
            "quant_method": method,
            "hub_model": None,
            "recipe": Recipe(model="some/model", out=Path("out"), scheme="W4A4").model_dump(mode="json"),
            "plan": plan.model_dump(mode="json"),
            "rotations": [row | {"online": row["name"] in online} for row in rotations],
            "kept": {},
            "notes": [],
            "calibration": None,
            "linears": 2,
            "quantized": 1,
            "sizes": {"bits_quantized": 4.0, "bits_checkpoint": 5.0, "bytes": 1024},
            "evaluation": None,
        }
    )


def planned(scheme: str, *, online: Rotation | None = None, clip: float = 1.0, **plan: Any) -> Plan:
    """Two linears of a scheme and one that is kept."""
    preset = preset_named(scheme)
    row = LayerPlan(weight=preset.weight, input=preset.input, clip=clip, online=online)
    return Plan(linears={"a": row, "b": row, "head": LayerPlan()}, **plan)


def rows(text: str) -> dict[str, str]:
    """The card's first table."""
    table = text.split("|---|---|\n")[1].split("\n\n")[0]
    return {name.strip(): value.strip() for name, value in (line.strip("|").split("|") for line in table.splitlines())}


def front(text: str) -> dict[str, Any]:
    """The yaml at the beginning."""
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_weights_alone_need_nothing_but_transformers() -> None:
    text = written("compressed-tensors", planned("W4A16"))
    assert WARNING not in text
    assert "bitlathe.hf" not in text
    assert front(text) == {"library_name": "transformers", "tags": ["quantized", "bitlathe"]}
    found = rows(text)
    assert (found["activations"], found["rotations"], found["cached keys and values"]) == ("16 bits", "none", "16 bits")
    assert "output head" not in found


def test_a_folded_rotation_is_told_and_needs_nothing() -> None:
    text = written("compressed-tensors", planned("W4A4", rotations=(R1,), untied=True))
    assert WARNING not in text
    assert "bitlathe.hf" not in text
    found = rows(text)
    assert found["rotations"] == "R1 (folded, random with seed 77, blocks of 64)"
    assert found["activations"] == "INT4 per token"
    assert "of its own" in found["output head"]


def test_an_online_rotation_that_transformers_ignores_is_a_warning() -> None:
    text = written("compressed-tensors", planned("W4A4", online=R4, rotations=(R1, R4)))
    block = [line for line in text.splitlines() if line.startswith(">")]
    assert block[0] == WARNING
    assert "(R4)" in block[1] and "transformers alone ignores that, without an error" in block[1]
    assert "`bitlathe.load(folder)`" in block[-1] and "`import bitlathe.hf` before `AutoModelForCausalLM`" in block[-1]
    assert text.index("import bitlathe.hf  #") < text.index("from transformers import")
    assert front(text)["library_name"] == "bitlathe"
    assert rows(text)["rotations"].endswith(", R4 (online, hadamard, blocks of 128)")


def test_a_rotation_of_the_residual_stream_can_be_online() -> None:
    text = written("compressed-tensors", planned("W4A4", online=R1, rotations=(R1,)), online=("R1",))
    assert "(R1)" in text.split(WARNING)[1].splitlines()[1]
    assert rows(text)["rotations"].startswith("R1 (online")


def test_native_cannot_be_run_wrong_so_it_does_not_warn() -> None:
    text = written("native", planned("W4A4", online=R4, rotations=(R4, R3), kv=KV_SCHEMES["KV4"]))
    assert WARNING not in text
    assert "import bitlathe.hf" in text
    found = rows(text)
    assert found["rotations"] == "R4 (online, hadamard, blocks of 128), R3 (online, hadamard, blocks of 16)"
    assert found["cached keys and values"] == "INT4 asymmetric, one scale a token and head"


def test_a_dense_folder_that_only_ours_read_is_no_warning() -> None:
    text = written("dense", planned("W4A4", online=R4, rotations=(R4,)), method="bitlathe")
    assert WARNING not in text
    assert text.index("import bitlathe.hf  # teaches") < text.index("from transformers import")
    assert front(text)["library_name"] == "bitlathe"
    assert "import bitlathe.hf" not in written("dense", planned("W4A16", rotations=(R1,)))


def test_activations_in_words() -> None:
    for scheme, words in {
        "W8A8_STATIC": "INT8 per tensor, static",
        "MXFP4": "E2M1 in groups of 32",
        "FP8_DYNAMIC": "E4M3 per token",
    }.items():
        assert rows(written("native", planned(scheme)))["activations"] == words
    clipped = planned("W4A4", clip=0.9)
    first = clipped.linears["a"]
    assert first.input is not None
    asymmetric = first.model_copy(update={"input": first.input.model_copy(update={"asymmetric": True})})
    both = clipped.model_copy(update={"linears": clipped.linears | {"a": asymmetric}})
    assert rows(written("native", both))["activations"] == (
        "INT4 asymmetric per token, clipped to 0.9 of its range; INT4 per token, clipped to 0.9 of its range"
    )
