"""Second moments of the neurons of every layer, G = X^T X, from one pass over calibration batches.

X `[T, n]` holds the activations of a layer's n neurons (the input of the FFN's output projection) at all T tokens that are
not padding. G takes 4 n^2 bytes, 1.4 GB for a layer of Qwen2.5-VL-7B, so the layers are done in groups that fit in a
memory limit: all batches go through the layers of one group, and wait behind it for the next.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from hf_lop.errors import InvalidInputError
from hf_lop.learning.decoder.batches import Tokens, check_numbers
from hf_lop.learning.decoder.door import at_the_door
from hf_lop.learning.decoder.layers import LayerRuns
from hf_lop.units.slice import watching
from hf_lop.units.unit import Unit
from hf_lop.units.views import shadow


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
        waiting = at_the_door(twin, batches)
        runs = LayerRuns(twin, units)
        layerwise = len(groups) > 1 and _runs_in_parts(runs, partial(waiting[0].run, twin))
    passed: list[Any] = [None] * len(waiting)  # of every batch the output of the last layer that it went through
    bar.total = len(groups) * len(waiting)
    for group in groups:
        device = next(twin.parameters()).device
        place = device if device.type == "cuda" else torch.device("cpu")
        grams = [
            torch.zeros(units[i].features, units[i].features, device=place) for i in group
        ]  # no inference tensors
        with torch.inference_mode():
            for index, batch in enumerate(waiting):
                run = partial(batch.run, twin)

                def add(
                    layer: int,
                    x: torch.Tensor,
                    grams: Any = grams,
                    tokens: Tokens = batch.tokens,
                    index: int = index,
                    group: list[int] = group,
                ) -> None:
                    rows = tokens.rows(x).to(grams[layer].device, torch.float32)
                    grams[layer].addmm_(rows.T, rows)  # G += X^T X
                    check_numbers(
                        grams[layer].diagonal(), "Recovery", index, f"activations in layer {group[layer]}", twin
                    )

                with watching(twin, [units[i] for i in group], add):
                    if layerwise:
                        skip = runs.skipping(group[0], passed[index]) if group[0] else contextlib.nullcontext()
                        with skip:
                            passed[index] = runs.until(group[-1], run)
                    else:
                        run()
                bar.update()
        while grams:
            yield grams.pop(0)


def _groups(units: Sequence[Unit], memory: int) -> list[list[int]]:
    """Cut the layers into runs whose second moments fit in memory together."""
    groups: list[list[int]] = []
    left = 0
    for index, unit in enumerate(units):
        needed = 4 * unit.features**2
        if needed > memory:
            raise InvalidInputError(
                f"The second moments of the {unit.features} neurons of layer {index} take {needed:,} bytes; memory is "
                f"{memory:,}. Give it at least that."
            )
        if not groups or needed > left:
            groups.append([])
            left = memory
        groups[-1].append(index)
        left -= needed
    return groups


def _runs_in_parts(runs: LayerRuns, run: Callable[[], torch.Tensor]) -> bool:
    result, outputs = runs.record(run)
    return runs.skips_exactly(run, result, outputs) and runs.rank == sorted(runs.rank)
