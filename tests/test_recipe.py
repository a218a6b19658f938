"""Recipes: names in any spelling, layers in order, and refusals that say what would work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitlathe.errors import BitlatheError, RecipeError
from bitlathe.formats import ALIASES, FORMATS
from bitlathe.numerics.rotation import Rotation
from bitlathe.recipe import Memory, Recipe, merge, parse_overrides, parse_sets, read_yaml
from bitlathe.registry import canonical, did_you_mean, resolve
from bitlathe.tune import TUNERS

MINIMAL = {"model": "builtin", "out": "out"}


def test_defaults_are_the_documented_ones() -> None:
    recipe = merge(MINIMAL)
    assert recipe.model_dump() == {
        "model": "builtin",
        "out": Path("out"),
        "scheme": "W4A16",
        "overrides": {},
        "linears": {},
        "bits": None,
        "schemes": (),
        "include": (),
        "groups": (),
        "rotate": (),
        "rotation_block": None,
        "rotation_seed": 0,
        "rotation_trials": 1,
        "smooth": True,
        "act_asymmetric": False,
        "act_clip": 1.0,
        "kv": None,
        "formats": ("native",),
        "tuner": "closed-form",
        "effort": "normal",
        "iters": 200,
        "batch_size": 8,
        "calib": "NeelNanda/pile-10k",
        "samples": 128,
        "seqlen": 2048,
        "device": "auto",
        "dtype": "auto",
        "seed": 0,
        "memory": {"activations": 4 * 2**30},
        "scores": None,
        "search": {"tokens": 32768, "held_out": 8192},
        "rtn": {"scale": "searched"},
        "signround": {"start": "plain", "lr": None, "compile": False, "held_out": 8, "check_every": 20, "patience": 3},
        "closed_form": {"passes": 2, "refits": 2, "held_out": 8, "gradients": 16, "slices": 16, "end_to_end": 64},
    }


def test_steps_ask_for_the_tuner_that_takes_them() -> None:
    assert merge(MINIMAL, {"iters": 50}).tuner == "signround"
    assert merge(MINIMAL).tuner == "closed-form"
    assert merge(MINIMAL, {"signround": {"start": "searched"}}).tuner == "signround"
    assert merge(MINIMAL, {"iters": 50}, {"tuner": "signround"}).iters == 50
    with pytest.raises(RecipeError, match="iters is for the tuner signround, and the tuner is closed-form"):
        merge(MINIMAL, {"iters": 50, "tuner": "closed-form"})
    with pytest.raises(RecipeError, match="effort is for the tuner closed-form, and the tuner is signround"):
        merge(MINIMAL, {"effort": "fast", "iters": 50})
    with pytest.raises(RecipeError, match="effort"):
        merge(MINIMAL, {"effort": "some"})


def test_a_recipe_survives_its_own_dump() -> None:
    recipe = merge(
        MINIMAL,
        {"formats": "native,fake", "overrides": {"*": "w8a16"}, "memory": {"activations": "1GiB"}, "kv": 4},
        {"rotate": "R4:random,R1", "rotation_block": 32, "rotation_seed": 7, "rotation_trials": 4, "act_asymmetric": True},
    )
    assert Recipe(**recipe.model_dump()) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    searched = merge(
        MINIMAL, {"bits": 4.5, "schemes": "int4,W8A8,BF16", "include": "lm_head", "groups": [["*q_proj", "*o_proj"]]}
    )
    assert searched.schemes == ("W4A4", "W8A8", "keep")
    assert Recipe(**searched.model_dump()) == searched


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 4.5, "scheme": "W4A16"}, "leave one of the two out"),
        ({"bits": 4.5, "linears": {"a": "W4A16"}}, "leave one of the two out"),
        ({"linears": {"a": "W4A16"}, "overrides": {"*": "keep"}}, "leave one of the two out"),
        ({"schemes": "W4A16"}, "schemes is for a search, and none is asked for"),
        ({"include": "lm_head"}, "include is for a search"),
        ({"groups": [["*"]]}, "groups is for a search"),
        ({"bits": 4.5, "schemes": "W4A16,W4A16"}, "named twice"),
        ({"bits": 4.5, "schemes": "W9A16"}, "unknown scheme 'W9A16'"),
        ({"bits": 0}, "greater than 0"),
        ({"bits": 17}, "less than or equal to 16"),
        ({"bits": 4.5, "search": {"tokens": 0}}, "greater than 0"),
        ({"bits": 4.5, "search": {"windows": 4}}, "search.held_out"),
    ],
)
def test_one_way_to_say_what_a_linear_gets(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as found:
        merge(MINIMAL, fields)
    assert words.lower() in str(found.value).lower()


@pytest.mark.parametrize(
    ("field", "typed", "meant"),
    [
        ("scheme", "w4a16-g128", "W4A16"),
        ("scheme", "w4_a16_channel", "W4A16_CHANNEL"),
        ("scheme", "w4a4", "W4A4"),
        ("scheme", "int8", "W8A8"),
        ("scheme", "fp8-dynamic", "FP8_DYNAMIC"),
        ("rotate", "r4,R1 , r2", ("R1", "R2", "R4")),
        ("rotate", ["R1:Hadamard", "r4:RANDOM"], ("R1:hadamard", "R4:random")),
        ("rotate", "R1:random,R3:hadamard", ("R1", "R3")),
        ("rotate", "Hadamard", ("R1", "R2")),
        ("rotate", "hadamard,R4", ("R1", "R2", "R4")),
        ("rotate", "None", ()),
        ("rotate", [], ()),
        ("act_asymmetric", "true", True),
        ("act_clip", "0.9", 0.9),
        ("kv", "kv4", "KV4"),
        ("kv", "8", "KV8"),
        ("kv", 4, "KV4"),
        ("kv", "None", None),
        ("kv", None, None),
        ("overrides", {"*.q_proj": "Keep", "*": "nvfp4a16"}, {"*.q_proj": "keep", "*": "NVFP4A16"}),
        ("formats", "Native,compressed_tensors", ("native", "compressed-tensors")),
        ("formats", ["fake"], ("dense",)),
        ("tuner", "SignRound", "signround"),
        ("device", "CUDA:1", "cuda:1"),
        ("dtype", "bfloat16", "bf16"),
        ("model", Path("some/folder"), "some/folder"),
        ("samples", "16", 16),
        ("memory", {"activations": "512MiB"}, Memory(activations=512 * 2**20)),
        ("memory", {"activations": 1024}, Memory(activations=1024)),
    ],
)
def test_spellings(field: str, typed: object, meant: object) -> None:
    assert dict(merge(MINIMAL, {field: typed}))[field] == meant


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scheme": "W9A16"}, ["'scheme'", "W9A16", "W4A16G32"]),
        ({"overrides": {"*.q_proj": "W9"}}, ["'overrides'", "W9", "W8A16"]),
        ({"formats": "gptqq"}, ["'formats'", "gptqq", "native, compressed-tensors, gptq"]),
        ({"formats": "dense,fake"}, ["'formats'", "twice"]),
        ({"formats": []}, ["'formats'"]),
        ({"tuner": "singround"}, ["'tuner'", "singround", "rtn, signround", "Did you mean 'signround'?"]),
        ({"device": "gpu"}, ["'device'", "gpu", "cuda"]),
        ({"dtype": "fp8"}, ["'dtype'", "fp8", "bf16"]),
        ({"rotate": "R5"}, ["'rotate'", "'R5'", "R1 turns the residual", "R2 turns", "R3 turns", "R4 turns", "hadamard"]),
        ({"rotate": "R1,r1:hadamard"}, ["'rotate'", "R1 is named twice"]),
        ({"rotate": "hadamard,R2"}, ["'rotate'", "R2 is named twice"]),
        ({"rotate": "R4:sylvester"}, ["'rotate'", "R4:sylvester", "R4:hadamard, R4:random"]),
        ({"rotate": "R4:"}, ["'rotate'", "R4:hadamard, R4:random"]),
        ({"rotate": "none,R1"}, ["'rotate'", "'none'"]),
        ({"rotate": ""}, ["'rotate'", "with commas"]),
        ({"rotate": 1}, ["'rotate'", "with commas"]),
        ({"rotation_block": 32}, ["'rotation_block'", "nothing is rotated", "R1,R2"]),
        ({"rotation_seed": 1}, ["'rotation_seed'", "nothing is rotated"]),
        ({"rotation_trials": 2}, ["'rotation_trials'", "nothing is rotated"]),
        ({"rotate": "R4", "rotation_trials": 2}, ["'rotation_trials'", "signs", "R4:random"]),
        ({"rotate": "R1:hadamard,R4", "rotation_seed": 2}, ["'rotation_seed'", "signs", "R4:random"]),
        ({"rotate": "R1", "rotation_block": 1}, ["'rotation_block'", "turn nothing", "32"]),
        ({"rotate": "R1", "rotation_block": 0}, ["'rotation_block'", "greater than 0"]),
        ({"rotate": "R1", "rotation_trials": 0}, ["'rotation_trials'", "greater than 0"]),
        ({"act_clip": 0}, ["'act_clip'", "greater than 0"]),
        ({"act_clip": 1.5}, ["'act_clip'", "less than or equal to 1"]),
        ({"act_clip": float("nan")}, ["'act_clip'"]),
        ({"kv": "KV2"}, ["'kv'", "cache scheme 'kv2'", "KV8, KV4"]),
        ({"kv": 16}, ["'kv'", "KV8, KV4"]),
        ({"kv": ["KV4"]}, ["'kv'", "string"]),
        ({"iters": 0}, ["'iters'", "greater than 0"]),
        ({"seqlen": "long"}, ["'seqlen'", "integer", "long"]),
        ({"seed": -1}, ["'seed'"]),
        ({"sedd": 1}, ["'sedd'", "Did you mean 'seed'?", "batch_size"]),
        ({"memory": {"activation": 1}}, ["'memory.activation'", "Did you mean 'memory.activations'?"]),
        ({"memory": {"activations": "4 quarts"}}, ["'memory.activations'", "4 quarts"]),
        ({"rtn": {"scale": "absmax"}}, ["'rtn.scale'", "searched", "min-max"]),
        ({"rtn": "min-max"}, ["'rtn'", "rtn.scale"]),
        ({"memory": "4GiB"}, ["'memory'", "memory.activations"]),
        ({"signround": {"lr": -1}}, ["'signround.lr'", "-1"]),
    ],
)
def test_refusals_name_the_field_and_what_would_work(fields: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        merge(MINIMAL, fields)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_finding_in_rotate_is_one_finding() -> None:
    with pytest.raises(RecipeError) as caught:
        merge(MINIMAL, {"rotate": "R9", "rotation_block": 32, "rotation_trials": 4})
    assert len(str(caught.value).splitlines()) == 1


def test_rotations_are_values_with_the_usual_kinds() -> None:
    plain = merge(MINIMAL, {"rotate": "R3,R4,R1,R2"}).rotations()
    assert plain == (
        Rotation(space="residual", block=0, kind="random", seed=0),
        Rotation(space="value", block=0, kind="random", seed=0),
        Rotation(space="qk", block=0, kind="hadamard", seed=0),
        Rotation(space="mid", block=0, kind="hadamard", seed=0),
    )
    chosen = merge(MINIMAL, {"rotate": "R4:random,R1:hadamard", "rotation_block": 32, "rotation_seed": 5, "rotation_trials": 2})
    assert chosen.rotations() == (
        Rotation(space="residual", block=32, kind="hadamard", seed=0),
        Rotation(space="mid", block=32, kind="random", seed=5),
    )
    assert merge(MINIMAL).rotations() == ()


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Recipe(model="builtin", out=Path("~/q")).out == tmp_path / "q"
    with pytest.raises(RecipeError, match=r"'out'.*write the path in full.*~nobody-of-that-name"):
        Recipe(model="builtin", out=Path("~nobody-of-that-name/q"))


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RecipeError, match="'out' is missing"):
        merge({"model": "builtin"})


def test_every_finding_is_reported() -> None:
    with pytest.raises(RecipeError) as caught:
        merge(MINIMAL, {"iters": 0, "tuner": "no"})
    assert len(str(caught.value).splitlines()) == 2


def test_calling_the_type_raises_our_error_too() -> None:
    with pytest.raises(BitlatheError):
        Recipe(model="builtin", out=Path("out"), scheme="no")


def test_later_layers_win_field_by_field() -> None:
    file = {"scheme": "W3A16", "seqlen": 512, "signround": {"lr": 0.01, "held_out": 2}}
    recipe = merge(MINIMAL, file, {"seqlen": 256}, {"signround": {"held_out": "4"}})
    assert (recipe.scheme, recipe.seqlen, recipe.signround.lr, recipe.signround.held_out) == ("W3A16", 256, 0.01, 4)


def test_an_override_given_again_becomes_the_last() -> None:
    recipe = merge(MINIMAL, {"overrides": {"a": "W2A16", "b": "W3A16"}}, {"overrides": {"a": "W8A16"}})
    assert list(recipe.overrides.items()) == [("b", "W3A16"), ("a", "W8A16")]


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: builtin\nout: here\nscheme: w2a16g32\nsignround:\n  lr: 5e-3\nformats: [native, dense]\n")
    recipe = Recipe.from_yaml(file)
    assert (recipe.scheme, recipe.signround.lr, recipe.formats) == ("W2A16G32", 0.005, ("native", "dense"))


@pytest.mark.parametrize("content", ["", "- a list", "a: [unclosed", "just words"])
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        read_yaml(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_sets() -> None:
    assert parse_sets(["seqlen=512", "memory.activations=4GiB", "overrides.*.0.*=keep", "calib=a=b"]) == {
        "seqlen": "512",
        "memory": {"activations": "4GiB"},
        "overrides": {"*.0.*": "keep"},
        "calib": "a=b",
    }


@pytest.mark.parametrize("wrong", [["seqlen"], ["=3"], ["memory.=3"], ["memory=3", "memory.activations=3"]])
def test_sets_that_are_none(wrong: list[str]) -> None:
    with pytest.raises(RecipeError, match="--set"):
        parse_sets(wrong)


def test_overrides() -> None:
    assert list(parse_overrides(["a=W2A16", "b=keep", "a=W3A16"]).items()) == [("b", "keep"), ("a", "W3A16")]
    for wrong in ("a", "=W4A16", "a="):
        with pytest.raises(RecipeError, match="--override"):
            parse_overrides([wrong])


def test_the_settings_are_what_changes_the_result_and_nothing_else() -> None:
    def settings(fields: dict[str, object]) -> str:
        return json.dumps(merge(MINIMAL, fields).settings())

    same = (
        {"out": "elsewhere"},
        {"memory": {"activations": "1GiB"}},
        {"scheme": "w4-a16"},
        {"rotate": "none", "rotation_seed": 0, "rotation_trials": 1, "rotation_block": None, "kv": "none", "act_clip": 1},
        # A run knows these three by their content.
        {"model": "/elsewhere"},
        {"calib": "same.txt"},
        {"device": "cuda:1"},
    )
    assert {settings(fields) for fields in same} == {settings({})}
    other = (
        {"seed": 1},
        {"formats": "dense"},
        {"rotate": "R1"},
        {"rotate": "R1:hadamard"},
        {"rotate": "R1", "rotation_block": 32},
        {"rotate": "R1", "rotation_seed": 1},
        {"rotate": "R1", "rotation_trials": 2},
        {"act_asymmetric": True},
        {"act_clip": 0.9},
        {"kv": 8},
        {"signround": {"lr": 1}},
        {"rtn": {"scale": "min-max"}},
        {"overrides": {"a": "keep", "b": "W8A16"}},
        {"overrides": {"b": "W8A16", "a": "keep"}},
    )
    assert len({settings(fields) for fields in other} | {settings({})}) == len(other) + 1
    assert merge(MINIMAL).settings()["signround.held_out"] == 8


def test_registries_resolve_by_name() -> None:
    table = {"path-type": "pathlib:Path"}
    assert resolve("Path_Type", table, "thing") is Path
    with pytest.raises(RecipeError, match=r"unknown thing 'pathtipe'\. Known: path-type\. Did you mean 'path-type'"):
        resolve("pathtipe", table, "thing")
    assert canonical("FAKE", FORMATS, "format", ALIASES) == "dense"
    assert did_you_mean("zzz", TUNERS) == ""


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_whole(path: Path) -> None:
    recipe = merge({"model": "m", "out": "q"}, read_yaml(path))
    assert path.stem == f"{recipe.scheme.lower()}-{recipe.tuner}"
