"""What was measured: typed, frozen, and as JSON."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_lop.errors import EvaluationError, InvalidInputError
from hf_lop.files import write_whole
from hf_lop.hub.read.names import hub_id


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task, scored by a harness.

    Attributes:
        task (`str`): its name in the harness.
        metrics (`dict[str, float]`): finite numbers only, in the scale of the harness; a filter other than "none" follows
            the name of its metric after a comma.
        standard_errors (`dict[str, float]`): of those metrics for which the harness has one.
        samples (`int`): questions that were asked.
        total (`int`): questions the task has.
        dataset (`str`): Hub id, or the task's name if the data are local.
        config (`str`, *optional*): configuration of the dataset.
        split (`str`, *optional*): split of the dataset.
        harness (`str`): "lmms-eval" or "lm-eval".
        harness_version (`str`): its version.
        answers (`tuple[str, ...]`): the model's answers in the order of the questions; empty for a group of tasks.
    """

    task: str
    metrics: dict[str, float]
    standard_errors: dict[str, float]
    samples: int
    total: int
    dataset: str
    config: str | None
    split: str | None
    harness: str
    harness_version: str
    answers: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Results:
    """All tasks of one model.

    Attributes:
        model (`str`): Hub id, or the name of its folder.
        weights (`str`): fingerprint of the weights, see `weight_fingerprint`.
        parameters (`int`): of the model.
        pruning (`dict`, *optional*): how it was pruned, from its config.
        tasks (`tuple[TaskResult, ...]`): in the order they were asked for.
        date (`str`): when, in UTC, ISO 8601.
        hf_lop_version (`str`): version of this package.
    """

    model: str
    weights: str
    parameters: int
    pruning: dict[str, Any] | None
    tasks: tuple[TaskResult, ...]
    date: str
    hf_lop_version: str

    def __getitem__(self, task: str) -> TaskResult:
        """Return the result of one task.

        Raises:
            InvalidInputError: if it was not evaluated.
        """
        for result in self.tasks:
            if result.task == task:
                return result
        raise InvalidInputError(f"No result of {task!r}; there are {', '.join(r.task for r in self.tasks) or 'none'}.")

    def to_dict(self, *, answers: bool = False) -> dict[str, Any]:
        """Return plain JSON types; the answers are left out unless asked for."""
        plain = asdict(self)
        for task in plain["tasks"]:
            task["answers"] = list(task["answers"]) if answers else []
        return {**plain, "tasks": list(plain["tasks"])}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Results":
        """Return what `to_dict` was called on.

        Raises:
            InvalidInputError: if it is something else.
        """
        try:
            tasks = tuple(TaskResult(**{**task, "answers": tuple(task["answers"])}) for task in plain["tasks"])
            return cls(**{**plain, "tasks": tasks})
        except (KeyError, TypeError) as error:
            raise InvalidInputError(f"These are no results of hf_lop ({error}). Pass what evaluate saved.") from error

    def save(self, path: str | Path) -> None:
        """Write everything, answers included, as JSON: a file that appears whole or not at all."""
        write_whole(Path(path), (json.dumps(self.to_dict(answers=True), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Read what `save` wrote.

        Raises:
            InvalidInputError: if the file holds something else.
        """
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidInputError(f"{path} is no JSON ({error}). Pass a file that evaluate saved.") from error
        return cls.from_dict(plain)

    def __str__(self) -> str:
        rows = [("task", "metric", "value", "std. error", "samples")]
        for result in self.tasks:
            for name, value in result.metrics.items():
                error = result.standard_errors.get(name)
                count = (
                    f"{result.samples}" if result.samples == result.total else f"{result.samples} of {result.total}"
                )
                rows.append((result.task, name, f"{value:.4f}", "" if error is None else f"{error:.4f}", count))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([f"{self.model}, {self.parameters:,} parameters", *(line.rstrip() for line in lines)])


def read_raw(raw: Mapping[str, Any], harness: str, version: str) -> list[TaskResult]:
    """Read what `simple_evaluate` of either harness returned.

    Raises:
        EvaluationError: if a task had no question, or no metric of it is a finite number.
    """
    found = []
    for task, values in raw["results"].items():
        counts = raw["n-samples"].get(task)
        answered = raw.get("samples", {}).get(task, ())
        metrics, errors = _numbers(values, answered)
        if counts is None and not metrics:
            continue  # the heading of a group
        members = [raw["n-samples"][t] for t in raw.get("group_subtasks", {}).get(task, ()) if t in raw["n-samples"]]
        samples, total = (
            sum(int(c[kind]) for c in ([counts] if counts else members)) for kind in ("effective", "original")
        )
        if samples == 0:
            raise EvaluationError(f"The task {task} has no question. Check its dataset and split.")
        if not metrics:
            raise EvaluationError(
                f"No metric of the task {task} is a finite number: {_shorten(values)}. "
                "A task without public answers cannot be scored here; else look at the answers."
            )
        config = raw.get("configs", {}).get(task, {})
        found.append(
            TaskResult(
                task=task,
                metrics=metrics,
                standard_errors={name: error for name, error in errors.items() if name in metrics},
                samples=samples,
                total=total,
                dataset=_dataset(task, config.get("dataset_path")),
                config=config.get("dataset_name"),
                split=config.get("test_split") or config.get("validation_split"),
                harness=harness,
                harness_version=version,
                answers=_answers(answered),
            )
        )
    return found


def _numbers(
    values: Mapping[str, Any], answered: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in values.items():
        name, comma, kept_by = key.partition(",")
        number = _finite(value)
        if not comma or number is None:
            continue
        filtered = "" if kept_by == "none" else f",{kept_by}"
        if name.endswith("_stderr"):
            errors[name.removesuffix("_stderr") + filtered] = number
        elif name.endswith("_stderr_clt"):  # lmms-eval gives it for every metric, right or not: it is that of a mean
            mean_of = name.removesuffix("_stderr_clt")
            scores = [
                _finite(one.get("score") if isinstance(one, Mapping) else one) for one in _column(answered, mean_of)
            ]
            known = [score for score in scores if score is not None]
            reported = _finite(values.get(f"{mean_of},{kept_by}"))
            if known and reported is not None and math.isclose(math.fsum(known) / len(known), reported, abs_tol=1e-9):
                errors.setdefault(mean_of + filtered, number)
        else:
            metrics[name + filtered] = number
    return metrics, errors


def _column(answered: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    return [sample[name] for sample in answered if name in sample]


def _finite(value: Any) -> float | None:
    if isinstance(value, bool | str) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _dataset(task: str, path: Any) -> str:
    """Return a Hub id, never a path of this machine or the name of a file format."""
    text = str(path or "")
    return (hub_id(text) if "/" in text else None) or task


def _answers(samples: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the answers in the order of the questions; several processes report them in another one."""
    by_question: dict[int, str] = {}
    for sample in samples:
        given = sample["filtered_resps"][0] if len(sample["filtered_resps"]) == 1 else sample["filtered_resps"]
        by_question.setdefault(int(sample["doc_id"]), given if isinstance(given, str) else json.dumps(given))
    return tuple(by_question[question] for question in sorted(by_question))


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]}..."
