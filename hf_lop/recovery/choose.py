"""The recoveries a pruner offers: which one to use, and what it makes of a plan."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.recovery.by_layer import (
    add_to_output_biases,
    checked_fit,
    recover_fold,
    recover_lstsq,
    recover_sketch,
    removed_means,
    set_output_weights,
)
from hf_lop.recovery.in_turn import recover_in_turn
from hf_lop.recovery.solve import DAMPING, RowFit, fit_sketch_prefix, fold_rows, sketch_rows
from hf_lop.units.unit import Unit

if TYPE_CHECKING:
    from hf_lop.pruner.pruner import LOPPruner

RECOVERIES = {
    "sequential": "output projections fitted by least squares on calibration data, layer after layer",
    "lstsq": "output projections fitted by least squares on calibration data, every layer by itself",
    "sketch": "output projections fitted by least squares on the pruner's sketch of the activations",
    "fold": "the mean output of the removed neurons folded into the kept ones",
    "bias": "the mean output of the removed neurons as a bias of the output projections (FLAP)",
}
FROM_DATA = ("sequential", "lstsq")


def choose_recovery(recover: str | None, *, data: bool, sketch: bool) -> str | None:
    """Decide how to recover, before any work.

    | `recover` | data given | a sketch, no data | neither |
    |---|---|---|---|
    | "auto" | sequential | sketch | none |
    | "sequential", "lstsq" | as asked for | error | error |
    | "sketch" | error | sketch | error |
    | "fold", "bias", None | error | as asked for | as asked for |

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


def fit_recovery(
    name: str | None,
    pruner: "LOPPruner",
    model: nn.Module,
    units: Sequence[Unit],
    kept: Sequence[torch.Tensor],
    moments: Callable[[], Iterable[torch.Tensor]],
    data: Iterable[Mapping[str, Any]] = (),
) -> Callable[[nn.Module, Sequence[Unit]], None]:
    """Compute a recovery from the dense model, which is only read.

    Args:
        name (`str`, *optional*): one of `RECOVERIES`, or None for none.
        pruner (`LOPPruner`): its statistics and sketch are used.
        model (`nn.Module`): the dense model.
        units (`Sequence[Unit]`): its L FFNs.
        kept (`Sequence[torch.Tensor]`): the neurons to keep, one `[k] int64` per layer.
        moments (`Callable`): gives the second moments `[n, n]` of every layer; only called for "lstsq".
        data (`Iterable[Mapping]`): batches of model inputs; only read for "sequential".

    Returns:
        `Callable`: writes the result into the cut model, given that and its FFNs.

    Raises:
        InvalidInputError: if something does not fit the model.
        UnsupportedModelError: if a bias cannot be added, or layers cannot be fitted one after the other.
    """
    if name is None:
        return lambda _model, _ffns: None
    if name == "bias":
        return partial(add_to_output_biases, biases=removed_means(model, units, kept, pruner.statistics()))
    if name == "sequential":
        weights = recover_in_turn(model, data, units, kept)
    elif name == "lstsq":
        weights = recover_lstsq(model, units, kept, moments())
    elif name == "sketch":
        squares = [measured.square for measured in pruner.statistics()]
        weights = recover_sketch(model, units, kept, pruner.directions(), squares)
    else:
        weights = recover_fold(model, units, kept, pruner.statistics())
    return partial(set_output_weights, weights=weights)


def fit_by_layer(
    name: str | None, pruner: "LOPPruner", kept: Sequence[torch.Tensor]
) -> Callable[[int, torch.dtype], RowFit] | None:
    """Return what recovers output projections row by row, where no model is in memory.

    Args:
        name (`str`, *optional*): "sketch", "fold", or None for none.
        pruner (`LOPPruner`): its statistics and sketch are used.
        kept (`Sequence[torch.Tensor]`): the neurons to keep, one `[k] int64` per layer, ascending.

    Returns:
        `Callable`: given a layer and a dtype, returns what makes the new rows of its output projection from the old ones, in
            that dtype. None for none.

    Raises:
        InvalidInputError: if the recovery needs a model that runs, or adds weights.
    """
    if name is None:
        return None
    reasons = {
        **dict.fromkeys(FROM_DATA, "runs the model on data"),
        "bias": "adds weights that the files do not have",
    }
    if name in reasons:
        raise InvalidInputError(
            f'recover="{name}" {reasons[name]}, so it cannot go from file to file. Use "sketch", "fold" or None, or prune in '
            "memory: without --stream, or without output_dir."
        )
    statistics = pruner.statistics()

    def fit(layer: int, dtype: torch.dtype) -> RowFit:
        if name == "fold":
            return fold_rows(kept[layer], statistics[layer])
        directions, square = pruner.directions_of(layer), statistics[layer].square
        make = sketch_rows(directions, square, kept[layer], DAMPING, dtype, torch.device("cpu"))
        return lambda rows: checked_fit(layer, make(rows))

    return fit


def fit_prefixes(pruner: "LOPPruner") -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return what recovers the first columns of an output projection from a sketch, without the other columns.

    Args:
        pruner (`LOPPruner`): of sorted neurons; its statistics and sketch are used.

    Returns:
        `Callable`: given a layer, the columns `[d, k]` and the products of the whole projection with the sketch `[d, r]
        float32`, returns the new columns.
    """
    statistics = pruner.statistics()

    def fit(layer: int, weight: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
        directions = pruner.directions_of(layer)
        if products.shape[1] != len(directions):
            raise CheckpointMismatchError(
                f"The elastic repository has products of layer {layer} with {products.shape[1]} directions; its pruner has "
                f"{len(directions)}. Make it anew with make_elastic."
            )
        return checked_fit(layer, fit_sketch_prefix(weight, products, directions, statistics[layer].square))

    return fit
