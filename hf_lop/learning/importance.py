"""How much a neuron matters: the paper's criterion and those of the methods it is compared with.

W is the weight of an FFN's output projection, `[d, n]`; for the statistics see `hf_lop.learning.statistics`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hf_lop.errors import InvalidInputError
from hf_lop.learning.statistics import Statistics
from hf_lop.units.slice import output_weight
from hf_lop.units.unit import Unit


@dataclass(frozen=True, slots=True)
class Criterion:
    """One way to score neurons.

    Attributes:
        score: maps (W `[d, n] float32`, statistics) to scores `[n] float32`, higher is more important.
        needs_data (`bool`): whether it reads activation statistics.
        formula (`str`): the score of neuron j.
        citation (`str`): where it comes from.
    """

    score: Callable[[torch.Tensor, Statistics], torch.Tensor]
    needs_data: bool
    formula: str
    citation: str


def _wifn(weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    return weight.abs().mean(0) * statistics.square.sqrt()


_LOP = "LOP (arXiv 2506.12826)"
_FLAP = "FLAP (arXiv 2312.11983)"

CRITERIA = {
    "l2": Criterion(lambda w, s: s.norm, True, "mean_s ||x_{s,:,j}||_2", f"{_LOP}, Eq. 25"),
    "wanda": Criterion(_wifn, True, "mean_i |W_ij| * sqrt(q_j)", "Wanda (arXiv 2306.11695), by columns as Wanda-sp"),
    "wifv": Criterion(lambda w, s: s.fluctuation * w.square().sum(0), True, "v_j * ||W_{:,j}||_2^2", _FLAP),
    "wifn": Criterion(_wifn, True, "mean_i |W_ij| * sqrt(q_j)", _FLAP),
    "ifv": Criterion(lambda w, s: s.fluctuation, True, "v_j", _FLAP),
    "magnitude": Criterion(lambda w, s: w.norm(dim=0), False, "||W_{:,j}||_2", f"{_FLAP}, Magnitude-sp"),
}


def unit_importance(
    model: nn.Module,
    units: Sequence[Unit],
    criterion: str,
    statistics: Sequence[Statistics] | None = None,
    *,
    weights: Callable[[Unit], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Score every piece of every unit: each of its entries by the criterion, then their sum.

    Args:
        model (`nn.Module`): the dense model.
        units (`Sequence[Unit]`): its units.
        criterion (`str`): one of `CRITERIA`.
        statistics (`Sequence[Statistics]`, *optional*): one per layer; not needed for "magnitude".
        weights (`Callable`, *optional*): gives the output projection `[d, n]` of a unit, where the model has it not.

    Returns:
        `list[torch.Tensor]`: one `[n] float32` per layer on the CPU; higher is more important.

    Raises:
        InvalidInputError: if the criterion is unknown, its statistics are missing, or a score is not finite.
    """
    if criterion not in CRITERIA:
        raise InvalidInputError(f"criterion is {criterion!r}; choose one of {', '.join(CRITERIA)}.")
    chosen = CRITERIA[criterion]
    if chosen.needs_data and statistics is None:
        raise InvalidInputError(
            f"criterion {criterion!r} needs activation statistics. Pass collect_statistics(model, batches)."
        )
    scores = []
    weights = weights or partial(output_weight, model)
    for layer, unit in enumerate(units):
        weight = weights(unit).float().cpu() if criterion not in ("l2", "ifv") else torch.empty(0)
        nothing = torch.empty(0)
        measured = statistics[layer] if statistics is not None else Statistics(nothing, nothing, nothing, nothing)
        score = chosen.score(weight, measured).float()
        if not score.isfinite().all():
            raise InvalidInputError(
                f"The criterion {criterion!r} gives layer {layer} scores that are not finite, by which nothing can be ordered. Look "
                f"for NaN or infinity in {unit.output.module} and in the statistics."
            )
        scores.append(score if unit.block == 1 else score.view(unit.count, unit.block).sum(1))
    return scores


def neuron_order(scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Order the neurons of each layer from most to least important; equal scores keep their order.

    Args:
        scores (`Sequence[torch.Tensor]`): one `[n]` per layer.

    Returns:
        `list[torch.Tensor]`: one permutation `[n] int64` per layer.
    """
    return [torch.argsort(score, descending=True, stable=True) for score in scores]
