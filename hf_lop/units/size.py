"""What a model costs, and each of the pieces that can be removed from it: numbers alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The size of a dense model, and by how much it shrinks with every piece.

    L is the number of units, one per decoder layer; for FFNs pieces are neurons.

    Attributes:
        widths (`tuple[int, ...]`): `[L]` pieces of each unit.
        hidden_size (`int`): features that enter and leave a unit.
        projections (`int`): matrices that have a row or column of every neuron: 3 for a gated FFN, else 2.
        parameters (`int`): of the whole model, vision tower included; tied ones count once.
        num_bytes (`int`): of all parameters in their dtypes.
        flops (`int`): multiply and add operations of all matrix products of the text decoder and the vocabulary
            projection for one token; attention over earlier tokens is not in it.
        neuron_parameters (`tuple[int, ...]`): `[L]` parameters of one piece.
        neuron_bytes (`tuple[int, ...]`): `[L]` bytes of one piece.
        block (`int`): entries of a piece in the input of the output projection.
        piece_flops (`tuple[int, ...]`, *optional*): `[L]` FLOPs of one piece for one token; by default those of
            `projections` matrices with `hidden_size` entries each.
    """

    widths: tuple[int, ...]
    hidden_size: int
    projections: int
    parameters: int
    num_bytes: int
    flops: int
    neuron_parameters: tuple[int, ...]
    neuron_bytes: tuple[int, ...]
    block: int = 1
    piece_flops: tuple[int, ...] | None = None

    def parameters_at(self, widths: Sequence[int]) -> int:
        """Return the number of parameters with the given widths `[L]`."""
        return self.parameters - self._removed(widths, self.neuron_parameters)

    def bytes_at(self, widths: Sequence[int]) -> int:
        """Return the bytes of all parameters with the given widths `[L]`."""
        return self.num_bytes - self._removed(widths, self.neuron_bytes)

    def flops_at(self, widths: Sequence[int]) -> int:
        """Return the FLOPs per token with the given widths `[L]`."""
        usual = [2 * self.projections * self.hidden_size] * len(self.widths)
        return self.flops - self._removed(widths, self.piece_flops or usual)

    def before(self, dense: Sequence[int]) -> "ModelSize":
        """Return the size that a cut model, which this is of, had with the dense widths `[L]`."""
        return replace(
            self,
            widths=tuple(dense),
            parameters=self.parameters_at(dense),
            num_bytes=self.bytes_at(dense),
            flops=self.flops_at(dense),
        )

    def _removed(self, widths: Sequence[int], cost: Sequence[int]) -> int:
        return sum((n - int(k)) * c for n, k, c in zip(self.widths, widths, cost, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name; without those that say nothing new, so that they read as they always did."""
        values = asdict(self)
        if self.block == 1:
            del values["block"]
        if self.piece_flops is None:
            del values["piece_flops"]
        return values
