"""Single-layer probes: what cutting one layer costs, in the dense model and among layers that are cut themselves."""

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import torch

from hf_lop.learning.bench import Bench
from hf_lop.learning.decoder.layers import LayerRuns
from hf_lop.learning.decoder.replay import Recorded
from hf_lop.units.views import ElasticModel


def probe_layers(
    bench: Bench, ratios: Sequence[float], contexts: Sequence[float] = (0.0,), blocks: Sequence[int] | None = None
) -> np.ndarray:
    """Measure what cutting each single layer costs: KL(dense || only layer l cut to ratio r), mean over predictions.

    The additive approximation of operation pruning (DOP) adds these up. In a context c above 0 all other layers are cut to
    the ratio c, and what counts is what the cut of layer l adds there:
    KL(dense || layer l cut to r, others to c) - KL(dense || layer l whole, others cut to c).

    A probe of layer l starts at layer l, from what the model computed before it, where the layers allow that (checked on
    every batch). Only one batch of distributions, and of every layer's output, is held at a time; for other memory see
    [`ElasticModel`].

    Args:
        bench (`Bench`): the dense model, its order and the batches. Of several processes each probes every n-th batch, so that
            the dense model runs no more than once on any.
        ratios (`Sequence[float]`): P pruning ratios to probe, each in (0, 1].
        contexts (`Sequence[float]`): C ratios of all other layers, each in [0, 1); 0 is the dense model.
        blocks (`Sequence[int]`, *optional*): `[L]`; widths are the nearest multiples of them.

    Returns:
        `np.ndarray`: `[C, L, P] float64` divergences in nats per prediction.

    Raises:
        InvalidInputError: if there is no batch with a prediction to score.
    """
    elastic, processes = bench.elastic, bench.processes
    runs = LayerRuns(elastic.model, elastic.units)
    bar = processes.bar(bench.recorded, "probing layers")
    blocks = blocks or [1] * len(elastic.units)
    shares = processes.gather(lambda: [_probe(elastic, runs, entry, ratios, contexts, blocks) for entry in bar])
    sums, counts = zip(*(entry for share in shares for entry in share), strict=True)
    total: np.ndarray = np.apply_along_axis(math.fsum, 0, np.stack(sums))  # exact, whatever the order of the batches
    return total / sum(counts)


def probed_width(count: int, ratio: float, block: int) -> int:
    """Return the width at which a ratio is probed: the nearest whole blocks, at least one; 0 removes nothing."""
    return count if not ratio else max(block, round(count * (1 - ratio) / block) * block)


@torch.inference_mode()
def _probe(
    elastic: ElasticModel,
    runs: LayerRuns,
    entry: Recorded,
    ratios: Sequence[float],
    contexts: Sequence[float],
    blocks: Sequence[int],
) -> tuple[np.ndarray, int]:
    """Return the divergences `[C, L, P] float64` of one batch, summed over its predictions, and their number."""
    units = elastic.units

    def predict() -> torch.Tensor:
        return entry.logits(elastic.model)

    def width(layer: int, ratio: float) -> int:
        return probed_width(units[layer].count, ratio, blocks[layer])

    def divergence(widths: Sequence[int]) -> float:
        elastic.set_widths(widths)
        cut = predict().float().log_softmax(-1)
        return float((dense.exp() * (dense - cut)).sum())

    elastic.set_widths([unit.count for unit in units])
    logits, outputs = runs.record(predict)
    dense = logits.float().log_softmax(-1)
    total = np.zeros((len(contexts), len(units), len(ratios)))
    for found, context in zip(total, contexts, strict=True):
        others = [width(layer, context) for layer in range(len(units))]
        if context:
            elastic.set_widths(others)
            logits, outputs = runs.record(predict)
        skips = runs.skips_exactly(predict, logits, outputs)
        for layer in range(len(units)):
            before = runs.before(layer) if skips else None
            cuts = [[*others[:layer], width(layer, ratio), *others[layer + 1 :]] for ratio in (0.0, *ratios)]
            with runs.skipping(layer, outputs[before]) if before is not None else contextlib.nullcontext():
                whole = divergence(cuts[0]) if context else 0.0
                found[layer] = [divergence(widths) - whole for widths in cuts[1:]]
    return total, len(dense)
