"""What the files of a pruned model will hold, known from the files of the dense one before a weight is read."""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from safetensors.torch import _TYPES as TORCH_DTYPES

from hf_lop.errors import UnsupportedModelError
from hf_lop.hub.read.checkpoint import Shards
from hf_lop.hub.read.skeleton import Skeleton
from hf_lop.hub.write.tensors import SavedTensor
from hf_lop.recovery.solve import RowSolver
from hf_lop.units.slice import check_kept, slice_units
from hf_lop.units.unit import Unit, entries

IN_MEMORY = "Prune it in memory: without --stream, or without output_dir."


def stored_output_weight(skeleton: Skeleton, shards: Shards, unit: Unit) -> torch.Tensor:
    """Read the output projection of a unit, `[d, n]` in the dtype of the model; a view where it is stored as `[n, d]`.

    Raises:
        UnsupportedModelError: if it is not stored as the model has it.
    """
    slot = unit.output
    parameter = getattr(skeleton.model.get_submodule(slot.module), slot.tensor)
    weight = shards.rows(_source(skeleton, unit, parameter)).to(parameter.dtype)
    return weight if slot.axis == 1 else weight.T


def stored_entries(
    skeleton: Skeleton, shards: Shards, parameter: torch.Tensor, start: int, count: int
) -> torch.Tensor:
    """Read entries `[count]` of a parameter from the flat index `start` on.

    Raises:
        UnsupportedModelError: if it is not stored as the model has it.
    """
    name = skeleton.source(parameter)
    if name is None or tuple(shards.places[name].shape) != tuple(parameter.shape):
        raise UnsupportedModelError(f"A weight is stored otherwise than the model has it. {IN_MEMORY}")
    dtype = cast(torch.dtype, TORCH_DTYPES[shards.places[name].dtype])
    found = torch.empty(count, dtype=dtype)
    shards.read_into(shards.places[name], start * dtype.itemsize, found.view(torch.uint8).numpy())
    return found


def pruned_tensors(
    skeleton: Skeleton, units: Sequence[Unit], kept: Sequence[torch.Tensor], solver: RowSolver | None
) -> list[SavedTensor]:
    """Cut a model without weights, and return the tensors that it is saved as, in the order in which they are.

    Args:
        skeleton (`Skeleton`): of the dense model; its model is cut in place.
        units (`Sequence[Unit]`): its L units.
        kept (`Sequence[torch.Tensor]`): the pieces to keep, one `[k] int64` per unit, in any order.
        solver (`RowSolver`, *optional*): given a layer and a dtype, returns what makes the new rows of its output projection from
            the old ones in that dtype.

    Raises:
        UnsupportedModelError: if a tensor is not stored as the model has it, so that it cannot be made from a file.
        InvalidInputError: if the indices do not fit the model.
    """
    model = skeleton.model
    for unit in units:  # refuses before anything is changed
        for module in dict.fromkeys(model.get_submodule(path) for path, _ in unit.tensors):
            for parameter in module.parameters(recurse=False):
                _source(skeleton, unit, parameter)
    ordered = check_kept(units, kept)
    dense = skeleton.saved()
    sources = _sources(skeleton, dense)
    sizes = [
        [getattr(model.get_submodule(path), name).shape[slots[0].axis] for (path, name), slots in unit.tensors.items()]
        for unit in units
    ]
    slice_units(model, ordered, units, on_meta=True)
    # Which entries a cut parameter has, found again by its storage after it was renamed for saving.
    cut: dict[int, tuple[int, torch.Tensor, bool]] = {}
    for layer, (unit, indices) in enumerate(zip(units, ordered, strict=True)):
        for ((path, name), slots), size in zip(unit.tensors.items(), sizes[layer], strict=True):
            parameter = getattr(model.get_submodule(path), name)
            index = entries(slots, size, unit.count, indices)
            cut[parameter.untyped_storage()._cdata] = layer, index, slots[0].output
    tensors = []
    for name, tensor in skeleton.saved().items():
        shape, before = tuple(tensor.shape), tuple(dense[name].shape)
        if shape == before:
            tensors.append(SavedTensor(name, shape, tensor.dtype, sources[name]))
            continue
        layer, indices, is_output = cut[tensor.untyped_storage()._cdata]
        axis = next(axis for axis, size in enumerate(shape) if size != before[axis])
        change = partial(solver, layer, tensor.dtype) if solver is not None and is_output else None
        tensors.append(SavedTensor(name, shape, tensor.dtype, sources[name], axis, indices, change))
    return tensors


def _source(skeleton: Skeleton, unit: Unit, parameter: torch.Tensor) -> str:
    source = skeleton.source(parameter)
    if source is None:
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__}: the weights of {unit.path} are stored otherwise than the model has them, so "
            f"they cannot be cut from file to file. {IN_MEMORY}"
        )
    return source


def _sources(skeleton: Skeleton, saved: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return the stored tensor behind every saved one.

    Where transformers converts a tensor when it loads and back when it saves, both have the same name and shape.
    """
    sources = {}
    for name, tensor in saved.items():
        source = skeleton.source(tensor)
        if source is None and name in skeleton.stored and skeleton.stored[name].shape == tensor.shape:
            source = name
        if source is None:
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__}: {name} would be saved, but is not stored as it is. {IN_MEMORY}"
            )
        sources[name] = source
    return sources
