"""Replay at the decoder's door: what a dense model passes to its text decoder is recorded once, then replayed.

Image features are merged into the decoder's input already, so the vision tower runs once per batch and never again,
whatever is asked of the decoder afterwards. Only the predictions that count are computed behind it.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from hf_lop.errors import InvalidInputError
from hf_lop.learning.data import IGNORED
from hf_lop.learning.decoder.batches import Tokens, check_numbers, model_inputs, to_device
from hf_lop.learning.decoder.door import decoder_calls, first_tensor, only_call
from hf_lop.learning.processes import Processes
from hf_lop.learning.statistics import evaluating
from hf_lop.units.decoder import text_decoder

Way = Literal["projection", "head", "model"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One batch at the decoder's door, with the K predictions that count.

    Attributes:
        way (`str`): how predictions are computed. "projection": the recorded call of the text decoder, then the output
            embeddings. "head": the same, then all that the model itself does behind its decoder (scaling, soft
            capping), which is handed the decoder's output instead of running it. "model": the whole model.
        batch (`dict`): the model's own inputs, without labels; only kept for the way "model".
        args (`tuple`), kwargs (`dict`): the recorded call. Its embeddings `[B, T, d]` are most of the memory.
        sample (`torch.Tensor`): `[K] int64`, in which sample of the batch each prediction is made.
        position (`torch.Tensor`): `[K] int64`, at which token.
        target (`torch.Tensor`): `[K] int64`, the token to predict; -100 where none is known.
        labelled (`bool`): whether the batch said by `labels` which predictions count.
    """

    way: Way
    batch: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sample: torch.Tensor
    position: torch.Tensor
    target: torch.Tensor
    labelled: bool

    def select(self, chosen: torch.Tensor) -> "Recorded":
        """Return the same batch with some of its predictions, chosen by a mask `[K] bool`."""
        return replace(self, sample=self.sample[chosen], position=self.position[chosen], target=self.target[chosen])

    def logits(self, model: nn.Module) -> torch.Tensor:
        """Compute the predictions that count with any model cut from the recorded one.

        Args:
            model (`nn.Module`): the recorded model, an elastic or shadow model of it, or a pruned one.

        Returns:
            `torch.Tensor`: `[K, V]` in the model's dtype, on its device.
        """
        with torch.inference_mode():
            return _WAYS[self.way](self, model)


def _whole_model(recorded: Recorded, model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**recorded.batch, use_cache=False).logits
    return logits[recorded.sample, recorded.position]


def _projection(recorded: Recorded, model: Any) -> torch.Tensor:
    hidden = first_tensor(text_decoder(model)(*recorded.args, **recorded.kwargs))
    logits: torch.Tensor = model.get_output_embeddings()(hidden[recorded.sample, recorded.position])
    return logits


def _head(recorded: Recorded, model: Any) -> torch.Tensor:
    """Run the model on a stand-in for K tokens; at the decoder's door the recorded call takes its place."""

    def enter(_decoder: nn.Module, _args: Any, _kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return recorded.args, recorded.kwargs

    def leave(_decoder: nn.Module, _args: Any, output: Any) -> Any:
        rows = first_tensor(output)[recorded.sample, recorded.position].unsqueeze(0)
        if isinstance(output, torch.Tensor):
            return rows
        if isinstance(output, tuple):
            return (rows, *output[1:])
        output[next(iter(output))] = rows
        return output

    weight = model.get_output_embeddings().weight
    stand_in = torch.zeros(1, len(recorded.sample), weight.shape[1], dtype=weight.dtype, device=weight.device)
    positions = torch.arange(len(recorded.sample), device=weight.device).unsqueeze(0)
    decoder = text_decoder(model)
    handles = [
        decoder.register_forward_pre_hook(enter, with_kwargs=True),
        decoder.register_forward_hook(leave),
    ]
    try:
        logits: torch.Tensor = model(inputs_embeds=stand_in, position_ids=positions, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits


_WAYS: dict[Way, Callable[[Recorded, Any], torch.Tensor]] = {
    "projection": _projection,
    "head": _head,
    "model": _whole_model,
}


def predictions(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the predictions that count.

    The token at t predicts the one at t + 1. With `labels` `[B, T]`, predictions of labelled tokens (not -100) count;
    without, those of all tokens that are not padding, the last one of a sample (whose target is unknown) included.
    An encoder-decoder batch (with `decoder_input_ids`) has labels that are shifted already.

    Args:
        batch (`Mapping`): model inputs, with `input_ids` `[B, T]`, or `inputs_embeds` `[B, T, d]` alone: then what the tokens
            are is known from labels only.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: where `[B, T] bool`, and the targets `[B, T] int64`, -100 where unknown.

    Raises:
        InvalidInputError: if it has neither, or labels that are no integers.
    """
    encoder_decoder = "decoder_input_ids" in batch
    labels, ids = batch.get("labels"), batch.get("decoder_input_ids" if encoder_decoder else "input_ids")
    if ids is None and (embeds := batch.get("inputs_embeds")) is not None:  # which tokens these are nobody knows
        ids = torch.full(embeds.shape[:2], IGNORED, device=embeds.device)
    ids = labels if ids is None else ids
    if ids is None:
        raise InvalidInputError(
            f"A batch needs input_ids or inputs_embeds; this one has {sorted(batch)}, which do not tell what is to be predicted. Add "
            "them, or labels (-100 outside of the answers)."
        )
    if labels is not None and (labels.is_floating_point() or labels.shape[:2] != ids.shape[:2]):
        raise InvalidInputError(
            f"labels are {list(labels.shape)} {labels.dtype}; they must be integers, token ids or -100, one for each of the "
            f"{list(ids.shape)} tokens."
        )
    if labels is not None and encoder_decoder:
        return labels != IGNORED, labels
    real = torch.ones_like(ids, dtype=torch.bool)
    if labels is None and (mask := Tokens.of(batch).mask_of(ids.shape[1])) is not None:
        real = mask
    following = (labels if labels is not None else ids.masked_fill(~real, IGNORED))[:, 1:]
    targets = nn.functional.pad(following, (0, 1), value=IGNORED)
    return (targets != IGNORED if labels is not None else real), targets


def nearly_equal(replayed: torch.Tensor, dense: torch.Tensor) -> bool:
    """Equal but for the rounding that another shape of the same product brings."""
    if replayed.shape != dense.shape or not len(dense):
        return False
    finite = dense[dense.isfinite()].abs()
    if not len(finite):
        return False
    tolerance = 2e-5 if dense.dtype in (torch.float32, torch.float64) else 2e-2
    return bool(torch.allclose(replayed.float(), dense.float(), rtol=0, atol=tolerance * float(finite.max())))


def _choose_way(recorded: Recorded, model: nn.Module, dense: torch.Tensor) -> Way:
    """The first way that gives the dense predictions, twice in a row: a recorded call must survive its replay."""
    reason: object = "the predictions differ"
    for way in ("projection", "head"):
        trial = replace(recorded, way=way)
        try:
            if nearly_equal(trial.logits(model), dense) and nearly_equal(trial.logits(model), dense):
                return way
        except Exception as error:  # whatever a model makes of a foreign call, another way remains
            reason = error
    return _give_up(model, reason)


def _give_up(model: nn.Module, reason: object) -> Way:
    _log.warning(
        "The text decoder of %s cannot be replayed alone (%s). Every evaluation will run the whole model, vision tower "
        "included.",
        type(model).__name__,
        reason,
    )
    return "model"


def record_batches(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], processes: Processes | None = None
) -> list[Recorded]:
    """Record what a dense model passes to its text decoder, for every batch.

    The first batch with a prediction is run to its end, and its replay compared with the model's own predictions: the
    ways "projection" and "head" are tried in this order, and where neither gives equal predictions, every replay runs
    the whole model (a warning says so). All other batches are run as far as the decoder's door only.

    Memory: for every batch the decoder's input, mainly `B * T * d` values.

    Args:
        model (`nn.Module`): the dense model, or an elastic model at its dense widths; only read.
        batches (`Iterable[Mapping]`): keyword arguments of the model's forward, optionally with `labels`; see
            [`predictions`].
        processes (`Processes`, *optional*): all of them call this with the same batches; each records every n-th, and
            runs the first one to choose the same way as the others.

    Returns:
        `list[Recorded]`: one per batch that has a prediction which counts, of those of this process.

    Raises:
        InvalidInputError: if there is no such batch.
    """
    processes = processes or Processes()
    recorded: list[Recorded] = []
    way: Way | None = None
    counted = 0
    with evaluating(model):
        for batch in processes.bar(batches, "recording"):
            if not predictions(batch)[0].any():
                continue
            if processes.takes(counted) or way is None:
                entry = _record(model, to_device(batch, model), way)
                way = way or entry.way
                if processes.takes(counted):
                    recorded.append(entry)
            counted += 1
    if not counted:
        raise InvalidInputError("No batch has a prediction to score. Pass at least one batch of model inputs.")
    if processes.main and counted < processes.count:
        warnings.warn(
            f"{processes.count} processes share {counted} batches with a prediction to score, so "
            f"{processes.count - counted} have nothing to do. Make batches smaller, or start fewer processes.",
            stacklevel=2,
        )
    return recorded


def _record(model: Any, batch: dict[str, Any], way: Way | None) -> Recorded:
    where, targets = predictions(batch)
    sample, position = where.nonzero(as_tuple=True)
    inputs = model_inputs(batch, model)
    entry = Recorded("model", inputs, (), {}, sample, position, targets[where], batch.get("labels") is not None)
    if way != "model":
        calls, output = decoder_calls(model, inputs, enter=way is None)
        if (call := only_call(model, calls)) is not None:
            trial = replace(entry, args=call[0], kwargs=call[1])
            if way is None:
                dense = output.logits[sample, position]
                check_numbers(dense.nan_to_num(math.nan, 0, 0), "Validation", 0, "predictions", model)
                way = _choose_way(trial, model, dense)
            entry = entry if way == "model" else replace(trial, way=way, batch={})
        elif way is None:
            _give_up(model, f"it was called {len(calls)} times")
    return entry
