"""The methods a pruner can cut by: its own prediction, and the baselines it is compared with, from the same statistics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_lop.errors import InvalidInputError
from hf_lop.learning.config import LOPConfig
from hf_lop.learning.importance import neuron_order, unit_importance
from hf_lop.learning.learned import Learned
from hf_lop.planning.additive import additive_plans
from hf_lop.planning.baselines import global_threshold
from hf_lop.planning.budget import Floats
from hf_lop.planning.search.cmaes import CMAES
from hf_lop.planning.search.mcts import MCTS
from hf_lop.planning.table import look_up
from hf_lop.units.unit import Unit

STEP = 0.025  # resolution of additive plans, in layer ratios


@dataclass(frozen=True, slots=True)
class Method:
    """How one method fills a budget.

    Attributes:
        criterion (`str`, *optional*): importance criterion; None for the pruner's own neuron order.
        widths (`str`): how the widths come about, for cards.
        citation (`str`): where the method comes from.
    """

    criterion: str | None
    widths: str
    citation: str


METHODS = {
    "lop": Method(None, "predicted for the budget", "LOP (arXiv 2506.12826), Sec. 4.3"),
    "additive": Method(
        None, "the least summed damage of single-layer probes", "operation pruning (DOP), for FFN widths"
    ),
    "mcts": Method(None, "those of the tree search, interpolated between its targets", MCTS.citation),
    "cmaes": Method(None, "those of CMA-ES, interpolated between its targets", CMAES.citation),
    "uniform": Method(None, "the same share of every layer", "baseline"),
    "magnitude": Method("magnitude", "the same share of every layer", "FLAP (arXiv 2312.11983), Magnitude-sp"),
    "wanda": Method("wanda", "the same share of every layer", "Wanda (arXiv 2306.11695), by columns as Wanda-sp"),
    "flap": Method("wifv", "one threshold on standardised scores of all layers", "FLAP (arXiv 2312.11983), no bias"),
}


def check_method(name: str, config: LOPConfig | None = None) -> None:
    """Refuse a name that is no method, or one that a pruner was not fitted for.

    Args:
        name (`str`): the method.
        config (`LOPConfig`, *optional*): of the pruner.

    Raises:
        InvalidInputError: if it is not in `METHODS`, or the pruner has no table or probes for it.
    """
    if name == "table":
        raise InvalidInputError(
            'method="table" is gone: name the search whose plans you mean, "additive", "mcts" or "cmaes", or use "lop", which '
            "predicts from them."
        )
    if name not in METHODS:
        raise InvalidInputError(f"method is {name!r}; choose one of {', '.join(METHODS)}.")
    if config is None:
        return
    if (
        name in ("additive", "mcts", "cmaes")
        and not config.table_of(name)
        and not (name == "additive" and config.probes)
    ):
        found = (config.calibration or {}).get("search", "no search that is known")
        raise InvalidInputError(
            f"This pruner has no plans of {name}: it was fitted with {found}. Fit one with "
            f'LOPPruner.fit(..., search="{name}"), or hf-lop fit --search {name}; or use another method.'
        )


def usable_methods(config: LOPConfig) -> list[str]:
    """Return the methods that a pruner can cut by."""
    return [name for name in METHODS if _usable(name, config)]


def cold_seconds(name: str, config: LOPConfig) -> float | None:
    """Return what a pruner spent before a method could plan its first target, or None where that was not recorded.

    Calibration where the method reads statistics or the pruner's neuron order, probes and search where its plans come from
    them, and the predictor's training.
    """
    made = config.calibration or {}
    spent = made.get("seconds")
    if name == "magnitude":
        return 0.0
    if spent is None:
        return None
    own = [] if made.get("search") == "additive" else [made.get("search")]
    phases: dict[str, list[Any]] = {
        "lop": ["probes", *own, "predictor"],
        "additive": ["probes"],
    }
    phases |= {search: ["probes", search] for search in ("mcts", "cmaes")}
    return float(sum(spent.get(phase, 0.0) for phase in ["calibration", *phases.get(name, [])]))


def _usable(name: str, config: LOPConfig) -> bool:
    try:
        check_method(name, config)
    except InvalidInputError:
        return False
    return True


def _additive(config: LOPConfig, ratio: float) -> Floats:
    """Plan one target from the probes that a pruner keeps; a target beyond them is left to the projection."""

    def plans(damage: Any, probed: Any, **others: Any) -> Floats:
        highest = min(probed[-1], 0.95) - STEP  # whole steps reach at least this
        goals = [max(0.0, min(ratio, highest))]
        return additive_plans(damage, probed, config.size.widths, goals, step=STEP, **others)

    found: Floats = config.with_probes(plans)[0]
    return found


def choose(
    name: str,
    config: LOPConfig,
    learned: Learned,
    predict: Callable[[float], Floats],
    model: nn.Module,
    units: Sequence[Unit],
    weights: Callable[[Unit], torch.Tensor] | None = None,
) -> tuple[Callable[[float], Floats], list[torch.Tensor]]:
    """Return what a method needs to fill a budget: layer ratios for a target ratio, and an order of the pieces.

    Args:
        name (`str`): one of `METHODS`.
        config (`LOPConfig`): of the pruner; its tables and probes are used.
        learned (`Learned`): order and statistics of the model; no data is needed.
        predict (`Callable`): the pruner's predictor, from a target ratio to layer ratios `[L]`.
        model (`nn.Module`): the model to cut; some criteria read its weights.
        units (`Sequence[Unit]`): its L units.
        weights (`Callable`, *optional*): gives the output projection `[d, n]` of a unit, where the model has it not.

    Returns:
        `tuple`: a callable from target ratio to layer ratios `[L] float64`, and one `[n] int64` per unit.

    Raises:
        InvalidInputError: if there is no such method, or the pruner was not fitted for it.
    """
    check_method(name, config)
    criterion = METHODS[name].criterion
    if criterion is None:
        rules: dict[str, Callable[[float], Floats]] = {"lop": predict, "uniform": lambda r: np.full(len(units), r)}
        for search in ("additive", "mcts", "cmaes"):
            rules[search] = partial(look_up, config.table_of(search) or [], layers=len(units))
        if config.probes:
            rules["additive"] = partial(_additive, config)
        return rules[name], learned.checked_order()
    scores = unit_importance(model, units, criterion, learned.statistics, weights=weights)
    order = neuron_order(scores)
    if name == "flap":
        there, dense = np.array([unit.count for unit in units]), np.array(learned.size.widths)

        # Scores are of the pieces that are there, ratios count from the dense ones.
        def threshold(ratio: float) -> Floats:
            gone = max(0.0, 1 - (1 - ratio) * dense.sum() / there.sum())
            kept: Floats = (1 - global_threshold([score.numpy() for score in scores], gone)) * there / dense
            return 1 - kept

        return threshold, order
    return lambda ratio: np.full(len(units), ratio), order
