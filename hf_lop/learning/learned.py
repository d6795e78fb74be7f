"""What is known about a model from data: what a pruner keeps, without its predictor, and all that methods and recoveries need."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_lop.errors import CheckpointMismatchError
from hf_lop.learning.data import fingerprint
from hf_lop.learning.sketch import Sketch
from hf_lop.learning.statistics import Statistics
from hf_lop.units.kept import sorted_by
from hf_lop.units.size import ModelSize


@dataclass(frozen=True, slots=True)
class Learned:
    """What calibration found out about the units of a model. L is their number, n their pieces.

    Attributes:
        size (`ModelSize`): of the dense model, also where some pieces are left out.
        dtype (`str`): of the weights of its units.
        order (`list[torch.Tensor]`): `[L]`, pieces of each unit from most to least important, `[n] int64`.
        statistics (`list[Statistics]`): `[L]`, of the entries of all pieces.
        sketches (`list[Sketch]`): `[L]`; empty if there is none.
        sorted_by (`str`, *optional*): digest of the order by which the pieces were sorted, if they were.
        identity (`torch.Tensor`, *optional*): `[K] int16`, see [`sample_weights`][hf_lop.units.identity.sample_weights].
    """

    size: ModelSize
    dtype: str
    order: list[torch.Tensor]
    statistics: list[Statistics]
    sketches: list[Sketch]
    sorted_by: str | None = None
    identity: torch.Tensor | None = None

    def directions(self, layer: int) -> torch.Tensor:
        """Return the sketch of second moments of one unit, B `[r, n] float32`; there must be one."""
        return self.sketches[layer].directions()

    def checked_order(self) -> list[torch.Tensor]:
        """Return the order of every unit.

        Raises:
            CheckpointMismatchError: if one is no permutation of its pieces.
        """
        for layer, order in enumerate(self.order):
            if not torch.equal(order.sort().values, torch.arange(len(order))):
                raise CheckpointMismatchError(
                    f"The neuron order of layer {layer} is no permutation of its {len(order)} neurons. "
                    "The pruner's model.safetensors is damaged: download it again."
                )
        return self.order

    def digest(self) -> str:
        """Return a fingerprint of what recoveries read."""
        measured = [{name: getattr(layer, name) for name in Statistics.__slots__} for layer in self.statistics]
        return fingerprint([*measured, *({"codes": sketch.codes, "scale": sketch.scale} for sketch in self.sketches)])

    def sorted(self) -> "Learned":
        """Return what is known of the same model with the pieces of every unit sorted by this order.

        Raises:
            CheckpointMismatchError: if the order is damaged.
        """
        statistics, sketches = [], []
        for layer, order in enumerate(self.checked_order()):
            measured, sketch = self._columns(layer, order)
            statistics.append(measured)
            sketches += sketch
        return replace(
            self,
            order=[torch.arange(len(order)) for order in self.order],
            statistics=statistics,
            sketches=sketches,
            sorted_by=order_digest(self.order),
            identity=None,  # the sorted model has other rows where this one was sampled
        )

    def of_kept(self, kept: Sequence[torch.Tensor]) -> "Learned":
        """Return what is known of a cut model: of the pieces that it kept, by their numbers there.

        Args:
            kept (`Sequence[torch.Tensor]`): `[L]`, their numbers in the dense model, `[k] int64`, in their order in the cut one.

        Raises:
            CheckpointMismatchError: if the order is damaged.
        """
        orders, statistics, sketches = [], [], []
        for layer, (order, pieces) in enumerate(zip(self.checked_order(), kept, strict=True)):
            rank = torch.empty_like(order)
            rank[order] = torch.arange(len(order))
            orders.append(rank[pieces].argsort())
            measured, sketch = self._columns(layer, pieces)
            statistics.append(measured)
            sketches += sketch
        return replace(self, order=orders, statistics=statistics, sketches=sketches)

    def _columns(self, layer: int, pieces: torch.Tensor) -> tuple[Statistics, list[Sketch]]:
        """Return statistics and sketch of some pieces of a layer, in the order given."""
        block = self.size.block
        columns = (pieces.unsqueeze(1) * block + torch.arange(block)).flatten()
        measured = self.statistics[layer]
        sketches = [
            Sketch(sketch.codes[columns], sketch.scale[columns]) for sketch in self.sketches[layer : layer + 1]
        ]
        return Statistics(*(getattr(measured, name)[columns] for name in Statistics.__slots__)), sketches

    def of_model(self, config: Any) -> "Learned":
        """Return what is known of the model with this config: sorted, where that says it was sorted by this very order.

        Args:
            config (`PreTrainedConfig`): of the model.

        Raises:
            CheckpointMismatchError: if the order is damaged.
        """
        mark = sorted_by(config)
        if mark is None or self.sorted_by or mark != order_digest(self.checked_order()):
            return self
        return self.sorted()


def order_digest(order: Sequence[torch.Tensor]) -> str:
    """Return the SHA-256 of an order, by which a sorted model and its pruner know each other."""
    numbers = torch.cat(list(order)).numpy().astype("<u4")
    return hashlib.sha256(numbers.tobytes()).hexdigest()
