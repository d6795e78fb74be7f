"""The pruner of a model whose neurons were sorted: it knows the same about them, in their new order."""

import copy
import hashlib
from typing import TYPE_CHECKING, Any

import torch

from hf_lop.learning.statistics import Statistics

if TYPE_CHECKING:
    from hf_lop.pruner.pruner import LOPPruner


def order_digest(pruner: "LOPPruner") -> str:
    """Return the SHA-256 of a pruner's neuron order, by which a sorted model and its pruner know each other."""
    numbers = torch.cat(pruner.order()).numpy().astype("<u4")
    return hashlib.sha256(numbers.tobytes()).hexdigest()


def sorted_twin(pruner: "LOPPruner") -> "LOPPruner":
    """Return the pruner of the model that has its neurons sorted by this pruner's order.

    Raises:
        CheckpointMismatchError: if the order is damaged.
    """
    digest, order = order_digest(pruner), pruner.order()
    starts = torch.tensor([0, *(len(indices) for indices in order)]).cumsum(0)
    index = torch.cat([indices + start for indices, start in zip(order, starts, strict=False)])
    twin = copy.deepcopy(pruner)
    twin.neuron_order.copy_(torch.cat([torch.arange(len(indices)) for indices in order]).to(torch.uint16))
    per_neuron = [*Statistics.__slots__, *(("sketch_scale", "sketch") if pruner.config.sketch_rows else ())]
    for name in per_neuron:
        values = getattr(pruner, name).view(len(index), -1)
        getattr(twin, name).copy_(values.index_select(0, index.to(values.device)).flatten())
    twin.config.sorted_by = digest
    return twin


def twin_for(pruner: "LOPPruner", model: Any) -> "LOPPruner":
    """Return the pruner to use on a model: the sorted twin where the model was sorted by this very pruner."""
    mark = getattr(model.config, "elastic_config", None)
    if not isinstance(mark, dict) or pruner.config.sorted_by or mark.get("order") != order_digest(pruner):
        return pruner
    return sorted_twin(pruner)
