"""Tasks of lm-eval on a quantized model: the numbers are lm-eval's own, and both models, names and records are told apart."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel
from typer.testing import CliRunner

import bitlathe
from bitlathe import cli
from bitlathe.errors import BitlatheError, CalibrationError, CheckpointError, RecipeError
from bitlathe.evaluation.harness import Beginning, Harness, beginning_of
from bitlathe.evaluation.tasks import Asked, asked_for, measure_tasks
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.calib import tokenizer_of
from bitlathe.report import record_evaluation

QUESTIONS, TEXTS = 24, 5
WORDS = files("bitlathe").joinpath("data", "eval.txt").read_text(encoding="utf-8").split()


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], **fields: Any) -> None:
    """A task file, with its documents beside the folder."""
    folder.mkdir(exist_ok=True)
    data = folder.parent / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"data_files": {"test": str(data)}, "cache_dir": str(folder.parent / "cache")}
    said = {"task": name, "dataset_path": "json", "dataset_kwargs": where, "test_split": "test", "metadata": {"version": 1.5}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(said | fields))


def metric(name: str, aggregation: str = "mean", *, better: bool = True) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": better}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files in "tasks", and the bundled model in "q", in two formats."""
    root = tmp_path_factory.mktemp("tasks")
    spans = [WORDS[start : start + 30] for start in range(0, 30 * QUESTIONS, 30)]
    choices = [
        {
            "question": " ".join(span[:24]),
            "choices": [" ".join(span[24:]), " ".join(span[:23:-1]), " ".join(span[4:10])],
            "answer": 0,
        }
        for span in spans
    ]
    write_task(
        root / "tasks", "tiny_choice", choices,
        output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target="answer",
        metric_list=[metric("acc"), metric("acc_norm")],
    )  # fmt: skip
    texts = [{"text": " ".join(WORDS[start : start + 90])} for start in range(1000, 1000 + 90 * TEXTS, 90)]
    write_task(
        root / "tasks", "tiny_text", texts,
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[
            metric("word_perplexity", "weighted_perplexity", better=False),
            metric("bits_per_byte", "bits_per_byte", better=False),
        ],
    )  # fmt: skip
    out = ("--scheme", "W3A16", "--tuner", "rtn", "--out", str(root / "q"), "--format", "native,compressed-tensors")
    options = ("--calib", "builtin", "--samples", "8", "--seqlen", "128", "--device", "cpu", "--num-fewshot", "1")
    done = CliRunner().invoke(cli.app, ["quantize", "builtin", *out, *options, "--tasks", str(root / "tasks")])
    assert done.exit_code == 0, done.output
    (root / "shown.txt").write_text(done.stdout)
    return root


@pytest.fixture
def result(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "q" / "native", tmp_path / "native"))


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


def harness(model: Any, *, everywhere: bool = False) -> Harness:
    tokenizer = tokenizer_of(Checkpoint("builtin").path)
    return Harness(model, tokenizer, beginning=Beginning(0, everywhere), folder=Path("q"))


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]  # type: ignore[arg-type]


PAIRS = [
    ("The king of", " England"),
    ("The king of", " of"),
    ("", "Once upon a time"),
    ("A much longer beginning, of which some is context ", "and some is not"),
    ("The king of", " the"),
]


# The adaptor


@pytest.fixture(scope="module")
def model(made: Path) -> PreTrainedModel:
    """The quantized model in float32, so that how many run at a time does not show."""
    return bitlathe.load(made / "q" / "native", "cpu").float()


def reference(model: PreTrainedModel) -> HFLM:
    """lm-eval's own adaptor, for the same model."""
    tokenizer = tokenizer_of(Checkpoint("builtin").path)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, softmax_dtype="float32")  # type: ignore[arg-type]


def test_likelihoods_are_those_of_lm_eval(model: PreTrainedModel) -> None:
    asked = requests("loglikelihood", *PAIRS)
    ours, theirs = harness(model).loglikelihood(asked), reference(model).loglikelihood(asked)
    assert [found for found, _ in ours] == pytest.approx([found for found, _ in theirs], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_what_the_model_would_say_is_greedy(model: PreTrainedModel) -> None:
    (said,) = harness(model).generate_until(requests("generate_until", ("The king of", {"until": [], "max_gen_toks": 2})))
    (_, greedy), (_, other) = harness(model).loglikelihood(requests("loglikelihood", ("The king of", said), PAIRS[0]))
    assert greedy and not other


def test_texts_longer_than_the_window_are_those_of_lm_eval(model: PreTrainedModel) -> None:
    texts = requests("loglikelihood_rolling", (" ".join(WORDS[:150]),), (WORDS[7],), (" ".join(WORDS[300:340]),))
    ours, theirs = harness(model), reference(model)
    ours.max_length = theirs._max_length = 48
    found = ours.loglikelihood_rolling(texts)
    assert found == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
    assert len(ours.tok_encode(texts[0].args[0])) > 3 * 48


def test_texts_are_continued_as_by_lm_eval(model: PreTrainedModel) -> None:
    kinds = [{"until": [".", "\n"], "max_gen_toks": 12}, {"until": " the", "do_sample": False, "max_gen_toks": 8}]
    contexts = ["The king of England was", "It", "In the middle of the night there came a"]
    asked = requests("generate_until", *[(context, kind) for context in contexts for kind in kinds])
    ours = harness(model).generate_until(asked)
    assert ours == reference(model).generate_until(asked)
    assert any(ours) and all("." not in text for text in ours[::2]) and all(" the" not in text for text in ours[1::2])


def test_samples_are_the_same_every_time(model: PreTrainedModel) -> None:
    kind = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    first, second = (harness(model).generate_until(requests("generate_until", ("The king", kind))) for _ in range(2))
    assert first == second != [""]


class Tight:
    """A model on a device that holds so many sequences. ran: how many each step had."""

    def __init__(self, model: PreTrainedModel, holds: int) -> None:
        self.model, self.holds, self.ran = model, holds, []
        self.config, self.dtype, self.device = model.config, model.dtype, model.device

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if len(input_ids) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.ran.append(len(input_ids))
        return self.model(input_ids=input_ids, **kwargs)


def test_a_step_that_does_not_fit_is_halved_until_it_does(model: PreTrainedModel) -> None:
    asked = requests("loglikelihood", *[(" ".join(WORDS[at : at + 9]), " the") for at in range(0, 90, 9)])
    expected = [found for found, _ in harness(model).loglikelihood(asked)]
    tight = Tight(model, holds=3)
    assert [found for found, _ in harness(tight).loglikelihood(asked)] == pytest.approx(expected, rel=1e-5)
    assert sum(tight.ran) == len(asked) and 1 < max(tight.ran) <= 3
    with pytest.raises(RecipeError, match=r"q runs out of memory on one sequence of \d+ tokens.*more memory"):
        harness(Tight(model, holds=0)).loglikelihood(asked)


def test_choices_that_differ_in_their_last_token_run_once(model: PreTrainedModel) -> None:
    tight = Tight(model, holds=8)
    harness(tight).loglikelihood(requests("loglikelihood", *[("The king of", word) for word in (" the", " of", " a")]))
    assert tight.ran == [1]


def test_the_token_that_begins_a_text_comes_once(model: PreTrainedModel) -> None:
    plain, begun = harness(model), harness(model, everywhere=True)
    tokens = plain.tok_encode("Once")
    assert begun.tok_encode("Once") == begun.tok_encode("<s>Once") == [0, *tokens]
    assert begun.tok_encode("Once", add_special_tokens=False) == tokens
    text = requests("loglikelihood_rolling", ("Once upon a time",))
    assert begun.loglikelihood_rolling(text) == plain.loglikelihood_rolling(text)
    pair = requests("loglikelihood", PAIRS[0])
    assert begun.loglikelihood(pair) != plain.loglikelihood(pair)


def test_what_begins_a_text_is_what_the_tokenizer_does() -> None:
    folder = Checkpoint("builtin").path
    tokenizer = tokenizer_of(folder)
    assert beginning_of(tokenizer, folder) == Beginning(0, everywhere=False)
    begins = tokenizer("Once")["input_ids"][0]
    tokenizer.bos_token = None
    assert beginning_of(tokenizer, folder) == Beginning(1, everywhere=False)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"][0])
    assert beginning_of(tokenizer, folder).everywhere and begins
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(CalibrationError, match=r"neither a begin-of-text nor.*tokenizer_config"):
        beginning_of(tokenizer, folder)


def test_damaged_weights_and_impossible_requests_are_refused(made: Path, model: PreTrainedModel) -> None:
    short = harness(model)
    short.max_length = 4
    with pytest.raises(CalibrationError, match="window ends at 4"):
        short.loglikelihood(requests("loglikelihood", ("A", " ".join(WORDS[:20]))))
    with pytest.raises(CalibrationError, match="9 new tokens"):
        short.generate_until(requests("generate_until", ("A", {"until": [], "max_gen_toks": 9})))
    broken = bitlathe.load(made / "q" / "native", "cpu")
    broken.model.norm.weight[0] = torch.nan
    with pytest.raises(CheckpointError, match="q makes NaN predictions"):
        harness(broken).loglikelihood(requests("loglikelihood", *PAIRS))


# Names


def test_names_are_checked_before_any_work_starts(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("quantize", "evaluate"):
        monkeypatch.setitem(vars(bitlathe), name, lambda *args, **kwargs: ran.append("ran"))
    for command in (("quantize", "builtin", "--out", "o"), ("eval", "builtin")):
        done = CliRunner().invoke(cli.app, [*command, "--tasks", f"{made / 'tasks'},arc_esay"])
        assert (done.exit_code, ran) == (2, []), done.output
        assert "--tasks 'arc_esay' is no task of lm-eval" in done.stderr and "Did you mean 'arc_easy'?" in done.stderr
    asked = asked_for(f"piqa, {made / 'tasks'},mmlu", limit=3)
    assert asked.names == ("piqa", "tiny_choice", "tiny_text", "mmlu") and asked.standard and asked.limit == 3


def test_a_folder_is_all_tasks_in_it(made: Path, tmp_path: Path) -> None:
    asked = asked_for(str(made / "tasks"), shots=2)
    assert asked == Asked(("tiny_choice", "tiny_text"), ((made / "tasks").resolve(),), standard=False, shots=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.yaml").write_text("task: [a\n")
    for text, words in {
        str(tmp_path / "empty"): "has no task in it",
        str(tmp_path / "broken"): r"a\.yaml is no yaml.*mend it",
        str(tmp_path / "absent"): "is not there",
        " ,": "names no task",
    }.items():
        with pytest.raises(RecipeError, match=f"(?s){words}"):
            asked_for(text)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"unsafe_code": True}, RecipeError, "runs programs that the model writes"),
        ({"doc_to_image": "picture"}, RecipeError, "shows pictures"),
        ({"test_split": "absent"}, CalibrationError, "does not work here"),
        ({"doc_to_text": "{{ question.absent.more }}"}, CalibrationError, "does not work here"),
    ],
)
def test_a_task_that_cannot_be_measured_is_refused(
    made: Path, tmp_path: Path, change: dict[str, Any], error: type[BitlatheError], words: str
) -> None:
    said = yaml.safe_load((made / "tasks" / "tiny_choice.yaml").read_text())
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.yaml").write_text(yaml.safe_dump(said | change))
    with pytest.raises(error, match=words):
        measure_tasks(["builtin"], asked_for(str(tmp_path / "t"), limit=2), device="cpu")


# Results


def test_quantize_measures_every_result_and_its_original(made: Path) -> None:
    reports = [report_of(made / "q" / name) for name in ("native", "compressed-tensors")]
    tasks = reports[0]["tasks"]
    assert reports[1]["tasks"] == tasks  # one set of codes
    assert reports[0]["evaluation"] is None
    choice, text = tasks["tiny_choice"], tasks["tiny_text"]
    assert (choice["documents"], choice["of"], choice["shots"], choice["version"]) == (QUESTIONS, QUESTIONS, 1, 1.5)
    assert (text["documents"], text["shots"]) == (TEXTS, 0)  # there is no room for examples in a text
    assert choice["against"] == "builtin"
    assert choice["begin_of_text"] == {"tokenizer": "builtin", "token": "<s>", "everywhere": False}
    assert [(row["name"], row["higher_is_better"]) for row in choice["metrics"] + text["metrics"]] == [
        ("acc", True), ("acc_norm", True), ("word_perplexity", False), ("bits_per_byte", False),
    ]  # fmt: skip
    for row in choice["metrics"] + text["metrics"]:
        assert row["difference"]["value"] == pytest.approx(row["model"]["value"] - row["original"]["value"])
        assert row["model"]["error"] > 0
    bits = text["metrics"][1]
    # W3A16 costs something, which pairs of texts show that differ more than the models do.
    assert bits["difference"]["value"] > 0
    assert bits["difference"]["error"] < bits["model"]["error"] / 2
    shown = (made / "shown.txt").read_text()
    for words in (
        "tiny_choice",
        "acc_norm",
        "bits_per_byte",
        "difference",
        "<s> begins a text without context",
        "against builtin",
    ):
        assert words in shown, shown
    card = (made / "q" / "native" / "README.md").read_text()
    assert f"| tiny_text | 0 | {TEXTS} of {TEXTS} | bits_per_byte | {bits['model']['value']:.4g} ± " in card
    assert "Nothing yet" not in card


def test_figures_are_those_that_the_likelihoods_make(made: Path, model: PreTrainedModel) -> None:
    rows = [json.loads(line) for line in (made / "tiny_choice.jsonl").read_text().splitlines()]
    asked = [(row["question"], f" {choice}") for row in rows for choice in row["choices"]]
    likelihoods = np.array([found for found, _ in harness(model).loglikelihood(requests("loglikelihood", *asked))])
    right = likelihoods.reshape(QUESTIONS, 3).argmax(1) == 0
    (found,) = measure_tasks([made / "q" / "native"], asked_for(str(made / "tasks")), device="cpu")
    accuracy = found["tiny_choice"]["metrics"][0]
    # In bfloat16 a close question may fall the other way.
    assert accuracy["model"]["value"] == pytest.approx(right.mean(), abs=1.01 / QUESTIONS)
    assert found["tiny_choice"]["against"] is None and accuracy.keys() == {"name", "filter", "higher_is_better", "model"}
    text = [(json.loads(line)["text"],) for line in (made / "tiny_text.jsonl").read_text().splitlines()]
    nats = -sum(harness(model).loglikelihood_rolling(requests("loglikelihood_rolling", *text)))
    bits = nats / math.log(2) / sum(len(words.encode()) for (words,) in text)
    assert found["tiny_text"]["metrics"][1]["model"]["value"] == pytest.approx(bits, rel=2e-3)


def test_a_group_is_told_beside_its_tasks(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "tasks", tmp_path / "tasks"))
    group = {"group": "pair", "task": ["tiny_choice", "tiny_text"], "metadata": {"version": 2}}
    group["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (folder / "pair.yaml").write_text(yaml.safe_dump(group))
    asked = Asked(("pair",), (folder,), standard=False, limit=6)
    (found,) = measure_tasks(["builtin"], asked, against="builtin", device="cpu")
    assert list(found) == ["tiny_choice", "tiny_text", "pair"]
    assert found["pair"]["metrics"] == [found["tiny_choice"]["metrics"][0]]
    assert found["pair"]["metrics"][0]["difference"] == {"value": 0.0, "error": 0.0}
    assert (found["pair"]["documents"], found["tiny_choice"]["documents"], found["pair"]["tasks"]) == (
        6 + TEXTS, 6, ["tiny_choice", "tiny_text"],
    )  # fmt: skip


def test_perplexity_and_tasks_stay_beside_each_other(made: Path, result: Path) -> None:
    tasks = report_of(result)["tasks"]
    options = ["--seqlen", "64", "--windows", "2"]
    assert CliRunner().invoke(cli.app, ["eval", str(result), *options]).exit_code == 0
    first = report_of(result)
    assert first["tasks"] == tasks and first["evaluation"]["windows"] == 2
    done = CliRunner().invoke(
        cli.app,
        ["eval", str(result), *options, "--against", "builtin", "--tasks", str(made / "tasks"), "--limit", "3", "--json"],
    )
    assert done.exit_code == 0, done.output
    printed, second = json.loads(done.stdout), report_of(result)
    assert len(done.stdout.splitlines()) == 1
    assert printed["tasks"] == second["tasks"] and printed["tasks"]["tiny_choice"]["documents"] == 3
    assert second["evaluation"] == {name: value for name, value in printed.items() if name != "tasks"}
    card = (result / "README.md").read_text()
    assert "| kl_mean |" in card and "| tiny_choice | 0 | 3 of 24 | acc |" in card


def test_a_task_is_kept_unless_there_is_a_fuller_one(result: Path) -> None:
    tasks = report_of(result)["tasks"]
    alone = {"tiny_text": tasks["tiny_text"] | {"against": None, "documents": 1}}
    assert not record_evaluation(result, {"tasks": alone})
    other = {"another": tasks["tiny_text"] | {"against": None}}
    assert record_evaluation(result, {"tasks": alone | other})
    assert report_of(result)["tasks"] == tasks | other
    newer = {"another": tasks["tiny_choice"]}
    assert record_evaluation(result, {"tasks": newer})
    assert report_of(result)["tasks"] == tasks | newer
