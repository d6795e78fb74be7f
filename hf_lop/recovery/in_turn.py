"""Least squares, layer after layer: every output projection makes up for all that was lost up to its layer."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_lop.errors import UnsupportedModelError
from hf_lop.learning.decoder.batches import check_numbers
from hf_lop.learning.decoder.door import DoorBatch, at_the_door, first_tensor
from hf_lop.learning.decoder.layers import LayerRuns
from hf_lop.recovery.solve import DAMPING, check_damping, check_finite, solve
from hf_lop.units.slice import output_weight, set_output_weight, slice_units, watching
from hf_lop.units.unit import Unit
from hf_lop.units.views import shadow


@dataclass(slots=True)
class _Stream:
    """One batch on its way through the layers of the dense and of the cut model."""

    door: DoorBatch
    dense: Any = None
    cut: Any = None

    def rows(self, output: Any) -> torch.Tensor:
        """Return the real tokens of activations or of a layer's output, `[T, n] float32`."""
        return self.door.tokens.rows(first_tensor(output)).float()


class _Half:
    """The dense or the cut model, run one layer at a time."""

    def __init__(self, model: Any, units: Sequence[Unit]) -> None:
        self.model, self.units, self.runs = model, units, LayerRuns(model, units)

    def layer(self, index: int, stream: _Stream, before: Any) -> Any:
        """Return the output of a layer, given that of the layer before it."""
        with self.runs.skipping(index, before) if index else contextlib.nullcontext():
            return self.runs.until(index, partial(stream.door.run, self.model))

    def watched(self, index: int, stream: _Stream, before: Any) -> tuple[Any, torch.Tensor]:
        """Return the output of a layer, and the activations of its unit at real tokens, `[T, k] float32`."""
        seen: list[torch.Tensor] = []
        with watching(self.model, [self.units[index]], lambda _, x: seen.append(stream.rows(x))):
            output = self.layer(index, stream, before)
        return output, seen[0]


def recover_in_turn(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    units: Sequence[Unit],
    kept: Sequence[torch.Tensor],
    *,
    damping: float = DAMPING,
) -> list[torch.Tensor]:
    """Fit the output projections one after the other, each to what is missing to the dense layer's output.

    With X_K `[T, k]` the activations of the kept neurons in a model whose earlier layers are cut and fitted already, and E `[T, d]`
    what the outputs of layer l of the dense and of that model differ by,

        W'_K = W_K + E^T X_K (X_K^T X_K + damping diag(X_K^T X_K))^-1

    so a layer also makes up for errors of those before it, where [`recover_lstsq`] fits every layer by itself. It takes
    three passes over the batches instead of one, and no more second moments than one layer's at a time.

    Memory: 4 k^2 + 16 k (k + d) bytes for one layer, twice the output of a layer for every batch, and the cut FFNs.

    Args:
        model (`nn.Module`): the dense model; only read.
        batches (`Iterable[Mapping]`): keyword arguments of the model's forward; padding is left out.
        units (`Sequence[Unit]`): its L FFNs.
        kept (`Sequence[torch.Tensor]`): the neurons to keep, one `[k] int64` per layer, in any order.
        damping (`float`): above 0; as of `recover_lstsq`.

    Returns:
        `list[torch.Tensor]`: W'_K of every layer, as of `recover_lstsq`.

    Raises:
        UnsupportedModelError: if the layers cannot be run one by one, or do not simply add what their FFN puts out.
        InvalidInputError: if there is no batch, the kept neurons do not fit the model, or damping is not above 0.
    """
    check_damping(damping)
    twin, cut = shadow(model), shadow(model)
    cut_units = slice_units(cut, kept, units)
    weights = []
    with torch.inference_mode():
        streams = [_Stream(batch) for batch in at_the_door(twin, batches)]
        dense, pruned = _Half(twin, units), _Half(cut, cut_units)
        dense.runs.rank = pruned.runs.rank = _ranks(dense, streams[0])
        _check_additive(pruned, streams[0])
        for index, unit in enumerate(tqdm(cut_units, desc="least squares in turn", unit="layer")):
            place = output_weight(cut, unit)
            gram, cross = (place.new_zeros(n, unit.features, dtype=torch.float32) for n in (unit.features, len(place)))
            before = [stream.cut for stream in streams]
            for number, stream in enumerate(streams):
                stream.dense = dense.layer(index, stream, stream.dense)
                stream.cut, x = pruned.watched(index, stream, stream.cut)
                missing = stream.rows(stream.dense) - stream.rows(stream.cut)  # E
                gram.addmm_(x.T, x)  # X_K^T X_K
                check_numbers(gram.diagonal(), "Recovery", number, f"activations in layer {index}", model)
                cross.addmm_(missing.T, x)  # E^T X_K
            change = solve(gram, cross, damping)
            fitted = check_finite(index, (place.double() + change.to(place.device)).to(place.dtype))
            set_output_weight(cut, unit, fitted)
            weights.append(fitted)
            for stream, entered in zip(streams, before, strict=True):  # what the next layer gets from the fitted one
                stream.cut = pruned.layer(index, stream, entered)
    return weights


def _ranks(dense: _Half, stream: _Stream) -> list[int]:
    """Return when each layer runs, or refuse a model whose layers cannot be run one by one, in their order."""
    model = type(dense.model).__name__
    if stream.door.call is None:
        raise UnsupportedModelError(f"The decoder of {model} does not run once, behind a door of its own. {_INSTEAD}")
    run = partial(stream.door.run, dense.model)
    result, outputs = dense.runs.record(run)
    if not result.isfinite().any():  # of padding, some models make NaN
        check_numbers(result, "Recovery", 0, "predictions")
    if not dense.runs.skips_exactly(run, result, outputs) or dense.runs.rank != sorted(dense.runs.rank):
        raise UnsupportedModelError(f"The layers of {model} cannot be run one by one. {_INSTEAD}")
    return dense.runs.rank


_INSTEAD = 'Use recover="lstsq", which fits every layer by itself.'


def _check_additive(pruned: _Half, stream: _Stream) -> None:
    """Refuse layers that do more to what their FFN puts out than to add it, such as a norm behind it."""
    model, unit = pruned.model, pruned.units[0]
    weight = output_weight(model, unit)
    output, x = pruned.watched(0, stream, None)
    once = stream.rows(output)
    set_output_weight(model, unit, 2 * weight)
    twice = stream.rows(pruned.layer(0, stream, None))
    set_output_weight(model, unit, weight)
    wanted = x @ weight.float().T  # (h + 2 x W^T) - (h + x W^T)
    noise = 4 * torch.finfo(weight.dtype).eps * once.norm()  # of sums that are rounded to the model's dtype
    if (twice - once - wanted).norm() > 0.1 * wanted.norm() + noise:
        raise UnsupportedModelError(
            f"The layers of {type(model).__name__} do not simply add what their FFN puts out, so no output projection can be "
            f"fitted to what is missing behind a layer. {_INSTEAD}"
        )
