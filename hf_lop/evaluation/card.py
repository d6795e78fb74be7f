"""Results on the card of a model: `model-index` in its metadata, and `.eval_results` files where the user asks for them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    EvalResultEntry,
    HfApi,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import EntryNotFoundError

from hf_lop.errors import InvalidInputError
from hf_lop.evaluation.results import Results, TaskResult

SOURCES = {
    "lmms-eval": ("image-text-to-text", "https://github.com/EvolvingLMMs-Lab/lmms-eval"),
    "lm-eval": ("text-generation", "https://github.com/EleutherAI/lm-evaluation-harness"),
}
_METADATA = re.compile(r"\A(\s*---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
_MODEL_INDEX = re.compile(r"^model-index:.*\n(?:(?:[ \t-].*)?\r?\n)*", re.MULTILINE)  # up to the next key


def model_index_entry(task: TaskResult) -> dict[str, Any]:
    """Return one task as an entry of a card's `model-index`: finite floats, with harness, version and questions asked."""
    kind, url = SOURCES[task.harness]
    asked = {"samples": task.samples, **({"of": task.total} if task.samples < task.total else {})}
    place = {"name": task.task, "type": task.dataset, "config": task.config, "split": task.split, "args": asked}
    metrics = []
    for name, value in task.metrics.items():
        metrics.append(
            {"type": name, "name": name, "value": float(value)}
        )  # NumPy's numbers would become Python objects
        if name in task.standard_errors:
            metrics[-1]["args"] = {"stderr": float(task.standard_errors[name])}
    return {
        "task": {"type": kind},
        "dataset": {key: value for key, value in place.items() if value is not None},
        "metrics": metrics,
        "source": {"name": f"{task.harness} {task.harness_version}", "url": url},
    }


def _subject(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an entry of `model-index` is about."""
    return (entry["task"]["type"], *(entry["dataset"].get(key) for key in ("name", "type", "config", "split")))


def with_results(card: str, results: Results, name: str) -> str:
    """Return a card with results in its `model-index`; every other character stays as it is.

    Results of other benchmarks stay; those of the same task on the same data are replaced.

    Args:
        card (`str`): a README.md; "" makes one that holds metadata alone.
        results (`Results`): what to add.
        name (`str`): of the model, where the card has no `model-index` yet.

    Raises:
        InvalidInputError: if there is no result, or the card's metadata cannot be read.
    """
    if not results.tasks:
        raise InvalidInputError("The results hold no task, so there is nothing to put on a card.")
    parts = _METADATA.match(card)
    opening, metadata, closing = parts.groups() if parts else ("---\n", "", "---\n")
    new = [model_index_entry(task) for task in results.tasks]
    try:
        index = (yaml.safe_load(metadata) or {}).get("model-index") or [{"name": name, "results": []}]
        old = [entry for entry in index[0]["results"] if _subject(entry) not in map(_subject, new)]
        index[0]["results"] = old + new
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise InvalidInputError(f"The card's metadata cannot be read ({error}). Mend its YAML first.") from error
    text = yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)
    rest = _MODEL_INDEX.sub("", metadata)
    if rest and not rest.endswith("\n"):
        rest += "\n"
    return opening + rest + text + closing + (card[parts.end() :] if parts else card and f"\n{card}")


def eval_result_files(results: Results, benchmarks: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Return `.eval_results` files by path in the repository.

    The Hub shows them on the leaderboard of a dataset only if the dataset registered itself as a benchmark with that task.

    Args:
        results (`Results`): what was measured.
        benchmarks (`Mapping[str, tuple[str, str]]`): metric -> (Hub id of the dataset, task id in its eval.yaml).

    Raises:
        InvalidInputError: if no task has a metric of that name, or more than one.
    """
    files = {}
    for metric, (dataset, task_id) in benchmarks.items():
        having = [task for task in results.tasks if metric in task.metrics]
        if len(having) != 1:
            names = ", ".join(m for task in results.tasks for m in task.metrics)
            raise InvalidInputError(f"{len(having)} tasks have the metric {metric!r}; name one of {names}.")
        entry = EvalResultEntry(
            dataset_id=dataset,
            task_id=task_id,
            value=having[0].metrics[metric],
            date=results.date,
            source_url=SOURCES[having[0].harness][1],
            source_name=f"{having[0].harness} {having[0].harness_version}",
            notes=_notes(having[0]),
        )
        path = ".eval_results/" + re.sub(r"[^\w.-]+", "_", f"{dataset}_{task_id}") + ".yaml"
        files[path] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def _notes(task: TaskResult) -> str:
    part = f" on {task.samples} of {task.total} questions" if task.samples < task.total else ""
    return f"{task.task}{part}"


def push_results(
    results: Results | Sequence[Results],
    repo_id: str,
    *,
    benchmarks: Mapping[str, tuple[str, str]] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Put results on the card of a model on the Hub, in one commit that touches nothing else.

    Pushing the model again writes its card anew, without the results: they were those of the old weights.

    Args:
        results (`Results` or a sequence): what `evaluate` returned.
        repo_id (`str`): repository of the model.
        benchmarks (`Mapping`, *optional*): metrics to write as `.eval_results` files as well, see `eval_result_files`.
        revision (`str`, *optional*): branch.
        token (`str` or `bool`, *optional*): Hub token; the one of `hf auth login` by default.
        create_pr (`bool`): open a pull request instead of committing to the branch.

    Returns:
        `CommitInfo`: the commit, with its URL.

    Raises:
        InvalidInputError: if there is no result, or the card cannot be read; nothing was pushed then.
    """
    several = [results] if isinstance(results, Results) else list(results)
    files: dict[str, str] = {}
    for one in several:
        files |= eval_result_files(one, benchmarks or {})
    api = HfApi(token=token)
    parent = api.model_info(repo_id, revision=revision).sha
    try:
        card = Path(api.hf_hub_download(repo_id, "README.md", revision=parent)).read_bytes().decode("utf-8")
    except EntryNotFoundError:
        card = ""
    for one in several:
        card = with_results(card, one, repo_id.rpartition("/")[2])
    changed: dict[str, Any] = {"README.md": card, **files}
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(path, text.encode()) for path, text in changed.items()],
        commit_message="Add evaluation results",
        revision=revision,
        create_pr=create_pr,
        parent_commit=parent,
    )
