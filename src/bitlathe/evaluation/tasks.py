"""Tasks of lm-eval (the extra `tasks`), measured on a result and on its original: the same documents, prompts and tokens.

Names are checked before any work starts. Texts of tasks come from the Hub, or from files that a task file names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # see io/checkpoint.py
from jinja2 import TemplateError
from lm_eval.api.metrics import mean
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from bitlathe.errors import CalibrationError, RecipeError
from bitlathe.evaluation.harness import Beginning, Harness, beginning_of
from bitlathe.evaluation.scores import Figure, Score, compared, is_number, pooled
from bitlathe.io.checkpoint import Checkpoint
from bitlathe.model.calib import tokenizer_of
from bitlathe.model.load import load
from bitlathe.registry import did_you_mean

# Of the choice of examples in a prompt; lm-eval's own default, so that prompts are those of published figures.
_SEED = 1234
# What a task file, the programs beside it, and the data it names go wrong with.
_BROKEN = (HTTPError, OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, TemplateError)


@dataclass(frozen=True)
class Asked:
    """Tasks that exist. names: of tasks, groups and tags. folders: of task files. standard: lm-eval's own are needed too.

    limit: documents a task, from its first; None is all. shots: examples in a prompt; None is what each task says.
    """

    names: tuple[str, ...]
    folders: tuple[Path, ...] = ()
    standard: bool = True
    limit: int | None = None
    shots: int | None = None

    def manager(self) -> TaskManager:
        """lm-eval's list of what there is."""
        return TaskManager(include_path=list(self.folders) or None, include_defaults=self.standard)


@dataclass(frozen=True)
class _Side:
    """What lm-eval found for one model. scores: task -> (metric, filter) -> documents. room: tokens a step."""

    scores: dict[str, dict[tuple[str, str], Score]]
    found: dict[str, Any]
    room: int


def asked_for(text: str, *, limit: int | None = None, shots: int | None = None) -> Asked:
    """The tasks that "name,name,folder" means: of a folder of task files (yaml) all tasks in it.

    Raises RecipeError for a name that is unknown, a folder without a task, and a task file that is no yaml.
    """
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    folders = {part: Path(part).expanduser().resolve() for part in parts if _is_folder(part)}
    for folder in folders.values():
        _refuse_broken(folder)
    names = [part for part in parts if part not in folders]
    if not parts:
        raise RecipeError("--tasks names no task. Give names of lm-eval's tasks with commas, or a folder of task files")
    asked = Asked((), tuple(folders.values()), standard=bool(names), limit=limit, shots=shots)
    manager = asked.manager()
    for name in names:
        if name not in manager.task_index:
            raise RecipeError(
                f"--tasks {name!r} is no task of lm-eval and no folder of task files.{did_you_mean(name, manager.all_tasks)} "
                "`lm-eval ls tasks` lists all"
            )
    found: list[str] = []
    for part in parts:
        inside = _tasks_in(manager, folders[part]) if part in folders else [part]
        if not inside:
            raise RecipeError(f"the folder {part} of --tasks has no task in it: one is a .yaml file with a line 'task: NAME'")
        found += inside
    return Asked(tuple(dict.fromkeys(found)), asked.folders, standard=asked.standard, limit=limit, shots=shots)


def measure_tasks(
    folders: Sequence[str | Path], asked: Asked, *, against: str | Path | None = None, device: str = "auto"
) -> list[dict[str, Any]]:
    """Measure tasks on the model in each of `folders`, and once on the original `against`, all loaded by `bitlathe.load`.

    Returns for each folder {task or group: {"version", "shots", "documents": how many, "of": how many there are, "against",
    "begin_of_text": {"tokenizer", "token", "everywhere"}, "tokens_a_step", "lm_eval": its version, "metrics": [{"name",
    "filter", "higher_is_better", "model": {"value", "error"}, "original" and "difference" likewise}]}}. The tokenizer, and what
    a text begins with, are the original's for both, or the folder's own where there is no original. Raises CalibrationError
    for a task whose files or data cannot be used.
    """
    source = Checkpoint(folders[0] if against is None else against)
    tokenizer = tokenizer_of(source.path)
    beginning = beginning_of(tokenizer, source.path)
    loaded = _loaded(asked)

    def run(folder: str | Path) -> _Side:
        return _run(folder, loaded, asked, device=device, spoken=(tokenizer, beginning))

    original = None if against is None else run(against)
    common = {
        "against": None if against is None else str(against),
        "begin_of_text": {
            "tokenizer": str(folders[0] if against is None else against),
            "token": tokenizer.convert_ids_to_tokens(beginning.token),
            "everywhere": beginning.everywhere,
        },
        "lm_eval": version("lm_eval"),
    }
    return [_described(run(folder), original, loaded["groups"], common) for folder in folders]


def _is_folder(part: str) -> bool:
    """A folder with task files. A bare name may be that of any other folder too, and then it is a task's."""
    path = Path(part).expanduser()
    if "/" not in part and not part.startswith((".", "~")):
        return path.is_dir() and any(path.rglob("*.yaml"))
    if not path.is_dir():
        raise RecipeError(f"the folder {part} of --tasks is not there: name a folder of task files, or tasks of lm-eval")
    return True


def _refuse_broken(folder: Path) -> None:
    # lm-eval passes over a file that it cannot read, and what was asked for would be left out unseen.
    for path in sorted(folder.rglob("*.yaml")):
        try:
            list(yaml.parse(path.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"the task file {path} is no yaml ({error}): mend it, or take it out of its folder") from error


def _tasks_in(manager: TaskManager, folder: Path) -> list[str]:
    files = {name: manager.task_index[name].yaml_path for name in manager.all_subtasks}
    return [name for name, path in files.items() if path is not None and path.is_relative_to(folder)]


def _loaded(asked: Asked) -> dict[str, Any]:
    """{"tasks": name -> task, "groups": name -> group}, their data fetched."""
    try:
        loaded: dict[str, Any] = dict(asked.manager().load(list(asked.names)))
    except _BROKEN as error:
        raise _unusable(error) from error
    for name, task in loaded["tasks"].items():
        if task.get_config("unsafe_code"):
            raise RecipeError(f"the task {name} runs programs that the model writes, which is not done here: leave it out")
        if task.get_config("doc_to_image") or task.get_config("doc_to_audio"):
            raise RecipeError(f"the task {name} shows pictures or sounds, and a model here reads text: leave it out")
        said = 0 if task.OUTPUT_TYPE == "loglikelihood_rolling" else task.get_config("num_fewshot")
        if said == 0:
            # A whole text has no room for examples, and a task that says 0 is not made for them.
            task.set_config(key="num_fewshot", value=0)
        elif said is None or asked.shots is not None:
            task.set_config(key="num_fewshot", value=asked.shots or 0)
    return loaded


def _run(
    folder: str | Path,
    loaded: dict[str, Any],
    asked: Asked,
    *,
    device: str,
    spoken: tuple[PreTrainedTokenizerBase, Beginning],
) -> _Side:
    tokenizer, beginning = spoken
    harness = Harness(load(folder, device), tokenizer, beginning=beginning, folder=Path(folder))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)
    try:
        found: Any = evaluate(lm=harness, task_dict=loaded, limit=asked.limit, bootstrap_iters=0, log_samples=True)  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, TemplateError) as error:
        raise _unusable(error) from error
    samples = found.pop("samples")
    return _Side({name: _scores(task, samples[name]) for name, task in loaded["tasks"].items()}, found, harness.room)


def _unusable(error: BaseException) -> CalibrationError:
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return CalibrationError(
        f"a task cannot be measured: what its file says, or the data it names, does not work here ({type(error).__name__}: "
        f"{reason}). Leave it out of --tasks, or mend its file; a result that is written already is kept, and `bitlathe eval` "
        "measures it later"
    )


def _scores(task: Any, samples: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Score]:
    values: dict[tuple[str, str], dict[int, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    better, aggregates = task.higher_is_better(), task.aggregation()
    return {
        (metric, kind): Score(
            metric=metric,
            filter=kind,
            better=better.get(metric),
            values=found,
            aggregate=aggregates.get(metric, mean),
            mean=aggregates.get(metric, mean) is mean,
        )
        for (metric, kind), found in values.items()
    }


def _described(ours: _Side, theirs: _Side | None, groups: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    figures: dict[str, dict[tuple[str, str], dict[str, Figure]]] = {}
    described = {}
    for task, scores in ours.scores.items():
        aggregated = ours.found["results"][task]
        figures[task] = {
            key: compared(score, None if theirs is None else theirs.scores[task][key])
            for key, score in scores.items()
            if is_number(aggregated[",".join(key)])
        }
        counts = ours.found["n-samples"][task]
        described[task] = {
            "version": ours.found["versions"][task],
            "shots": ours.found["n-shot"][task],
            "documents": counts["effective"],
            "of": counts["original"],
            "metrics": [_row(scores[key], found) for key, found in figures[task].items()],
            "tokens_a_step": ours.room,
            **common,
        }
    return described | {
        name: _group(group, ours, figures) | {"tokens_a_step": ours.room, **common}
        for name, group in groups.items()
        if group.aggregate_metric_list
    }


def _row(score: Score, figures: dict[str, Figure]) -> dict[str, Any]:
    return {"name": score.metric, "filter": score.filter, "higher_is_better": score.better, **figures}


def _group(group: Any, ours: _Side, figures: dict[str, dict[tuple[str, str], dict[str, Figure]]]) -> dict[str, Any]:
    """What a group of tasks comes to: the mean of its tasks, weighted as it says."""
    members = [task.task_name for task in group.get_all_tasks()]
    counts = {name: ours.found["n-samples"][name] for name in members}
    rows = []
    for said in group.aggregate_metric_list:
        keys = dict.fromkeys(key for name in members for key in figures[name] if key[0] == said.metric)
        for key in [key for key in keys if said.filter_list is None or key[1] in said.filter_list]:
            having = [name for name in members if key in figures[name]]
            weights = [counts[name]["effective"] if said.weight_by_size else 1 for name in having]
            rows.append(_row(ours.scores[having[0]][key], pooled([figures[name][key] for name in having], weights)))
    shots = {ours.found["n-shot"][name] for name in members}
    return {
        "version": group.version,
        "shots": shots.pop() if len(shots) == 1 else None,
        "documents": sum(count["effective"] for count in counts.values()),
        "of": sum(count["original"] for count in counts.values()),
        "tasks": members,
        "metrics": rows,
    }
