"""The decoder's door: what a model passes to its text decoder, from where on the decoder runs alone.

Image features are merged into the decoder's input already, so the vision tower runs once per batch and never again.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lop.learning.decoder.batches import Tokens, check_any, model_inputs
from hf_lop.units.decoder import text_decoder

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _AtTheDoor(Exception):
    """Ends a forward pass where the text decoder would start."""


def decoder_calls(model: Any, batch: dict[str, Any], *, enter: bool) -> tuple[list[Call], Any]:
    """Run a model; return the calls of its text decoder and its output, or stop where the decoder would be entered."""
    calls: list[Call] = []

    def note(_decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        if not enter:
            raise _AtTheDoor

    handle = text_decoder(model).register_forward_pre_hook(note, with_kwargs=True)
    output = None
    try:
        with contextlib.suppress(_AtTheDoor):
            output = model(**batch, use_cache=False)
    finally:
        handle.remove()
    return calls, output


def only_call(model: Any, calls: list[Call]) -> Call | None:
    """Return the call that stands for a whole run of the model, or None where its decoder does not run alone."""
    return calls[0] if len(calls) == 1 and text_decoder(model) is not model else None


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden states of a module's output: a tensor, a tuple or a `ModelOutput`."""
    hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hidden


@dataclass(frozen=True, slots=True)
class DoorBatch:
    """A batch at the decoder's door.

    Attributes:
        call (`tuple`, *optional*): arguments of the decoder; None where it does not run alone.
        batch (`dict`): the model's inputs; empty where there is a call.
        tokens (`Tokens`): which of its tokens are real.
    """

    call: Call | None
    batch: dict[str, Any]
    tokens: Tokens

    def run(self, model: Any) -> torch.Tensor:
        """Run the decoder, or the whole model where that does not run alone; return the first tensor of its output."""
        if self.call is None:
            return first_tensor(model(**self.batch, use_cache=False))
        args, kwargs = self.call
        return first_tensor(text_decoder(model)(*args, **kwargs))


def at_the_door(model: Any, batches: Iterable[Mapping[str, Any]]) -> list[DoorBatch]:
    """Bring batches of model inputs to the decoder's door; memory: mainly `B T d` values for each.

    Raises:
        InvalidInputError: if there is none.
    """
    waiting = []
    for given in batches:
        batch = model_inputs(given, model)
        call = only_call(model, decoder_calls(model, batch, enter=False)[0])
        waiting.append(DoorBatch(call, {} if call else batch, Tokens.of(batch)))
    check_any(len(waiting))
    return waiting
