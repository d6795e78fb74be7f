"""Additive allocation: single-layer probes and dynamic programming give a plan for every target at once.

Symbols: L = decoder layers, P = probed ratios, T = targets, n_l = dense width of layer l, D_l(r) = damage when layer l
alone is pruned, at ratio r.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_lop.errors import InfeasibleBudgetError, InvalidInputError

Floats = NDArray[np.float64]


def additive_plans(
    damage: ArrayLike,
    probe_ratios: ArrayLike,
    dense_widths: Sequence[int] | NDArray[np.int64],
    targets: Sequence[float] | Floats,
    *,
    around: ArrayLike | None = None,
    context: float = 0.5,
    step: float = 0.025,
    max_ratio: float | None = None,
) -> Floats:
    """Minimise the summed single-layer damage, for every target from one table.

    D_l is 0 at ratio 0, and its square root linear between probes: between straight lines of damage the best plan would
    cut every layer to a probed ratio and none in between. Before that its running maximum is taken, so that noise in a
    probe never makes removing more look better than removing less. Neurons are removed in quanta of `step` times the
    width of the narrowest layer (or an eighth of the mean width if that is more, which bounds the table). On that grid
    dynamic programming is exact, and the neurons a plan removes differ from its target by at most half a quantum.

    What the neurons of a layer are worth changes once other layers are cut. With `around`, damage is known in the dense
    model and in one whose other layers are all cut to `context`. On the way from the dense model to a target R the others
    are cut to R / 2 on average; damage is taken to grow linearly between the two: (1 - s) D_l + s D_l', where
    s = min(1, R / (2 context)).

    Args:
        damage: Loss (or divergence) above the dense model when one layer alone is pruned, `[L, P]` float.
        probe_ratios: The ratios that were probed, `[P]` float, increasing, in (0, 1].
        dense_widths: Dense widths `[L]` int, in neurons.
        targets: Target ratios `[T]` float in [0, 1): fraction of all FFN neurons to remove.
        around: The same as `damage` where all other layers are cut to `context`, `[L, P]` float.
        context: The pruning ratio of all other layers in `around`, in (0, 1).
        step: Resolution of the layer ratios when all dense widths are equal, in (0, 1).
        max_ratio: Highest ratio of any layer, at most the highest probed one; by default that, but no more than 0.95.

    Returns:
        Layer ratios `[T, L]` float64.

    Raises:
        InvalidInputError: If shapes differ, or a value is not finite or outside its domain.
        InfeasibleBudgetError: If a target asks for more than `max_ratio` in every layer.

    Source: the additive approximation of depth-wise operation pruning (DOP), applied to FFN widths.
    """
    probes, dense, goals = (np.asarray(values, dtype=np.float64) for values in (probe_ratios, dense_widths, targets))
    losses = np.asarray(damage, dtype=np.float64)
    within = losses if around is None else np.asarray(around, dtype=np.float64)
    _check((losses, within), probes, dense, goals, step, context)
    limit = min(float(probes[-1]), 0.95) if max_ratio is None else max_ratio
    if not 0 < limit <= probes[-1]:
        raise InvalidInputError(f"max_ratio is {limit}; it must lie in (0, {probes[-1]:g}], the probed range.")

    # Layer l may lose j = 0, 1, ... counts_l quanta; a target R loses `removed` of them in all layers together.
    quantum = step * max(dense.min(), dense.mean() / 8)
    # The small constant keeps a count that is whole in exact arithmetic, such as 0.3 / 0.1, from falling below it.
    counts = (limit * dense / quantum + 1e-9).astype(np.int64)
    removed = np.rint(goals * dense.sum() / quantum).astype(np.int64)
    if removed.max() > counts.sum():
        raise InfeasibleBudgetError(
            f"Target ratio {goals.max():g} is out of reach: with at most {limit:g} of any layer removed the highest "
            f"target is {counts.sum() * quantum / dense.sum():.4g}. Lower the target, or probe higher ratios."
        )
    grids = [np.arange(count + 1) * quantum / width for count, width in zip(counts, dense, strict=True)]
    alone, among = (_curves(found, probes, grids) for found in (losses, within))
    # s = min(1, R / (2 context)); the damage that a target sees is (1 - s) D_l + s D_l'
    shares = np.minimum(1, goals / (2 * context)) if around is not None else np.zeros(goals.size)
    chosen = np.empty((goals.size, dense.size), dtype=np.int64)
    for share in np.unique(shares):  # one table serves all targets that see the same damage
        options = [(1 - share) * one + share * other for one, other in zip(alone, among, strict=True)]
        chosen[shares == share] = _allocate(options, removed[shares == share])
    plans: Floats = np.minimum(chosen * quantum / dense, limit)
    return plans


def additive_damage(
    damage: ArrayLike,
    probe_ratios: ArrayLike,
    dense_widths: Sequence[int] | NDArray[np.int64],
    layer_ratios: ArrayLike,
    *,
    around: ArrayLike | None = None,
    context: float = 0.5,
) -> float:
    """Return what one plan costs by the model of [`additive_plans`]: an estimate from probes, nothing is run.

    Args:
        damage: See `additive_plans`, `[L, P]` float.
        probe_ratios: The ratios that were probed, `[P]` float.
        dense_widths: Dense widths `[L]` int, in neurons.
        layer_ratios: The plan, `[L]` float; a layer cut further than was probed counts as the highest probe.
        around: See `additive_plans`, `[L, P]` float.
        context: See `additive_plans`.

    Raises:
        InvalidInputError: If shapes differ, or a value is not finite or outside its domain.
    """
    probes, dense, plan = (
        np.asarray(values, dtype=np.float64) for values in (probe_ratios, dense_widths, layer_ratios)
    )
    losses = np.asarray(damage, dtype=np.float64)
    within = losses if around is None else np.asarray(around, dtype=np.float64)
    if plan.shape != dense.shape:
        raise InvalidInputError(f"layer_ratios has shape {plan.shape}; pass one ratio per layer, [{dense.size}].")
    target = np.array([(plan * dense).sum() / dense.sum()])
    _check((losses, within), probes, dense, target, 0.5, context)
    share = min(1.0, float(target[0]) / (2 * context)) if around is not None else 0.0
    alone, among = (
        np.concatenate(_curves(found, probes, [np.array([r]) for r in plan])) for found in (losses, within)
    )
    return float(((1 - share) * alone + share * among).sum())


def _curves(damage: Floats, probes: Floats, grids: list[Floats]) -> list[Floats]:
    """Damage of every layer at the ratios of its grid, from probes `[L, P]`."""
    rising = np.maximum.accumulate(np.pad(damage, ((0, 0), (1, 0))), axis=1)
    knots = np.pad(probes, (1, 0))
    # sqrt(D) is linear between probes, so D is convex there and splits between layers pay
    return [np.interp(grid, knots, np.sqrt(row)) ** 2 for grid, row in zip(grids, rising, strict=True)]


def _allocate(options: list[Floats], totals: NDArray[np.int64]) -> NDArray[np.int64]:
    """Choose entries j_l of `options[l]` that add up to each of `totals` `[T]` at the least damage: `[T, L]`."""
    # best_l(s) = min_j best_{l-1}(s - j) + D_l(j), best_0 = 0 at s = 0 only
    size = int(totals.max()) + 1
    best = np.full(size, np.inf)
    best[0] = 0.0
    choices = []
    for option in options:
        padded = np.concatenate([np.full(option.size - 1, np.inf), best])
        # Row s, entry j: the best sum of the earlier layers for s - j, plus this layer's damage at j.
        sums = np.lib.stride_tricks.sliding_window_view(padded, option.size)[:, ::-1] + option
        choices.append(sums.argmin(axis=1))
        best = sums[np.arange(size), choices[-1]]
    left = totals.copy()  # backwards: layer l took the j that best_l chose, the earlier layers the rest
    chosen = np.empty((totals.size, len(options)), dtype=np.int64)
    for layer in reversed(range(len(options))):
        chosen[:, layer] = choices[layer][left]
        left -= chosen[:, layer]
    return chosen


def _check(
    tables: tuple[Floats, Floats], probes: Floats, dense: Floats, targets: Floats, step: float, context: float
) -> None:
    if dense.ndim != 1 or not dense.size or not (dense >= 1).all():
        raise InvalidInputError(f"dense_widths is {dense}; pass one positive width per layer.")
    if probes.ndim != 1 or not probes.size or not (np.diff(probes, prepend=0.0) > 0).all() or probes[-1] > 1:
        raise InvalidInputError(f"probe_ratios is {probes}; pass increasing ratios in (0, 1].")
    for name, found in zip(("damage", "around"), tables, strict=True):
        if found.shape != (dense.size, probes.size) or not np.isfinite(found).all():
            raise InvalidInputError(
                f"{name} has shape {found.shape}; pass finite [{dense.size}, {probes.size}] numbers."
            )
    if targets.ndim != 1 or not targets.size or not ((targets >= 0) & (targets < 1)).all():
        raise InvalidInputError(f"targets is {targets}; pass at least one target ratio in [0, 1).")
    if not 0 < step < 1:
        raise InvalidInputError(f"step is {step}; it must lie in (0, 1).")
    if not 0 < context < 1:
        raise InvalidInputError(f"context is {context}; it must lie in (0, 1).")
