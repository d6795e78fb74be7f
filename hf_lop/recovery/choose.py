"""Which recovery to use, and what it makes of a plan."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_lop.errors import CheckpointMismatchError, InvalidInputError, UnsupportedModelError
from hf_lop.learning.statistics import Statistics
from hf_lop.recovery.by_layer import recover_fold, recover_lstsq, recover_sketch
from hf_lop.recovery.in_turn import recover_in_turn
from hf_lop.recovery.moments import second_moments
from hf_lop.recovery.solve import NewRows, RowSolver, SketchSolver, check_finite, fold
from hf_lop.units.slice import output_weight
from hf_lop.units.unit import Unit

RECOVERIES = {
    "sequential": "output projections fitted by least squares on calibration data, layer after layer",
    "lstsq": "output projections fitted by least squares on calibration data, every layer by itself",
    "sketch": "output projections fitted by least squares on the pruner's sketch of the activations",
    "fold": "the mean output of the removed neurons folded into the kept ones",
}
FROM_DATA = ("sequential", "lstsq")


def choose_recovery(recover: str | None, *, data: bool, sketch: bool) -> str | None:
    """Decide how to recover, before any work.

    | `recover` | data given | a sketch, no data | neither |
    |---|---|---|---|
    | "auto" | sequential | sketch | none |
    | "sequential", "lstsq" | as asked for | error | error |
    | "sketch" | error | sketch | error |
    | "fold", None | error | as asked for | as asked for |

    Args:
        recover (`str`, *optional*): "auto", one of `RECOVERIES`, or None.
        data (`bool`): whether the caller gives data.
        sketch (`bool`): whether the pruner has a sketch.

    Returns:
        `str`: one of `RECOVERIES`, or None.

    Raises:
        InvalidInputError: if the recovery is unknown, or needs what is not there, or data would be left unread.
    """
    if recover == "auto":
        return "sequential" if data else "sketch" if sketch else None
    if recover == "bias":
        raise InvalidInputError(
            'recover="bias" moved to the comparison, compare(..., recover=["bias"]), since a bias that is added changes the '
            'architecture; use "fold", which folds the same mean into the weights, or "sketch".'
        )
    if recover is not None and recover not in RECOVERIES:
        raise InvalidInputError(f'recover is {recover!r}; choose "auto", {", ".join(RECOVERIES)} or None.')
    if recover in FROM_DATA and not data:
        raise InvalidInputError(
            f'recover="{recover}" needs data, batches of model inputs. Pass data=..., or use recover="sketch".'
        )
    if recover not in FROM_DATA and data:
        raise InvalidInputError(f"recover={recover!r} reads no data, but data was given. Leave one of the two out.")
    if recover == "sketch" and not sketch:
        raise InvalidInputError(
            "This pruner has no sketch of the activations. Fit it anew with sketch_rows above 0, or pass data=... for "
            "least squares on data."
        )
    return recover


def recovered_weights(
    name: str | None,
    model: nn.Module,
    units: Sequence[Unit],
    kept: Sequence[torch.Tensor],
    statistics: Sequence[Statistics],
    directions: Callable[[int], torch.Tensor],
    data: Sequence[Mapping[str, Any]] = (),
    moments: Callable[[], Iterable[torch.Tensor]] | None = None,
) -> list[torch.Tensor] | None:
    """Compute a recovery from the dense model, which is only read.

    Args:
        name (`str`, *optional*): one of `RECOVERIES`, or None for none.
        model (`nn.Module`): the dense model.
        units (`Sequence[Unit]`): its L units.
        kept (`Sequence[torch.Tensor]`): the pieces to keep, one `[k] int64` per unit.
        statistics (`Sequence[Statistics]`): `[L]`, read by "sketch" and "fold".
        directions (`Callable`): gives a layer's sketch B `[r, n] float32`; only called for "sketch".
        data (`Sequence[Mapping]`): batches of model inputs; only read for "sequential" and "lstsq".
        moments (`Callable`, *optional*): gives the second moments `[n, n]` of every layer for "lstsq", where they are known.

    Returns:
        `list[torch.Tensor]`: the output projection of every cut unit, `[d, k]`, for `set_output_weights`; None for none.

    Raises:
        InvalidInputError: if something does not fit the model.
        UnsupportedModelError: if layers cannot be fitted one after the other.
    """
    if name is None:
        return None
    for unit in units:
        check_precision(output_weight(model, unit).dtype, unit.output.module)
    if name == "sequential":
        return recover_in_turn(model, data, units, kept)
    if name == "lstsq":
        return recover_lstsq(model, units, kept, moments() if moments else second_moments(model, data, units))
    if name == "sketch":
        sketches = [directions(layer) for layer in range(len(statistics))]
        return recover_sketch(model, units, kept, sketches, [measured.square for measured in statistics])
    return recover_fold(model, units, kept, statistics)


def check_precision(dtype: torch.dtype, where: str) -> None:
    """Refuse weights of fewer than 16 bits: they belong to scales that are elsewhere, and a fit would not be what they mean.

    Raises:
        UnsupportedModelError: if they are such.
    """
    if dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"The weights of {where} are {dtype}; a recovery fits weights of 16 bits or more. Load the model with "
            "dtype=torch.bfloat16, prune and quantise then, or prune with recover=None (--recover none)."
        )


def check_by_rows(name: str | None) -> None:
    """Refuse a recovery that cannot go from file to file.

    Raises:
        InvalidInputError: if it needs a model that runs.
    """
    if name in FROM_DATA:
        raise InvalidInputError(
            f'recover="{name}" runs the model on data, so it cannot go from file to file. Use "sketch", "fold" or None, or '
            "prune in memory: without --stream, or without output_dir."
        )


def row_solver(
    name: str | None,
    kept: Sequence[torch.Tensor],
    statistics: Sequence[Statistics],
    directions: Callable[[int], torch.Tensor],
) -> RowSolver | None:
    """Return what recovers output projections row by row, where no model is in memory.

    Args:
        name (`str`, *optional*): "sketch", "fold", or None for none.
        kept (`Sequence[torch.Tensor]`): the columns to keep, one `[k] int64` per layer, ascending.
        statistics (`Sequence[Statistics]`): of every layer.
        directions (`Callable`): gives a layer's sketch B `[r, n] float32`; only called for "sketch".

    Raises:
        InvalidInputError: if the recovery needs a model that runs.
    """
    check_by_rows(name)
    if name is None:
        return None

    def solver(layer: int, dtype: torch.dtype) -> NewRows:
        check_precision(dtype, f"layer {layer}")
        if name == "fold":
            return fold(kept[layer], statistics[layer])
        new_rows = SketchSolver(directions(layer), statistics[layer].square, kept[layer], dtype).rows()
        return lambda rows: check_finite(layer, new_rows(rows), sketched=True)

    return solver


def prefix_solver(
    statistics: Sequence[Statistics], directions: Callable[[int], torch.Tensor]
) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return what recovers the first columns of an output projection from a sketch, without the other columns.

    Args:
        statistics (`Sequence[Statistics]`): of every layer, of sorted neurons.
        directions (`Callable`): gives a layer's sketch B `[r, n] float32`, of sorted neurons.

    Returns:
        `Callable`: given a layer, the columns `[d, k]` and the products of the whole projection with the sketch `[d, r]
        float32`, returns the new columns.
    """

    def solver(layer: int, weight: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
        sketch = directions(layer)
        if products.shape[1] != len(sketch):
            raise CheckpointMismatchError(
                f"The elastic repository has products of layer {layer} with {products.shape[1]} directions; its pruner has "
                f"{len(sketch)}. Make it anew with make_elastic."
            )
        kept = torch.arange(weight.shape[1])
        new = SketchSolver(sketch, statistics[layer].square, kept, weight.dtype, weight.device).prefix(
            weight, products
        )
        return check_finite(layer, new, sketched=True)

    return solver
