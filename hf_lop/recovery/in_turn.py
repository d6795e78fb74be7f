"""Least squares, layer after layer: every output projection makes up for all that was lost up to its layer."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.learning.decoder.layers import LayerRuns
from hf_lop.learning.decoder.replay import decoder_calls, first_tensor
from hf_lop.learning.statistics import batch_size, to_device, token_mask
from hf_lop.recovery.solve import DAMPING
from hf_lop.units.decoder import text_decoder
from hf_lop.units.slice import output_weight, slice_units
from hf_lop.units.unit import Unit
from hf_lop.units.views import shadow


@dataclass(slots=True)
class _Stream:
    """One batch on its way through the layers of the dense and of the cut model."""

    call: tuple[tuple[Any, ...], dict[str, Any]]
    samples: int
    mask: torch.Tensor | None
    dense: Any = None
    cut: Any = None


class _Half:
    """The dense or the cut model, run one layer at a time."""

    def __init__(self, model: Any, units: Sequence[Unit]) -> None:
        self.model, self.runs = model, LayerRuns(model, units)

    def run(self, stream: _Stream) -> torch.Tensor:
        return first_tensor(text_decoder(self.model)(*stream.call[0], **stream.call[1]))

    def layer(self, index: int, stream: _Stream, before: Any) -> Any:
        """Return the output of a layer, given that of the layer before it."""
        with self.runs.skipping(index, before) if index else contextlib.nullcontext():
            return self.runs.until(index, lambda: self.run(stream))


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
    if not damping > 0:
        raise InvalidInputError(f"damping is {damping}; it must be above 0, or the fit may have no solution.")
    twin, cut = shadow(model), shadow(model)
    cut_units = slice_units(cut, kept)
    weights = []
    with torch.inference_mode():
        streams = [_enter(twin, to_device({k: v for k, v in b.items() if k != "labels"}, twin)) for b in batches]
        if not streams:
            raise InvalidInputError(
                "No calibration batch was given, so there is nothing to fit to. Pass at least one."
            )
        dense, pruned = _Half(twin, units), _Half(cut, cut_units)
        result, outputs = dense.runs.record(lambda: dense.run(streams[0]))
        exact = dense.runs.skips_exactly(lambda: dense.run(streams[0]), result, outputs)
        if not exact or dense.runs.rank != sorted(dense.runs.rank):
            raise UnsupportedModelError(f"The layers of {type(model).__name__} cannot be run one by one. {_INSTEAD}")
        pruned.runs.rank = dense.runs.rank
        _check_additive(model, pruned, cut_units[0], streams[0])
        for index, unit in enumerate(tqdm(cut_units, desc="least squares in turn", unit="layer")):
            place = output_weight(cut, unit)
            gram, cross = (place.new_zeros(n, unit.count, dtype=torch.float32) for n in (unit.count, len(place)))
            before = [stream.cut for stream in streams]
            for stream in streams:
                stream.dense = dense.layer(index, stream, stream.dense)
                with _inputs(cut, unit) as seen:
                    stream.cut = pruned.layer(index, stream, stream.cut)
                x, missing = _rows(stream, seen[0]), _missing(stream)
                gram.addmm_(x.T, x)
                cross.addmm_(missing.T, x)
            change = _solve(gram, cross, damping)
            fitted = (place.double() + change.to(place.device)).to(place.dtype)
            _set_output(cut, unit, fitted)
            weights.append(fitted)
            for stream, entered in zip(streams, before, strict=True):
                stream.cut = pruned.layer(index, stream, entered)
    return weights


_INSTEAD = 'Use recover="lstsq", which fits every layer by itself.'


def _enter(model: Any, batch: dict[str, Any]) -> _Stream:
    """Bring a batch to the decoder's door."""
    calls, _ = decoder_calls(model, batch, enter=False)
    if text_decoder(model) is model or len(calls) != 1:
        raise UnsupportedModelError(f"The decoder of {type(model).__name__} is called {len(calls)} times. {_INSTEAD}")
    name = "decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask"
    mask = token_mask(batch, batch[name].shape[-1]) if batch.get(name) is not None else None
    return _Stream(calls[0], batch_size(batch), mask)


@contextlib.contextmanager
def _inputs(model: nn.Module, unit: Unit) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of an output projection while the context lasts."""
    seen: list[torch.Tensor] = []
    note: Callable[..., None] = lambda _module, args: seen.append(args[0])  # noqa: E731
    handle = unit.modules(model)[1].register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _rows(stream: _Stream, x: torch.Tensor) -> torch.Tensor:
    """Return the tokens that are not padding, `[T, n] float32`."""
    rows = x.reshape(stream.samples, -1, x.shape[-1])
    if stream.mask is not None and stream.mask.shape[1] != rows.shape[1]:
        raise InvalidInputError(
            f"The decoder sees {rows.shape[1]} tokens per sample, the attention mask {stream.mask.shape[1]}: padding cannot be "
            "told apart from tokens. Use batches of one sample, or of samples of equal length."
        )
    return (rows.flatten(0, 1) if stream.mask is None else rows[stream.mask]).float()


def _missing(stream: _Stream) -> torch.Tensor:
    """Return what the cut layer's output lacks, `[T, d] float32`."""
    return _rows(stream, first_tensor(stream.dense)) - _rows(stream, first_tensor(stream.cut))


def _solve(gram: torch.Tensor, cross: torch.Tensor, damping: float) -> torch.Tensor:
    """Return E^T X (G + damping D)^-1 `[d, k] float64`."""
    diagonal = gram.diagonal().double()
    if not diagonal.any():
        return torch.zeros_like(cross, dtype=torch.float64)  # no kept neuron was ever active
    inner = gram.double()
    inner.diagonal().add_(damping * diagonal.clamp_min(1e-9 * float(diagonal.mean())))
    factor = torch.linalg.cholesky_ex(inner).L
    solved: torch.Tensor = torch.cholesky_solve(cross.double().T, factor).T
    if not torch.isfinite(solved).all():
        raise InvalidInputError("The fit is not finite: activations overflow. Check the calibration data.")
    return solved


def _set_output(model: nn.Module, unit: Unit, weight: torch.Tensor) -> None:
    """Give an FFN another output projection; a parameter that the user's model may share is left alone."""
    module = unit.modules(model)[1]
    stored = weight if hasattr(module, "in_features") else weight.T  # Conv1D
    module.weight = nn.Parameter(stored, requires_grad=False)


def _check_additive(model: nn.Module, pruned: _Half, unit: Unit, stream: _Stream) -> None:
    """Refuse layers that do more to what their FFN puts out than to add it, such as a norm behind it."""
    weight = output_weight(pruned.model, unit)
    with _inputs(pruned.model, unit) as seen:
        once = _rows(stream, first_tensor(pruned.layer(0, stream, None)))
    _set_output(pruned.model, unit, 2 * weight)
    twice = _rows(stream, first_tensor(pruned.layer(0, stream, None)))
    _set_output(pruned.model, unit, weight)
    wanted = _rows(stream, seen[0]) @ weight.float().T
    noise = 4 * torch.finfo(weight.dtype).eps * once.norm()  # of sums that are rounded to the model's dtype
    if (twice - once - wanted).norm() > 0.1 * wanted.norm() + noise:
        raise UnsupportedModelError(
            f"The layers of {type(model).__name__} do not simply add what their FFN puts out, so no output projection can be "
            f"fitted to what is missing behind a layer. {_INSTEAD}"
        )
