"""The pruners of a comparison: one per draw of the data, with the plans of several searches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from hf_lop.files import write_whole
from hf_lop.learning.processes import launched
from hf_lop.planning.blocks import AUTO
from hf_lop.pruner.fit import Batches
from hf_lop.pruner.pruner import LOPPruner


def fit_pruners(
    model: PreTrainedModel,
    draws: Sequence[tuple[Batches, Batches]],
    searches: Sequence[str],
    folder: str | Path,
    *,
    evaluations: int,
    round_to: int | Literal["auto"] = AUTO,
) -> list[LOPPruner]:
    """Fit one pruner per draw of the data for [`compare`][hf_lop.evaluation.comparison.compare.compare], with the plans of several searches.

    Args:
        model (`PreTrainedModel`): the dense model.
        draws (`Sequence[tuple]`): calibration and search batches, one pair per seed.
        searches (`Sequence[str]`): "additive", "mcts", "cmaes"; the predictor learns from the first.
        folder (`str` or `Path`): keeps a journal per seed and search, `fit-SEED-SEARCH`; the same call resumes there.
        evaluations (`int`): candidates that a search evaluates per target.
        round_to (`int` or `str`): see [`~LOPPruner.fit`].

    Returns:
        `list[LOPPruner]`: one per draw.
    """
    pruners = []
    for seed, (calibration, search_batches) in enumerate(draws):
        fitted: list[LOPPruner] = []
        for search in searches:
            journal, first = (Path(folder) / f"fit-{seed}-{name}" for name in (search, searches[0]))
            if fitted and launched().main and not (journal / "probes.json").exists():  # they are the same
                write_whole(journal / "probes.json", (first / "probes.json").read_bytes())
            made = LOPPruner.fit(
                model,
                calibration,
                search_batches,
                search=search,
                evaluations=evaluations,
                round_to=round_to,
                seed=seed,
                journal=journal,
            )
            fitted.append(made)
        seconds = [(made.config.calibration or {})["seconds"] for made in fitted]
        seconds[0] |= {name: spent.get(name, 0.0) for name, spent in zip(searches, seconds, strict=True)}
        tables = {name: made.config.search_table for name, made in zip(searches, fitted, strict=True)}
        fitted[0].config.other_tables = {name: tables[name] for name in searches[1:]}
        pruners.append(fitted[0])
    return pruners
