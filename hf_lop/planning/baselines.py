"""Allocations without a search: the same ratio everywhere, and FLAP's global threshold.

Symbols: L = decoder layers, n_l = dense width of layer l (neurons).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_lop.errors import InvalidInputError
from hf_lop.planning.budget import Floats
from hf_lop.planning.search.space import SearchSpace


def uniform(dense_widths: Sequence[int] | NDArray[np.int64], target: float) -> Floats:
    """Remove the same ratio from every layer, to the neuron.

    Args:
        dense_widths: Dense widths `[L]` int, in neurons.
        target: Fraction of all neurons to remove, in [0, 1).

    Returns:
        Layer ratios `[L]` float64: all `target`, up to the one neuron by which whole neurons may differ from it.

    Raises:
        InvalidInputError: If a value is outside its domain.
        InfeasibleBudgetError: If less than one neuron per layer would be left.
    """
    space = SearchSpace(tuple(np.asarray(dense_widths).tolist()), target, max_ratio=1.0)
    return space.project(np.full(len(space.dense_widths), target))


def global_threshold(scores: Sequence[ArrayLike], target: float) -> Floats:
    """Remove the neurons whose standardised scores are lowest over all layers: FLAP's AL-AM for FFN neurons only.

    z = (score - mean) / std over the neurons of a layer, std unbiased (0 where all scores of a layer are equal). Exactly
    the target's number of neurons goes, lowest z first (ties: lower layer, then lower neuron first), except that the
    best neuron of each layer stays, as FLAP's threshold could remove a whole layer.

    Args:
        scores: Score of every neuron, one `[n_l]` float per layer; higher is more important.
        target: Fraction of all neurons to remove, in [0, 1).

    Returns:
        Layer ratios `[L]` float64.

    Raises:
        InvalidInputError: If a score is not finite, a layer is empty, or the target is outside [0, 1).
        InfeasibleBudgetError: If less than one neuron per layer would be left.

    Source: FLAP (arXiv 2312.11983), adaptive structure search; LOP (arXiv 2506.12826), its FLAP baseline.
    """
    layers = [np.asarray(layer, dtype=np.float64) for layer in scores]
    for index, layer in enumerate(layers):
        if layer.ndim != 1 or not layer.size or not np.isfinite(layer).all():
            raise InvalidInputError(f"Scores of layer {index} have shape {layer.shape}; pass finite numbers [n].")
    if not layers:
        raise InvalidInputError("scores is empty; pass one vector of scores per layer.")
    dense = np.array([layer.size for layer in layers])
    kept = SearchSpace(tuple(dense.tolist()), target, max_ratio=1.0).kept
    standardised = [_standardise(layer) for layer in layers]
    for values in standardised:
        values[values.argmax()] = np.inf
    order = np.argsort(np.concatenate(standardised), kind="stable")
    layer_of = np.repeat(np.arange(dense.size), dense)
    removed = np.bincount(layer_of[order[: dense.sum() - kept]], minlength=dense.size)
    ratios: Floats = removed / dense
    return ratios


def _standardise(scores: Floats) -> Floats:
    deviation = scores.std(ddof=1) if scores.size > 1 else 0.0
    centred: Floats = scores - scores.mean()
    return centred / deviation if deviation > 0 else np.zeros_like(scores)
