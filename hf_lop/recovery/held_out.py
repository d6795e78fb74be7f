"""Whether a recovery helps: judged on batches that it is not fitted to, against the dense model's answers."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_lop.learning.decoder.batches import Tokens, check_any, check_numbers
from hf_lop.learning.decoder.replay import record_batches
from hf_lop.learning.divergence import DenseTop
from hf_lop.learning.statistics import evaluating
from hf_lop.recovery.by_layer import set_output_weights
from hf_lop.units.slice import output_weight
from hf_lop.units.unit import Unit

Batches = Sequence[Mapping[str, Any]]
SHARE = 5  # one batch of so many is held out


def too_few(batches: Batches, widest: int) -> str | None:
    """Say so where batches have fewer real tokens than the widest layer keeps entries: least squares then fits noise."""
    check_any(len(batches))
    tokens = 0
    for batch in batches:
        mask = Tokens.of(batch).mask
        ids = next(
            batch[key] for key in ("decoder_input_ids", "input_ids", "inputs_embeds") if batch.get(key) is not None
        )
        tokens += ids.shape[0] * ids.shape[1] if mask is None else int(mask.sum())
    if tokens >= widest:
        return None
    return f"data has {tokens} tokens for layers that keep up to {widest} neurons; least squares on so few does harm"


def split(model: Any, batches: Batches) -> tuple[Batches, Batches]:
    """Split batches into those to fit to and those held out; none are where there is one batch, or no vocabulary."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if len(batches) < 2 or head is None:
        return batches, []
    count = max(1, len(batches) // SHARE)
    return batches[:-count], batches[-count:]


class HeldOut:
    """The dense model's answers to batches, against which cut models are compared.

    Memory: what [`record_batches`] records of every batch, and 2 kB per prediction.
    """

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        """Run the dense model on batches of model inputs.

        Raises:
            InvalidInputError: if its answers are no numbers, by which nothing can be judged.
        """
        self._recorded = record_batches(model, batches)
        answers = self._log_q(model)
        for number, log_p in enumerate(answers):
            check_numbers(log_p[:, 0].nan_to_num(math.nan, 0, 0), "Held-out", number, "predictions")
        self._dense = [DenseTop.of(log_p) for log_p in answers]

    def divergence(self, model: nn.Module) -> float:
        """Return KL(dense || model), the mean over all predictions, in nats."""
        found = [dense.divergence(log_q) for dense, log_q in zip(self._dense, self._log_q(model), strict=True)]
        return float(torch.cat(found).double().mean())

    def _log_q(self, model: nn.Module) -> list[torch.Tensor]:
        with evaluating(model):
            return [entry.logits(model).float().log_softmax(-1) for entry in self._recorded]

    def set_if_better(self, model: nn.Module, units: Sequence[Unit], weights: Sequence[torch.Tensor]) -> bool:
        """Give a cut model recovered output projections, and take them back where they make its answers worse.

        Memory: the output projections of the cut model, a second time.

        Args:
            model (`nn.Module`): the cut model.
            units (`Sequence[Unit]`): its units.
            weights (`Sequence[torch.Tensor]`): `[d, k]` per unit.

        Returns:
            `bool`: whether it has them now; a warning says so if not.
        """
        before, old = self.divergence(model), [output_weight(model, unit).clone() for unit in units]
        set_output_weights(model, units, weights)
        after = self.divergence(model)
        if after <= before:
            return True
        set_output_weights(model, units, old)
        warnings.warn(
            f"On held-out data the recovered model is {after:.3g} nats from the dense one, the cut one {before:.3g}: it was not "
            "recovered. Give more data, and of the kind that the model is for.",
            stacklevel=4,
        )
        return False
