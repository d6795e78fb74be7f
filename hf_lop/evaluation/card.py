"""Results on the card of a model or pruner: in its metadata, in the table of a card of hf_lop, and as `.eval_results` files."""

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
from hf_lop.hub.cards.facts import RESULTS, cell

SOURCES = {
    "lmms-eval": ("image-text-to-text", "https://github.com/EvolvingLMMs-Lab/lmms-eval"),
    "lm-eval": ("text-generation", "https://github.com/EleutherAI/lm-evaluation-harness"),
}
_METADATA = re.compile(r"\A(\s*---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
_TABLE = re.compile(f"(?<={RESULTS[0]}\n).*?(?=^{RESULTS[1]})", re.DOTALL | re.MULTILINE)
_MODEL_INDEX = re.compile(r"^model-index:.*\n(?:(?:[ \t-].*)?\r?\n)*", re.MULTILINE)  # up to the next key


def model_index_entry(
    task: TaskResult, *, dense: TaskResult | None = None, ratio: float | None = None
) -> dict[str, Any]:
    """Return one task as an entry of a card's `model-index`: finite floats, with harness, version and questions asked.

    Args:
        task (`TaskResult`): of the model.
        dense (`TaskResult`, *optional*): the same task of the dense model.
        ratio (`float`, *optional*): fraction of neurons that was removed, on the card of a pruner, which makes many models.
    """
    kind, url = SOURCES[task.harness]
    asked: dict[str, float] = {"samples": task.samples, **({"of": task.total} if task.samples < task.total else {})}
    if ratio is not None:
        asked["ratio"] = float(ratio)
    place = {"name": task.task, "type": task.dataset, "config": task.config, "split": task.split, "args": asked}
    metrics = []
    for name, value in task.metrics.items():
        metrics.append(
            {"type": name, "name": name, "value": float(value)}
        )  # NumPy's numbers would become Python objects
        known = {"stderr": task.standard_errors.get(name), "dense": dense.metrics.get(name) if dense else None}
        if found := {key: float(number) for key, number in known.items() if number is not None}:
            metrics[-1]["args"] = found
    return {
        "task": {"type": kind},
        "dataset": {key: value for key, value in place.items() if value is not None},
        "metrics": metrics,
        "source": {"name": f"{task.harness} {task.harness_version}", "url": url},
    }


def _subject(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an entry of `model-index` is about."""
    dataset = entry["dataset"]
    ratio = (dataset.get("args") or {}).get("ratio")
    return (entry["task"]["type"], *(dataset.get(key) for key in ("name", "type", "config", "split")), ratio)


def with_results(
    card: str, results: Results, name: str, *, dense: Results | None = None, ratio: float | None = None
) -> str:
    """Return a card with results in its `model-index`, and in its table of results if it has one of hf_lop.

    Every other character stays as it is.

    Results of other benchmarks stay; those of the same task on the same data are replaced.

    Args:
        card (`str`): a README.md; "" makes one that holds metadata alone.
        results (`Results`): what to add.
        name (`str`): of the model, where the card has no `model-index` yet.
        dense (`Results`, *optional*): those of the dense model, to stand beside them.
        ratio (`float`, *optional*): fraction of neurons that was removed, on the card of a pruner.

    Raises:
        InvalidInputError: if there is no result, or the card's metadata cannot be read.
    """
    if not results.tasks:
        raise InvalidInputError("The results hold no task, so there is nothing to put on a card.")
    parts = _METADATA.match(card)
    opening, metadata, closing = parts.groups() if parts else ("---\n", "", "---\n")
    others = {task.task: task for task in dense.tasks} if dense else {}
    new = [model_index_entry(task, dense=others.get(task.task), ratio=ratio) for task in results.tasks]
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
    body = _TABLE.sub(lambda _: _table(index[0]["results"]), card[parts.end() :]) if parts else card and f"\n{card}"
    return opening + rest + text + closing + body


def _table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return all results of a `model-index` as a Markdown table; it leaves out columns that nobody filled."""
    rows = []
    for entry in entries:
        asked = entry["dataset"].get("args") or {}
        for metric in entry.get("metrics") or ():
            known = metric.get("args") or {}
            error, count = known.get("stderr"), str(asked.get("samples", ""))
            rows.append(
                {
                    "benchmark": cell(entry["dataset"].get("name", "")),
                    "metric": cell(metric.get("name") or metric.get("type", "")),
                    "neurons removed": f"{asked['ratio']:.1%}" if "ratio" in asked else "",
                    "dense model": f"{known['dense']:.4g}" if "dense" in known else "",
                    "this model": _number(metric.get("value")) + ("" if error is None else f" ± {error:.2g}"),
                    "questions": f"{count} of {asked['of']}" if "of" in asked else count,
                }
            )
    if any(row["neurons removed"] for row in rows):
        rows = [{("pruned model" if key == "this model" else key): text for key, text in row.items()} for row in rows]
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    lines = [columns, ["---" if column in ("benchmark", "metric") else "---:" for column in columns]]
    lines += [[row[column] for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else cell(value)


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
    dense: Results | None = None,
    benchmarks: Mapping[str, tuple[str, str]] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Put results on the card of a model on the Hub, in one commit that touches nothing else.

    On the card of the pruner that made the model, results of every ratio stand side by side.

    Pushing the model again writes its card anew, without the results: they were those of the old weights.

    Args:
        results (`Results` or a sequence): what `evaluate` returned.
        repo_id (`str`): repository of the model, or of its pruner.
        dense (`Results`, *optional*): those of the dense model, to stand beside them.
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
        made = one.pruning or {}
        ratio = made.get("ratio") if made.get("pruner") == repo_id else None
        card = with_results(card, one, repo_id.rpartition("/")[2], dense=dense, ratio=ratio)
    changed: dict[str, Any] = {"README.md": card, **files}
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(path, text.encode()) for path, text in changed.items()],
        commit_message="Add evaluation results",
        revision=revision,
        create_pr=create_pr,
        parent_commit=parent,
    )
