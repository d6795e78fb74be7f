"""The candidates of a search for one target: layer ratios in whole blocks of neurons that remove exactly the target.

Symbols: L = decoder layers, n_l = dense width of layer l (neurons), k_l = its kept neurons, r_l = 1 - k_l / n_l, R = target.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_lop.errors import InfeasibleBudgetError, InvalidInputError
from hf_lop.planning.budget import Floats, Widths, project, water_fill


def project_ratios(
    ratios: ArrayLike, dense_widths: Sequence[int] | NDArray[np.int64], target: float, *, max_ratio: ArrayLike = 0.95
) -> Floats:
    """Find the nearest layer ratios whose neuron-weighted mean is the target.

    Nearest in sum(n_l * difference_l^2), under 0 <= r_l <= max_ratio. The solution shifts all ratios by one common
    offset and clips them, so it is exact.

    Args:
        ratios: Any finite numbers `[L]` float; they may lie outside [0, 1].
        dense_widths: Dense widths `[L]` int, in neurons.
        target: Fraction of all neurons to remove, in [0, 1).
        max_ratio: Highest ratio of a layer, in [0, 1]; one number or `[L]` float.

    Returns:
        Layer ratios `[L]` float64.

    Raises:
        InvalidInputError: If shapes differ, or a value is outside its domain.
        InfeasibleBudgetError: If the target asks for more than `max_ratio` in every layer.
    """
    dense, wanted = np.asarray(dense_widths, dtype=np.float64), np.asarray(ratios, dtype=np.float64)
    _check(dense, target)
    if wanted.shape != dense.shape or not np.isfinite(wanted).all():
        raise InvalidInputError(f"ratios has shape {wanted.shape}; pass {dense.size} finite numbers, one per layer.")
    limit = np.broadcast_to(np.asarray(max_ratio, dtype=np.float64), dense.shape)
    if not ((limit >= 0) & (limit <= 1)).all():
        raise InvalidInputError(f"max_ratio is {max_ratio!r}; it must lie in [0, 1].")
    if target * dense.sum() > limit @ dense * (1 + 1e-12):
        raise _out_of_reach(target, float(limit @ dense / dense.sum()))
    # In keep-fractions k = 1 - r the set is 1 - max_ratio <= k <= 1, sum(n_l k_l) = (1 - R) sum(n_l). Stationarity of
    # sum n_l (k_l - wanted_l)^2 / 2 - t sum n_l k_l gives k_l = wanted_l + t, clipped: n_l cancels, t is common.
    return 1 - water_fill(1 - wanted, 1 - limit, dense, float((1 - target) * dense.sum()))


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All layer ratios that remove the target share of neurons, in whole blocks.

    A candidate is a vector of widths: every layer keeps a multiple of `round_to` neurons (or all), at least
    1 - `max_ratio` of them and at least one block, and together they keep floor((1 - target) * sum(n_l)) neurons, the
    count that a plan for that ratio keeps (with `round_to` > 1: less by up to a block). So the mean of the ratios, weighted
    by neurons, is the target to the neuron, and equal candidates have equal widths: the key of a candidate.

    Attributes:
        dense_widths (`tuple[int, ...]`): `[L]` neurons of every layer.
        target (`float`): fraction of all neurons to remove, in [0, 1).
        max_ratio (`float`): highest ratio of any layer, in (0, 1].
        round_to (`int` or `tuple[int, ...]`): block of neurons; one for all layers, or `[L]`.

    Raises:
        InvalidInputError: If a value is outside its domain.
        InfeasibleBudgetError: If no candidate removes that much.
    """

    dense_widths: tuple[int, ...]
    target: float
    max_ratio: float = 0.95
    round_to: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        _check(np.asarray(self.dense_widths), self.target)
        if not 0 < self.max_ratio <= 1:
            raise InvalidInputError(f"max_ratio is {self.max_ratio}; it must lie in (0, 1].")
        if np.min(self.round_to) < 1:
            raise InvalidInputError(f"round_to is {self.round_to}; it must be a positive integer.")
        self.project(np.full(len(self.dense_widths), self.target))  # refuses a target that is out of reach

    @property
    def kept(self) -> int:
        """Number of neurons that every candidate keeps."""
        # Rounding keeps 1000 * (1 - 0.3) from losing a neuron to floating point.
        return math.floor(round(sum(self.dense_widths) * (1 - self.target), 6))

    def project(self, ratios: ArrayLike) -> Floats:
        """Find a candidate next to any ratios `[L]` float: their nearest point, then whole blocks. Returns `[L] float64`."""
        dense = np.asarray(self.dense_widths)
        # Least widths: whole blocks above (1 - max_ratio) n_l, at least one, at most n_l.
        size = np.asarray(self.round_to)
        blocks = np.ceil(np.round((1 - self.max_ratio) * dense, 6) / size)
        least = np.minimum(np.maximum(blocks, 1) * size, dense)
        if self.kept < least.sum():
            raise _out_of_reach(self.target, 1 - least.sum() / dense.sum())
        target = 1 - self.kept / dense.sum()
        nearest = project_ratios(ratios, self.dense_widths, target, max_ratio=1 - least / dense)
        return self.ratios(project(np.clip(nearest, 0, 1), dense, self.kept, round_to=self.round_to))

    def widths(self, ratios: Floats) -> tuple[int, ...]:
        """Return the kept neurons of a candidate `[L] float64`: its key."""
        return tuple(np.rint(np.asarray(self.dense_widths) * (1 - ratios)).astype(int).tolist())

    def ratios(self, widths: Sequence[int] | Widths) -> Floats:
        """Return the candidate, `[L] float64`, that has these widths `[L]`."""
        ratios: Floats = 1 - np.asarray(widths) / np.asarray(self.dense_widths)
        return ratios


def _check(dense: NDArray[np.generic], target: float) -> None:
    if dense.ndim != 1 or not dense.size or not (dense.astype(np.float64) >= 1).all():
        raise InvalidInputError(f"dense_widths is {dense}; pass one positive width per layer.")
    if not 0 <= target < 1:
        raise InvalidInputError(f"target is {target}; it must lie in [0, 1): the fraction of neurons to remove.")


def _out_of_reach(target: float, highest: float) -> InfeasibleBudgetError:
    return InfeasibleBudgetError(
        f"Target ratio {target:g} is out of reach: with at most max_ratio removed from each layer, and a block of round_to "
        f"neurons kept, the highest is {highest:.4g}. Lower the target, raise max_ratio, or lower round_to."
    )
