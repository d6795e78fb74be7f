"""The methods a pruner can cut by: its own prediction, and the baselines it is compared with, from the same statistics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from hf_lop.allocation import global_threshold
from hf_lop.allocation.budget import Floats
from hf_lop.errors import InvalidInputError
from hf_lop.ffn.importance import neuron_importance, neuron_order
from hf_lop.modeling_lop import FFN

if TYPE_CHECKING:
    from hf_lop.pruner import LOPPruner


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
    "table": Method(None, "those of the search, interpolated between its targets", "LOP (arXiv 2506.12826), Sec. 4.2"),
    "uniform": Method(None, "the same share of every layer", "baseline"),
    "magnitude": Method("magnitude", "the same share of every layer", "FLAP (arXiv 2312.11983), Magnitude-sp"),
    "wanda": Method("wanda", "the same share of every layer", "Wanda (arXiv 2306.11695), by columns as Wanda-sp"),
    "flap": Method("wifv", "one threshold on standardised scores of all layers", "FLAP (arXiv 2312.11983), no bias"),
}


def check_method(name: str) -> None:
    """Refuse a name that is no method.

    Raises:
        InvalidInputError: if it is not in `METHODS`.
    """
    if name not in METHODS:
        raise InvalidInputError(f"method is {name!r}; choose one of {', '.join(METHODS)}.")


def choose(
    name: str, pruner: "LOPPruner", model: nn.Module, ffns: Sequence[FFN]
) -> tuple[Callable[[float], Floats], list[torch.Tensor]]:
    """Return what a method needs to fill a budget: layer ratios for a target ratio, and a neuron order.

    Args:
        name (`str`): one of `METHODS`.
        pruner (`LOPPruner`): its predictor, table, order and statistics are used; no data is needed.
        model (`nn.Module`): the dense model; some criteria read its weights.
        ffns (`Sequence[FFN]`): its L FFNs.

    Returns:
        `tuple`: a callable from target ratio to layer ratios `[L] float64`, and one `[n] int64` per layer.

    Raises:
        InvalidInputError: if there is no such method, or the pruner has no table for "table".
    """
    check_method(name)
    criterion = METHODS[name].criterion
    if criterion is None:
        rules = {"lop": pruner.predict, "table": pruner.look_up, "uniform": lambda ratio: np.full(len(ffns), ratio)}
        return rules[name], pruner.order()
    scores = neuron_importance(model, ffns, criterion, pruner.statistics())
    order = neuron_order(scores)
    if name == "flap":
        return lambda ratio: global_threshold([score.numpy() for score in scores], ratio), order
    return lambda ratio: np.full(len(ffns), ratio), order
