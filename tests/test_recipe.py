"""Recipes: names in any spelling, layers in order, and refusals that say what would work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitlathe.errors import BitlatheError, RecipeError
from bitlathe.formats import ALIASES, FORMATS
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
        "formats": ("native",),
        "tuner": "signround",
        "iters": 200,
        "batch_size": 8,
        "calib": "NeelNanda/pile-10k",
        "samples": 128,
        "seqlen": 2048,
        "device": "auto",
        "dtype": "auto",
        "seed": 0,
        "memory": {"activations": 4 * 2**30},
        "rtn": {"scale": "searched"},
        "signround": {"lr": None, "compile": False, "held_out": 8, "check_every": 20},
    }


def test_a_recipe_survives_its_own_dump() -> None:
    recipe = merge(MINIMAL, {"formats": "native,fake", "overrides": {"*": "w8a16"}, "memory": {"activations": "1GiB"}})
    assert Recipe(**recipe.model_dump()) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("field", "typed", "meant"),
    [
        ("scheme", "w4a16-g128", "W4A16"),
        ("scheme", "w4_a16_channel", "W4A16_CHANNEL"),
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
        ({"formats": "gptqq"}, ["'formats'", "gptqq", "native, compressed-tensors, dense"]),
        ({"formats": "dense,fake"}, ["'formats'", "twice"]),
        ({"formats": []}, ["'formats'"]),
        ({"tuner": "singround"}, ["'tuner'", "singround", "rtn, signround", "Did you mean 'signround'?"]),
        ({"device": "gpu"}, ["'device'", "gpu", "cuda"]),
        ({"dtype": "fp8"}, ["'dtype'", "fp8", "bf16"]),
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
        # A run knows these three by their content.
        {"model": "/elsewhere"},
        {"calib": "same.txt"},
        {"device": "cuda:1"},
    )
    assert {settings(fields) for fields in same} == {settings({})}
    other = (
        {"seed": 1},
        {"formats": "dense"},
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
