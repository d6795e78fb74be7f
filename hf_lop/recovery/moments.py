"""Second moments of the neurons of every layer, G = X^T X, from one pass over calibration batches.

X `[T, n]` holds the activations of a layer's n neurons (the input of the FFN's output projection) at all T tokens that are
not padding. G takes 4 n^2 bytes, 1.4 GB for a layer of Qwen2.5-VL-7B, so the layers are done in groups that fit in a
memory limit: all batches go through the layers of one group, and wait behind it for the next.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_lop.errors import InvalidInputError
from hf_lop.learning.decoder.layers import LayerRuns
from hf_lop.learning.decoder.replay import decoder_calls, first_tensor
from hf_lop.learning.statistics import batch_size, to_device, token_mask
from hf_lop.units.decoder import text_decoder
from hf_lop.units.unit import Unit
from hf_lop.units.views import shadow


@dataclass(slots=True)
class _Waiting:
    """A batch between two groups of layers: how to run the decoder on it, and the output of the last layer it passed."""

    run: Callable[[], torch.Tensor]
    samples: int
    mask: torch.Tensor | None
    output: Any = None


def second_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    units: Sequence[Unit],
    *,
    memory: int = 2**32,
) -> Iterator[torch.Tensor]:
    """Yield the second moments of every layer, in order, so that no more of them exist at a time than memory allows.

    If all fit, every batch is run once. Else the vision tower and every layer are still run once per batch (on the first
    batch some more, for a check), and `2 B T d` values wait in memory for every batch. Where the layers of a decoder
    cannot be run in parts, all of it is run once per group.

    Args:
        model (`nn.Module`): the dense model; only read. It must stay dense until the last layer was yielded.
        batches (`Iterable[Mapping]`): keyword arguments of the model's forward, with `input_ids` `[B, T]` and, where
            samples are padded, `attention_mask` `[B, T]`. Padding is left out.
        units (`Sequence[Unit]`): its L FFNs.
        memory (`int`): bytes for second moments at a time.

    Yields:
        `torch.Tensor`: G `[n, n] float32`, on the model's device if that is a GPU, else on the CPU.

    Raises:
        InvalidInputError: if there is no batch, or the second moments of one layer exceed `memory`.
    """
    groups = _groups(units, memory)
    twin = shadow(model)
    bar = tqdm(desc="second moments", unit="batch")
    with bar, torch.inference_mode():
        waiting = [_wait(twin, to_device({k: v for k, v in b.items() if k != "labels"}, twin)) for b in batches]
        if not waiting:
            raise InvalidInputError(
                "No calibration batch was given, so there is nothing to fit to. Pass at least one."
            )
        runs = LayerRuns(twin, units)
        layerwise = len(groups) > 1 and _runs_in_parts(runs, waiting[0])
    bar.total = len(groups) * len(waiting)
    for group in groups:
        device = next(twin.parameters()).device
        place = device if device.type == "cuda" else torch.device("cpu")
        grams = [torch.zeros(units[i].count, units[i].count, device=place) for i in group]  # no inference tensors
        with torch.inference_mode():
            for entry in waiting:
                with _adding(twin, [units[i] for i in group], grams, entry):
                    if layerwise:
                        skip = runs.skipping(group[0], entry.output) if group[0] else contextlib.nullcontext()
                        with skip:
                            entry.output = runs.until(group[-1], entry.run)
                    else:
                        entry.run()
                bar.update()
        while grams:
            yield grams.pop(0)


def _groups(units: Sequence[Unit], memory: int) -> list[list[int]]:
    """Cut the layers into runs whose second moments fit in memory together."""
    groups: list[list[int]] = []
    left = 0
    for index, unit in enumerate(units):
        needed = 4 * unit.count**2
        if needed > memory:
            raise InvalidInputError(
                f"The second moments of the {unit.count} neurons of layer {index} take {needed:,} bytes; memory is "
                f"{memory:,}. Give it at least that."
            )
        if not groups or needed > left:
            groups.append([])
            left = memory
        groups[-1].append(index)
        left -= needed
    return groups


def _wait(model: Any, batch: dict[str, Any]) -> _Waiting:
    """Bring a batch to the decoder's door."""
    calls, _ = decoder_calls(model, batch, enter=False)
    decoder, samples = text_decoder(model), batch_size(batch)
    if decoder is model or len(calls) != 1:
        return _Waiting(lambda: first_tensor(model(**batch, use_cache=False)), samples, _mask(batch))
    args, kwargs = calls[0]
    return _Waiting(lambda: first_tensor(decoder(*args, **kwargs)), samples, _mask(batch))


def _mask(batch: dict[str, Any]) -> torch.Tensor | None:
    name = "decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask"
    return token_mask(batch, batch[name].shape[-1]) if batch.get(name) is not None else None


def _runs_in_parts(runs: LayerRuns, entry: _Waiting) -> bool:
    result, outputs = runs.record(entry.run)
    return runs.skips_exactly(entry.run, result, outputs) and runs.rank == sorted(runs.rank)


@contextlib.contextmanager
def _adding(model: nn.Module, units: Sequence[Unit], grams: Sequence[torch.Tensor], entry: _Waiting) -> Iterator[None]:
    """Add the activations of one batch to the second moments while the context lasts."""

    def add_to(gram: torch.Tensor) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(entry.samples, -1, args[0].shape[-1])
            if entry.mask is not None and entry.mask.shape[1] != x.shape[1]:
                raise InvalidInputError(
                    f"The decoder sees {x.shape[1]} tokens per sample, the attention mask {entry.mask.shape[1]}: padding "
                    "cannot be told apart from tokens. Use batches of one sample, or of samples of equal length."
                )
            rows = (x.flatten(0, 1) if entry.mask is None else x[entry.mask]).to(gram.device, torch.float32)
            gram.addmm_(rows.T, rows)

        return hook

    handles = [
        unit.modules(model)[1].register_forward_pre_hook(add_to(gram)) for unit, gram in zip(units, grams, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
