"""The paper's benchmarks under one name, `lop-paper`, and its Table 1 (LOP, arXiv 2506.12826)."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields

from hf_lop.errors import InvalidInputError
from hf_lop.evaluation.results import Results

NAME = "lop-paper"
# Column -> task and metric of lmms-eval, and the factor to the paper's scale. MMBench is the variant without a judge.
COLUMNS = {
    "mme_perception": ("mme", "mme_perception_score", 1.0),
    "mme_cognition": ("mme", "mme_cognition_score", 1.0),
    "mmbench": ("mmbench_en_dev_static", "gpt_eval_score", 1.0),
    "mmmu": ("mmmu_val", "mmmu_acc", 100.0),
    "pope": ("pope", "pope_accuracy", 100.0),
}
TASKS = tuple(dict.fromkeys(task for task, _, _ in COLUMNS.values()))
HEADINGS = ("MME-P", "MME-R", "MMBench", "MMMU", "POPE")


@dataclass(frozen=True, slots=True)
class PaperScores:
    """The scores of one model as the paper prints them.

    Attributes:
        mme_perception (`float`): 0 to 2000 over all categories.
        mme_cognition (`float`): 0 to 800; the paper's MME-R.
        mmbench (`float`): MMBench dev (English), circular, in percent.
        mmmu (`float`): MMMU validation, in percent.
        pope (`float`): accuracy in percent; the paper does not say whether it prints accuracy or F1.
    """

    mme_perception: float
    mme_cognition: float
    mmbench: float
    mmmu: float
    pope: float

    @classmethod
    def of(cls, results: Results) -> "PaperScores":
        """Collect the scores from results of the task `lop-paper`.

        Raises:
            InvalidInputError: if one of its tasks was not evaluated, or on too few questions for a score.
        """
        for task, metric, _ in COLUMNS.values():
            if metric not in results[task].metrics:
                raise InvalidInputError(f"The task {task} gave no {metric}. Evaluate it on all its questions.")
        return cls(*(factor * results[task].metrics[metric] for task, metric, factor in COLUMNS.values()))

    @property
    def average(self) -> float:
        """Mean of MMBench, MMMU and POPE; MME is on another scale and stays outside, which gives the paper's numbers."""
        return (self.mmbench + self.mmmu + self.pope) / 3

    def drop(self, dense: "PaperScores") -> dict[str, float]:
        """Return the loss against the dense model as a fraction of its score, by column and for the average.

        A column on which the dense model scores 0 is left out.
        """
        pairs = [(f.name, getattr(self, f.name), getattr(dense, f.name)) for f in fields(self)]
        return {n: 1 - own / full for n, own, full in [*pairs, ("average", self.average, dense.average)] if full}


def has_all(results: Results) -> bool:
    """Whether the results hold all that Table 1 needs."""
    found = {(result.task, metric) for result in results.tasks for metric in result.metrics}
    return all((task, metric) in found for task, metric, _ in COLUMNS.values())


def paper_table(rows: Mapping[str, PaperScores], dense: PaperScores | None = None) -> str:
    """Print Table 1 in Markdown: a row per model, the loss against the dense model in brackets.

    Args:
        rows (`Mapping[str, PaperScores]`): scores by name of the model.
        dense (`PaperScores`, *optional*): of the dense model; without it no losses are printed.

    Raises:
        InvalidInputError: if there is no row.
    """
    if not rows:
        raise InvalidInputError("There is no model to print. Pass at least one row.")
    lines = [f"| model | {' | '.join(HEADINGS)} | Avg |", "|---|" + "---:|" * (len(HEADINGS) + 1)]
    for name, scores in rows.items():
        lost = {} if dense is None or scores == dense else scores.drop(dense)
        cells = [_cell(value, lost.get(f.name)) for f, value in zip(fields(scores), astuple(scores), strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} | {_cell(scores.average, lost.get('average'))} |")
    return "\n".join(lines)


def _cell(value: float, lost: float | None) -> str:
    return f"{value:.2f}" if lost is None else f"{value:.2f} ({lost:.1%})"
