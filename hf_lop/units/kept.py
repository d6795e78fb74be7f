"""Which pieces of the dense model a cut one still has: its modules remember them, so that copies and parts of it do as well.

Further cuts, adapters of the dense model and comparisons of two cuts all speak of pieces by their numbers in the dense model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lop.errors import CheckpointMismatchError
from hf_lop.units.checks import DENSE_WIDTH
from hf_lop.units.configs import text_configs
from hf_lop.units.unit import Slot, Unit, entries, resized

ATTRIBUTE = "lop_kept"

# Reads entries `[count]` of a parameter: those from the flat index `start` on.
Read = Callable[[torch.Tensor, int, int], torch.Tensor]


def note_kept(model: nn.Module, units: Sequence[Unit], kept: Sequence[torch.Tensor]) -> None:
    """Remember which pieces stay, at the module around each unit.

    Args:
        model (`nn.Module`): the model that the units were found in.
        units (`Sequence[Unit]`): some or all of its units.
        kept (`Sequence[torch.Tensor]`): one `[k] int64` per unit, in the order of the pieces there, by the numbers that they had
            before this cut.
    """
    for unit, indices in zip(units, kept, strict=True):
        module = model.get_submodule(unit.path)
        known: dict[str, torch.Tensor] = vars(module).get(ATTRIBUTE, {})
        numbers = known[unit.kind][indices.cpu()] if unit.kind in known else indices.cpu()
        # A new dict, as copies of a module share the one that is there; and no buffer, which loaders and wrappers would move.
        vars(module)[ATTRIBUTE] = {**known, unit.kind: numbers}


def noted(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return what the modules of a model remember: the kept pieces of every unit `[k] int64`, by kind; empty if nothing."""
    found: dict[str, list[torch.Tensor]] = {}
    for module in model.modules():
        for kind, kept in vars(module).get(ATTRIBUTE, {}).items():
            found.setdefault(kind, []).append(kept)
    return found


def sorted_by(config: Any) -> str | None:
    """Return the digest of the order by which the pieces of a model, or of the one that it was cut from, are sorted, if any."""
    mark, made = (getattr(config, name, None) for name in ("elastic_config", "pruning_config"))
    found = mark.get("order") if isinstance(mark, dict) else made.get("sorted_by") if isinstance(made, dict) else None
    return found if isinstance(found, str) else None


@dataclass(frozen=True, slots=True)
class Earlier:
    """A cut that a model has behind it.

    Attributes:
        units (`list[Unit]`): its L units, as they are.
        kept (`list[torch.Tensor]`): `[L]`, their pieces by the numbers of the dense model, `[k] int64`.
        dense (`tuple[int, ...]`): `[L]` pieces that the dense model has.
        made (`Mapping`): its `pruning_config`.
    """

    units: list[Unit]
    kept: list[torch.Tensor]
    dense: tuple[int, ...]
    made: Mapping[str, Any]

    @property
    def counts(self) -> list[int]:
        """Pieces that are left, `[L]`."""
        return [unit.count for unit in self.units]

    def tensors(self, model: nn.Module) -> dict[int, "CutTensor"]:
        """Return the parameters that were cut, by their id."""
        found = {}
        for unit, kept, count in zip(self.units, self.kept, self.dense, strict=True):
            for (path, name), slots in resized(unit, count).tensors.items():
                parameter = getattr(model.get_submodule(path), name)
                shape, axis = list(parameter.shape), slots[0].axis
                shape[axis] += (count - unit.count) * sum(slot.block * slot.parts for slot in slots)
                index = entries(slots, shape[axis], count, kept)
                changed = slots[0].output and self.made.get("recovery") is not None
                found[id(parameter)] = CutTensor(tuple(shape), slots, index, changed)
        return found


@dataclass(frozen=True, slots=True)
class CutTensor:
    """One parameter of a cut unit.

    Attributes:
        shape (`tuple[int, ...]`): what it had in the dense model.
        slots (`tuple[Slot, ...]`): where the pieces lay there.
        index (`torch.Tensor`): `[m] int64`, which entries of the axis stayed, in their order here.
        changed (`bool`): whether a recovery gave it other numbers.
    """

    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    index: torch.Tensor
    changed: bool

    def read(self, read: Read, parameter: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read entries of the dense tensor, from the flat index `start` on, inside one row.

        Returns:
            `tuple`: the entries `[count]`, and which of them are known `[count] bool`; the others went or were changed.
        """
        axis, width = self.slots[0].axis, self.shape[-1]
        place = torch.full((self.shape[axis],), -1)
        place[self.index] = torch.arange(len(self.index))
        row, column = divmod(start, width)
        own_width = parameter.shape[-1]
        if axis == len(self.shape) - 1:
            columns = place[column : column + count]
        else:
            columns, row = torch.arange(column, column + count), int(place[row])
        known = (columns >= 0) & (row >= 0) & (not self.changed)
        if not known.any():
            return torch.zeros(count), known
        found = read(parameter, row * own_width, own_width).cpu()[columns.clamp_min(0)]
        return torch.where(known, found, torch.zeros_like(found)), known


def check_pieces(kept: Sequence[torch.Tensor], counts: Sequence[int], dense: Sequence[int]) -> None:
    """Refuse pieces that cannot be those of a model.

    Args:
        kept (`Sequence[torch.Tensor]`): `[L]`, their numbers in the dense model.
        counts (`Sequence[int]`): `[L]` pieces of the model.
        dense (`Sequence[int]`): `[L]` pieces of the dense model.

    Raises:
        CheckpointMismatchError: if they are not.
    """
    for layer, (pieces, count, all_of) in enumerate(zip(kept, counts, dense, strict=True)):
        distinct = pieces.unique()
        if len(pieces) != count or len(distinct) != count or int(distinct[0]) < 0 or int(distinct[-1]) >= all_of:
            raise CheckpointMismatchError(
                f"Layer {layer} has {count} of {all_of} pieces, but {len(distinct)} are noted as kept, or others than there were. "
                "Take the model from its repository again, with all of its files from one commit."
            )


def dense_counts(model: Any, units: Sequence[Unit]) -> tuple[int, ...]:
    """Return how many pieces the units of a cut model had, `[L]`, by its config.

    Raises:
        CheckpointMismatchError: if that does not say so.
    """
    made = getattr(model.config, "pruning_config", None)
    listed = made.get("dense_widths") if isinstance(made, dict) else None
    if listed is None:
        listed = [getattr(text_configs(model)[0], DENSE_WIDTH, None)] * len(units)
    right = isinstance(listed, list) and len(listed) >= len(units)  # the first layers of a model are one, too
    if not right or not all(type(n) is int and n >= unit.count for n, unit in zip(listed, units, strict=False)):
        raise CheckpointMismatchError(
            f"The config says that the dense model had the widths {str(listed)[:100]}; there must be a number for every layer, at "
            "least what it has now. Take the model from its repository again."
        )
    return tuple(listed[: len(units)])
