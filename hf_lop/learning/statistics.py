"""Activation statistics of every neuron, from one pass over the calibration batches.

Symbols: N samples, T_s tokens of sample s, x_{s,t,j} activation of neuron j (the input of the FFN's output projection;
for a gated FFN: act(gate) * up), n neurons of a layer.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_lop.errors import InvalidInputError
from hf_lop.learning.decoder.batches import Tokens, check_any, check_numbers, model_inputs
from hf_lop.learning.processes import Processes
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import watching
from hf_lop.units.unit import Unit


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of the neurons of one layer, each `[n] float32` on the CPU.

    Attributes:
        mean (`torch.Tensor`): mu_j = (1/N) sum_s mean_t x_{s,t,j} (FLAP).
        square (`torch.Tensor`): q_j = (1/N) sum_s sum_t x_{s,t,j}^2, divided by samples, not by tokens (Wanda, FLAP).
        fluctuation (`torch.Tensor`): v_j = (1/N) sum_s sum_t (x_{s,t,j} - mu_j)^2, exact (FLAP approximates it by a
            running update that is about 2.5 % smaller for every neuron).
        norm (`torch.Tensor`): (1/N) sum_s ||x_{s,:,j}||_2, LOP (arXiv 2506.12826), Eq. 25. The paper does not say how
            the tokens of one sample are joined; this takes the L2 norm over them.
    """

    mean: torch.Tensor
    square: torch.Tensor
    fluctuation: torch.Tensor
    norm: torch.Tensor


class _Sums(NamedTuple):
    """What one batch adds to the statistics of one layer; each tensor is `[n] float64` on the CPU."""

    samples: int
    tokens: int
    sample_means: torch.Tensor
    square: torch.Tensor
    norm: torch.Tensor
    token_mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, mask: torch.Tensor | None) -> "_Sums":
        """Sum up activations `[B, T, n]` with an optional token mask `[B, T] bool`."""
        x = x.float()
        if mask is None:
            lengths = torch.full((len(x), 1), x.shape[1], device=x.device)
        else:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)  # a model may make NaN of padding
            lengths = mask.sum(1, keepdim=True)
        if (lengths == 0).any():
            raise InvalidInputError("A calibration sample has no unmasked token. Drop empty samples.")
        squares = x.square().sum(1)
        tokens = int(lengths.sum())
        token_mean = x.sum((0, 1)) / tokens
        centred = x - token_mean if mask is None else (x - token_mean) * mask.unsqueeze(-1)
        sums = (
            (x.sum(1) / lengths).sum(0),
            squares.sum(0),
            squares.sqrt().sum(0),
            token_mean,
            centred.square().sum((0, 1)),
        )
        return cls(len(x), tokens, *(value.double().cpu() for value in sums))


class _Accumulator:
    """Running sums of one layer in float64, merged batch by batch (Chan et al.), so no pass over the data is repeated."""

    def __init__(self, width: int) -> None:
        self.samples, self.tokens = 0, 0
        self.sample_means, self.square, self.norm, self.token_mean, self.scatter = torch.zeros(
            5, width, dtype=torch.float64
        )

    def add(self, batch: _Sums) -> None:
        shift, total = batch.token_mean - self.token_mean, self.tokens + batch.tokens
        self.scatter += batch.scatter + shift.square() * (self.tokens * batch.tokens / total)
        self.token_mean += shift * (batch.tokens / total)
        self.sample_means += batch.sample_means
        self.square += batch.square
        self.norm += batch.norm
        self.samples, self.tokens = self.samples + batch.samples, total

    def result(self) -> Statistics:
        mean = self.sample_means / self.samples
        fluctuation = (self.scatter + self.tokens * (self.token_mean - mean).square()) / self.samples
        return Statistics(
            mean.float(), (self.square / self.samples).float(), fluctuation.float(), (self.norm / self.samples).float()
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    units: list[Unit] | None = None,
    processes: Processes | None = None,
    *,
    also: Callable[[int, torch.Tensor, torch.Tensor | None], None] = lambda *_: None,
) -> list[Statistics]:
    """Collect the statistics of every neuron in one pass over calibration batches.

    Args:
        model (`nn.Module`): the dense model; neither moved nor changed.
        batches (`Iterable[Mapping]`): keyword arguments of the model's forward, with `input_ids` `[B, T]` and, where
            samples are padded, `attention_mask` `[B, T]`. Padding is left out of every statistic.
        units (`list[Unit]`, *optional*): the FFNs to watch, all by default.
        processes (`Processes`, *optional*): all of them call this with the same batches; each runs every n-th, and tells
            the others its sums (40 bytes per neuron and batch), which all add up in the order of the batches.
        also (`Callable`, *optional*): called with the layer, its activations `[B, T, n]` and the mask `[B, T] bool` of its
            real tokens (None where nothing is padded), for what else is to be learnt in the same pass; in each process
            for its own batches.

    Returns:
        `list[Statistics]`: one per layer.

    Raises:
        InvalidInputError: if there is no batch, a batch cannot be read, or one gives activations that are not finite.
    """
    units = find_units(model) if units is None else units
    processes = processes or Processes()
    totals = [_Accumulator(unit.features) for unit in units]
    current: Tokens
    sums: list[tuple[int, _Sums]] = []  # of the current batch, each with its layer

    def see(layer: int, x: torch.Tensor) -> None:
        x = current.split(x)
        sums.append((layer, _Sums.of(x, current.mask)))
        also(layer, x, current.mask)

    # The vocabulary projection is not needed here; most models can be asked for the last position only.
    short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def run(begin: int, turn: list[Mapping[str, Any]]) -> list[tuple[int, _Sums]]:
        nonlocal current
        sums.clear()
        for batch in turn[processes.index : processes.index + 1]:
            inputs = model_inputs(batch, model)
            current = Tokens.of(inputs)
            model(**inputs, use_cache=False, **short)
        for layer, batch_sums in sums:
            for value in (batch_sums.square, batch_sums.scatter):
                check_numbers(value, "Calibration", begin + processes.index, f"activations in layer {layer}", model)
        return sums

    with watching(model, units, see), evaluating(model):
        for index, turn in enumerate(_turns(processes.bar(batches, "calibration"), processes.count)):
            for found in processes.gather(partial(run, index * processes.count, turn)):
                for layer, batch_sums in found:
                    totals[layer].add(batch_sums)
    check_any(totals[0].samples)
    return [total.result() for total in totals]


def _turns(batches: Iterable[Mapping[str, Any]], count: int) -> Iterator[list[Mapping[str, Any]]]:
    """Split batches into lists of `count`, the last one perhaps shorter."""
    rest = iter(batches)
    while turn := list(islice(rest, count)):
        yield turn
