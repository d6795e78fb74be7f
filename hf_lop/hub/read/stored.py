"""Which stored tensors of a checkpoint hold the pieces of a model's units, and where along their axes."""

from collections.abc import Sequence
from typing import NamedTuple

from hf_lop.errors import UnsupportedModelError
from hf_lop.hub.read.skeleton import Skeleton
from hf_lop.units.unit import Slot, Unit, is_prefix, runs


class StoredPieces(NamedTuple):
    """Where the pieces of one unit are in a stored tensor.

    Attributes:
        layer (`int`): index of the unit among all.
        unit (`Unit`): the unit.
        slots (`tuple[Slot, ...]`): its slots in this tensor; they share an axis.
        size (`int`): entries along that axis.
    """

    layer: int
    unit: Unit
    slots: tuple[Slot, ...]
    size: int

    @property
    def axis(self) -> int:
        """Axis along which the pieces lie."""
        return self.slots[0].axis

    @property
    def output(self) -> bool:
        """Whether it is the output projection."""
        return self.slots[0].output

    @property
    def is_prefix(self) -> bool:
        """Whether the first pieces are the first entries of the axis; where that is 0, they are the first bytes."""
        return is_prefix(self.slots, self.size, self.unit.count)

    def runs(self, width: int) -> list[tuple[int, int]]:
        """Return the `[start, stop)` runs of entries that are left with the first `width` pieces."""
        return runs(self.slots, self.size, self.unit.count, width)

    def length(self, width: int) -> int:
        """Return how many entries are left with `width` pieces."""
        return sum(stop - start for start, stop in self.runs(width))


def stored_pieces(skeleton: Skeleton, units: Sequence[Unit]) -> dict[str, StoredPieces]:
    """Find the tensors of a model's units in its checkpoint.

    Args:
        skeleton (`Skeleton`): of the dense model.
        units (`Sequence[Unit]`): its L units.

    Returns:
        `dict`: by name of the stored tensor.

    Raises:
        UnsupportedModelError: if a tensor is not stored as the model has it.
    """
    found: dict[str, StoredPieces] = {}
    for layer, unit in enumerate(units):
        for (path, own), slots in unit.tensors.items():
            parameter = getattr(skeleton.model.get_submodule(path), own)
            name = skeleton.source(parameter)
            if name is None:
                raise UnsupportedModelError(
                    f"{path}.{own} is stored in another form than the model has it, so that it cannot be read "
                    "by prefixes. Load the whole model, and prune it."
                )
            found[name] = StoredPieces(layer, unit, slots, parameter.shape[slots[0].axis])
    return found
