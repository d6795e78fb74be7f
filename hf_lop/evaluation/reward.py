"""Benchmarks as the reward of a search: what a candidate model scores on tasks of lmms-eval or lm-eval."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel

from hf_lop.errors import InvalidInputError
from hf_lop.evaluation.harnesses import need_extra, run_task, wrap
from hf_lop.evaluation.paper import COLUMNS
from hf_lop.evaluation.run import assign_tasks, read_folders, read_names
from hf_lop.learning.rewards import Score


class TaskReward:
    """Scores a candidate by benchmarks: the mean of one metric per task.

    Pass it to `LOPPruner.fit(reward=...)`, on tasks that are not those of the report.

    Attributes:
        name (`str`): goes into the journal and the pruner's provenance.
    """

    def __init__(
        self,
        tasks: str | Sequence[str],
        processor: Any,
        *,
        metric: str | None = None,
        limit: int | None = None,
        batch_size: int = 1,
        harness: str | None = None,
        include_path: str | Path | Sequence[str | Path] = (),
    ) -> None:
        """Choose tasks; they are looked up at the first call, when the model's kind is known.

        Args:
            tasks (`str` or `Sequence[str]`): see [`evaluate`][hf_lop.evaluate].
            processor: the model's processor or tokenizer.
            metric (`str`, *optional*): name of the metric to maximise; by default the only one of a task, or the one that
                the paper reports, in its scale.
            limit (`int`, *optional*): questions per task, from the first on.
            batch_size (`int`): questions at a time.
            harness (`str`, *optional*): see `evaluate`.
            include_path: see `evaluate`.

        Raises:
            MissingDependencyError: if the extra `eval` is not installed.
            InvalidInputError: if there is no task, or a folder does not exist.
        """
        need_extra()
        self._tasks, self._folders = read_names(tasks), read_folders(include_path)
        self._processor, self._metric, self._limit = processor, metric, limit
        self._batch_size, self._harness = batch_size, harness
        self._plan: dict[str, tuple[str, Any]] | None = None
        self.name = f"{'+'.join(self._tasks)}:{metric or 'main'}" + (f":{limit}" if limit else "")

    def __call__(self, model: PreTrainedModel) -> Score:
        """Score a model, in the state it is in.

        Returns:
            `Score`: mean over the tasks; its error assumes that their questions are independent, and is nan where a harness
            gives none.

        Raises:
            InvalidInputError: if a task is unknown, or it is not clear which metric to take.
            EvaluationError: if a task fails.
        """
        if self._plan is None:
            reads_images = type(model.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            self._plan = assign_tasks(self._tasks, self._harness, reads_images, self._folders)
        values, variances, samples = [], [], 0
        for task, (harness, manager) in self._plan.items():
            wrapped = wrap(harness, model, self._processor, self._batch_size)
            found = run_task(harness, wrapped, task, manager, limit=self._limit)
            result = next((one for one in found if one.task == task), found[0])
            for metric, factor in self._choose(task, result.metrics):
                values.append(factor * result.metrics[metric])
                variances.append((factor * result.standard_errors.get(metric, math.nan)) ** 2)
            samples += result.samples
        return Score(math.fsum(values) / len(values), math.sqrt(math.fsum(variances)) / len(values), samples)

    def _choose(self, task: str, metrics: dict[str, float]) -> list[tuple[str, float]]:
        if self._metric is not None:
            if self._metric not in metrics:
                raise InvalidInputError(f"{task} has no metric {self._metric!r}; it has {', '.join(metrics)}.")
            return [(self._metric, 1.0)]
        paper = [(name, factor) for of, name, factor in COLUMNS.values() if of == task and name in metrics]
        if paper or len(metrics) == 1:
            return paper or [(next(iter(metrics)), 1.0)]
        raise InvalidInputError(
            f"{task} has the metrics {', '.join(metrics)}; say which one to maximise by metric=..."
        )
