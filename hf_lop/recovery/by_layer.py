"""Recovery: the output projection of a cut FFN takes over what the removed neurons did.

W `[d, n]` is the output projection, x `[n]` its input, K the kept and P the removed neurons. Only W_K changes: no shape, no
architecture, no bias.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hf_lop.errors import InvalidInputError
from hf_lop.learning.statistics import Statistics
from hf_lop.recovery.solve import DAMPING, check_damping, check_finite, fold, in_blocks, solve_lstsq, solve_sketch
from hf_lop.units.slice import check_kept, output_weight
from hf_lop.units.unit import Unit


def recover_lstsq(
    model: nn.Module,
    units: Sequence[Unit],
    kept: Sequence[torch.Tensor],
    moments: Iterable[torch.Tensor],
    *,
    damping: float = DAMPING,
) -> list[torch.Tensor]:
    """Fit the output projection of every FFN to its dense output, by damped least squares on calibration activations.

    With G = X^T X over all calibration tokens and D = diag(G_KK),

        W'_K = W_K + W_P G_PK (G_KK + damping D)^-1

    minimises ||W X^T - W'_K X_K^T||^2 + damping sum_{j in K} G_jj ||w'_j - w_j||^2: every column may leave its dense value
    as far as its neuron's own scale allows, and where nothing was removed nothing changes. (Damping by a common
    lambda ||W'_K||^2 instead, W'_K = W G_{:,K} (G_KK + lambda I)^-1, draws all columns to zero.) Solved by Cholesky
    factors in float64.

    Every layer is fitted by itself on the dense model's activations, so that one pass over the data serves any number of
    plans. Fitting them in turn is better for one plan, see `recover_in_turn` in hf_lop.recovery.in_turn.

    Only reads the model, so that it is used before slicing:

        weights = recover_lstsq(model, units, kept, second_moments(model, batches, units))
        set_output_weights(model, slice_units(model, kept), weights)

    Memory: for one layer at a time G, and 8 (2 k^2 + n k) bytes; for all layers the result.

    Args:
        model (`nn.Module`): the dense model.
        units (`Sequence[Unit]`): its L FFNs.
        kept (`Sequence[torch.Tensor]`): the neurons to keep, one `[k] int64` per layer, in any order.
        moments (`Iterable[torch.Tensor]`): G of every layer in order, `[n, n] float32`, see [`second_moments`].
        damping (`float`): above 0; the share by which the diagonal of G_KK is raised. The default suits some ten tokens per
            kept neuron or more; with fewer, more damping generalises better.

    Returns:
        `list[torch.Tensor]`: W'_K of every layer, `[d, k]` in the dtype and on the device of W, its columns in ascending
        order of the kept neurons.

    Raises:
        InvalidInputError: if the kept neurons or moments do not fit the model, damping is not above 0, or moments are not
            finite.

    Source:
        Týr-the-Pruner (arXiv 2503.09657), OSSCAR (arXiv 2403.12983): the same regression on removed input columns.
    """
    check_damping(damping)
    weights = []
    ordered = check_kept(units, kept)
    layers = iter(moments)
    for layer, (unit, indices) in enumerate(zip(units, ordered, strict=True)):
        gram = next(layers, None)
        if gram is None or tuple(gram.shape) != (unit.features, unit.features):
            found = "missing" if gram is None else f"of shape {tuple(gram.shape)}"
            raise InvalidInputError(
                f"The second moments of layer {layer} are {found}; its FFN has {unit.features} neurons. Collect them with "
                "second_moments(...) on this model."
            )
        weight = output_weight(model, unit)
        removed = len(indices) < unit.count
        fitted = solve_lstsq(weight, gram, unit.columns(indices), damping) if removed else weight.clone()
        weights.append(check_finite(layer, fitted))
    return weights


def recover_sketch(
    model: nn.Module,
    units: Sequence[Unit],
    kept: Sequence[torch.Tensor],
    directions: Sequence[torch.Tensor],
    squares: Sequence[torch.Tensor],
    *,
    damping: float = DAMPING,
) -> list[torch.Tensor]:
    """Least squares without data, from a sketch of the second moments; see `hf_lop.learning.sketch`.

    [`recover_lstsq`] with G = B^T B + diag(square - diag(B^T B)): what the directions B `[r, n]` leave unexplained of a
    neuron counts as its own, unknown to all others. With E = diag(square - diag(B^T B)) + damping diag(square),

        W'_K = W_K + W_P B_P^T (I + B_K E_K^-1 B_K^T)^-1 B_K E_K^-1

    which needs the solution of r equations only, so a layer takes 2 n d r + 4 k r^2 operations. In float64, but for products with
    a W of 16 bits: those are in float32.

    Args:
        model (`nn.Module`): the dense model; only read.
        units (`Sequence[Unit]`): its L FFNs.
        kept (`Sequence[torch.Tensor]`): the neurons to keep, one `[k] int64` per layer, in any order.
        directions (`Sequence[torch.Tensor]`): B of every layer, `[r, n] float32`.
        squares (`Sequence[torch.Tensor]`): the diagonal of G of every layer, `[n] float32`.
        damping (`float`): above 0; as of `recover_lstsq`.

    Returns:
        `list[torch.Tensor]`: W'_K of every layer, as of `recover_lstsq`.

    Raises:
        InvalidInputError: if the kept neurons or the sketch do not fit the model, damping is not above 0, or the sketch is
            not finite.
    """
    check_damping(damping)
    shapes = [(sketch.shape[-1], len(square)) for sketch, square in zip(directions, squares, strict=False)]
    if len(directions) != len(units) or shapes != [(unit.features, unit.features) for unit in units]:
        raise InvalidInputError("The sketch belongs to another model. Use the pruner that was made for this one.")
    weights = []
    for layer, (unit, indices) in enumerate(zip(units, check_kept(units, kept), strict=True)):
        columns = unit.columns(indices)
        fitted = solve_sketch(output_weight(model, unit), directions[layer], squares[layer], columns, damping)
        weights.append(check_finite(layer, fitted, sketched=True))
    return weights


def recover_fold(
    model: nn.Module, units: Sequence[Unit], kept: Sequence[torch.Tensor], statistics: Sequence[Statistics]
) -> list[torch.Tensor]:
    """Fold the mean of what the removed neurons did into the kept ones; needs no data beyond stored statistics.

    W'_K = W_K + b a^T with b = sum_{j in P} mu_j W_{:,j}, the mean output of the removed neurons, and
    a = (mu_K / v_K) / (mu_K . (mu_K / v_K)), which meets a . mu_K = 1, so that the mean output is exact, and of all such
    vectors adds the least variance where neurons are uncorrelated. Used as [`recover_lstsq`].

    Args:
        model (`nn.Module`): the dense model; only read.
        units (`Sequence[Unit]`): its L FFNs.
        kept (`Sequence[torch.Tensor]`): the neurons to keep, one `[k] int64` per layer, in any order.
        statistics (`Sequence[Statistics]`): of every layer; `mean` is mu, `fluctuation` is v, whose unit cancels.

    Returns:
        `list[torch.Tensor]`: W'_K of every layer, as of [`recover_lstsq`].

    Raises:
        InvalidInputError: if the kept neurons or the statistics do not fit the model.
    """
    weights = []
    check_statistics(units, statistics)
    for unit, indices, measured in zip(units, check_kept(units, kept), statistics, strict=True):
        weights.append(in_blocks(fold(unit.columns(indices), measured), output_weight(model, unit)))
    return weights


def check_statistics(units: Sequence[Unit], statistics: Sequence[Statistics]) -> None:
    """Refuse statistics of another model."""
    if len(statistics) != len(units) or any(
        len(s.mean) != f.features for s, f in zip(statistics, units, strict=False)
    ):
        raise InvalidInputError(
            "The statistics belong to another model. Collect them with collect_statistics(model, ...)."
        )


def set_output_weights(model: nn.Module, units: Sequence[Unit], weights: Sequence[torch.Tensor]) -> None:
    """Write output projections into a model that was cut to their widths.

    Args:
        model (`nn.Module`): the pruned model; changed in place.
        units (`Sequence[Unit]`): its FFNs as [`slice_units`] returned them.
        weights (`Sequence[torch.Tensor]`): `[d, k]` per layer, columns in ascending order of the kept neurons.

    Raises:
        InvalidInputError: if a shape does not fit; then nothing was changed.
    """
    places = [output_weight(model, unit) for unit in units]
    for layer, (place, weight) in enumerate(zip(places, weights, strict=True)):
        if place.shape != weight.shape:
            raise InvalidInputError(
                f"Layer {layer} has an output projection {tuple(place.shape)}, the recovered weight is "
                f"{tuple(weight.shape)}. Slice the model to the same kept neurons first."
            )
    with torch.no_grad():
        for place, weight in zip(places, weights, strict=True):
            place.copy_(weight)
