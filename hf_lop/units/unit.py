"""What can be removed from a model piece by piece, and where the pieces are: `Unit` and `Slot`, and cutting over slots.

Every repository of a pruned model carries a copy of this file beside `modeling_lop.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """Where the pieces of a unit lie in one parameter.

    Along `axis`, piece j has the entries `start + p * stride + j * block` to `start + p * stride + (j + 1) * block` for
    every part p. A projection of an FFN has one part with blocks of one row; a fused gate-up projection two parts, gate
    rows, then up rows; key rows of a fused q|k|v projection start behind the query rows, in blocks of a head.

    Attributes:
        module (`str`): dotted path of the module, from the model that was searched.
        tensor (`str`): name of its parameter.
        axis (`int`): axis along which the pieces lie.
        start (`int`): first entry of the first piece.
        block (`int`): entries of a piece, in every part.
        parts (`int`): how often all pieces come in turn.
        stride (`int`): entries from the beginning of one part to that of the next; 0 where there is one part.
        output (`bool`): whether the tensor reads the pieces (columns of an output projection), or makes them.
    """

    module: str
    tensor: str
    axis: int
    start: int = 0
    block: int = 1
    parts: int = 1
    stride: int = 0
    output: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """What of one decoder layer can be removed piece by piece, such as the neurons of its FFN.

    Attributes:
        kind (`str`): a key of `KINDS`, such as "neurons".
        layer (`int`): index of the decoder layer.
        path (`str`): dotted path of the module around all slots, from the model that was searched.
        count (`int`): number of pieces, n.
        slots (`tuple[Slot, ...]`): all places of the pieces; exactly one of them is the output.
        fields (`tuple`): `(field, per piece)`: config fields that list `count * per piece` for every layer.
        ints (`tuple`): `(module, attribute, per piece)`: numbers of a module that are `count * per piece`.
        step (`int`): counts are multiples of it.
        floor (`int`): the least count.
    """

    kind: str
    layer: int
    path: str
    count: int
    slots: tuple[Slot, ...]
    fields: tuple[tuple[str, int], ...] = ()
    ints: tuple[tuple[str, str, int], ...] = ()
    step: int = 1
    floor: int = 1

    @property
    def output(self) -> Slot:
        """The slot of the output projection."""
        return next(slot for slot in self.slots if slot.output)

    def modules(self, model: "nn.Module") -> tuple[list[Any], Any]:
        """Return the modules of `model` whose rows make the pieces, and the one whose columns read them."""
        inputs = dict.fromkeys(slot.module for slot in self.slots if not slot.output)
        return [model.get_submodule(path) for path in inputs], model.get_submodule(self.output.module)

    @property
    def block(self) -> int:
        """Entries of a piece in the input of the output projection."""
        return self.output.block

    @property
    def features(self) -> int:
        """Entries of all pieces in the input of the output projection."""
        return self.count * self.block

    @property
    def tensors(self) -> dict[tuple[str, str], tuple[Slot, ...]]:
        """The slots by module and tensor, in order of their first: several of one tensor are cut in one take."""
        found: dict[tuple[str, str], tuple[Slot, ...]] = {}
        for slot in self.slots:
            key = slot.module, slot.tensor
            found[key] = (*found.get(key, ()), slot)
        return found

    def columns(self, pieces: "torch.Tensor") -> "torch.Tensor":
        """Return the entries `[k * block] int64` of pieces `[k] int64` in the input of the output projection."""
        return pieces if self.block == 1 else _spread(pieces, self.block)


def _spread(pieces: "torch.Tensor", block: int) -> "torch.Tensor":
    import torch

    return (pieces.unsqueeze(1) * block + torch.arange(block, device=pieces.device)).flatten()


def segments(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """Return where all pieces of one tensor begin, and the entries of each: `(begin, block)`, ascending."""
    return sorted((slot.start + part * slot.stride, slot.block) for slot in slots for part in range(slot.parts))


def runs(slots: Sequence[Slot], size: int, count: int, width: int) -> list[tuple[int, int]]:
    """Return what is left of one tensor's axis where the first `width` of `count` pieces stay.

    Args:
        slots (`Sequence[Slot]`): all slots of the tensor.
        size (`int`): entries along the axis.
        count (`int`): pieces.
        width (`int`): pieces that stay, from the first on.

    Returns:
        `list[tuple[int, int]]`: `[start, stop)` runs of entries, ascending; entries of no piece stay.
    """
    left, done = [], 0
    for begin, block in segments(slots):
        left += [(done, begin), (begin, begin + width * block)]
        done = begin + count * block
    joined: list[tuple[int, int]] = []
    for start, stop in [*left, (done, size)]:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def entries(slots: Sequence[Slot], size: int, count: int, kept: "torch.Tensor") -> "torch.Tensor":
    """Return the entries of one tensor's axis that stay, `[m] int64`: of kept pieces `[k] int64`, in the order of these."""
    import torch

    def all_of(start: int, stop: int) -> torch.Tensor:
        return torch.arange(
            start, stop, device=kept.device
        )  # models are built where the meta device is the default one

    left, done = [], 0
    for begin, block in segments(slots):
        left += [all_of(done, begin), begin + (kept if block == 1 else _spread(kept, block))]
        done = begin + count * block
    return torch.cat([part for part in [*left, all_of(done, size)] if len(part)])


def is_prefix(slots: Sequence[Slot], size: int, count: int) -> bool:
    """Whether the first pieces are the first entries: one run of pieces and nothing else along the axis."""
    return len(runs(slots, size, count, 0)) == 0 and len(segments(slots)) == 1


def resized(unit: Unit, count: int) -> Unit:
    """Return the unit as it is after a cut to `count` pieces: what lies behind pieces of the same tensor moves up."""
    gone = unit.count - count
    moved = {}
    for slots in unit.tensors.values():
        for slot in slots:

            def lost(start: int, stop: int, slots: tuple[Slot, ...] = slots) -> int:
                return gone * sum(block for begin, block in segments(slots) if start <= begin < stop)

            start = slot.start - lost(0, slot.start)
            stride = slot.stride - lost(slot.start, slot.start + slot.stride)
            moved[slot] = dataclasses.replace(slot, start=start, stride=stride)
    return dataclasses.replace(unit, count=count, slots=tuple(moved[slot] for slot in unit.slots))


def linear_shape(module: Any) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear-like module (`Linear` or `Conv1D`), else None."""
    if hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight"):
        return int(module.in_features), int(module.out_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def linear_axes(module: Any) -> tuple[int, int]:
    """Return along which axes of its weight a linear-like module has outputs and inputs."""
    return (0, 1) if hasattr(module, "in_features") else (1, 0)  # Conv1D stores [in, out], Linear [out, in]


def linear_slots(path: str, module: Any, *, output: bool, parts: int = 1, count: int = 0) -> list[Slot]:
    """Return the slots of a projection whose rows make the pieces, with its bias, or whose columns read them.

    Args:
        path (`str`): of the projection.
        module (`nn.Module`): the projection.
        output (`bool`): whether it reads the pieces.
        parts (`int`): 2 for a fused projection.
        count (`int`): pieces; needed for more than one part.
    """
    rows, columns = linear_axes(module)
    if output:
        return [Slot(path, "weight", columns, output=True)]
    stride = count if parts > 1 else 0
    slots = [Slot(path, "weight", rows, parts=parts, stride=stride)]
    if getattr(module, "bias", None) is not None:
        slots.append(Slot(path, "bias", 0, parts=parts, stride=stride))
    return slots


def note_size(module: Any, tensor: str, axis: int, size: int) -> None:
    """Let a linear-like module say how many outputs or inputs its weight has."""
    if tensor == "weight" and linear_shape(module) is not None:
        rows = axis == linear_axes(module)[0]
        linear = hasattr(module, "in_features")
        setattr(module, ("out_features" if rows else "in_features") if linear else ("nf" if rows else "nx"), size)


def set_ints(model: "nn.Module", unit: Unit, count: int) -> None:
    """Write a count into the numbers that modules keep of it."""
    for path, name, per in unit.ints:
        setattr(model.get_submodule(path), name, count * per)


def take(model: "nn.Module", unit: Unit, kept: "torch.Tensor", also: Callable[[], None] = lambda: None) -> Unit:
    """Keep some pieces of a unit, in place: all of its tensors or, where something stops this before, none.

    Args:
        model (`nn.Module`): the model that the unit was found in.
        unit (`Unit`): the unit to cut.
        kept (`torch.Tensor`): `[k] int64`, the pieces to keep, in the order they shall have.
        also (`Callable`): called with the change, perhaps twice, such as to write it into a config.

    Returns:
        `Unit`: the same place with its new count.
    """
    from torch import nn

    new: list[tuple[Any, str, int, Any]] = []
    for (path, name), slots in unit.tensors.items():
        module, axis = model.get_submodule(path), slots[0].axis
        tensor = getattr(module, name)
        index = entries(slots, tensor.shape[axis], unit.count, kept).to(tensor.device)
        taken = tensor.detach().index_select(axis, index)
        new.append((module, name, axis, nn.Parameter(taken, requires_grad=tensor.requires_grad)))

    def change() -> None:
        for module, name, axis, parameter in new:
            setattr(module, name, parameter)
            note_size(module, name, axis, parameter.shape[axis])
        set_ints(model, unit, len(kept))
        also()

    try:
        change()
    except BaseException:  # an interrupt in the middle: a unit with some tensors cut computes nonsense
        change()
        raise
    return resized(unit, len(kept))
