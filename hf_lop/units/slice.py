"""Cutting a model to the pieces that stay, in memory and in place, and the same as a mask that changes no weight."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.units.configs import layer_counts, text_configs
from hf_lop.units.kept import note_kept
from hf_lop.units.kinds import KINDS, find_units
from hf_lop.units.modeling_lop import set_counts
from hf_lop.units.unit import Unit, linear_shape, take


def prunable_units(model: nn.Module, *, on_meta: bool = False, cut_before: bool = False) -> list[Unit]:
    """Find the units of a model and check that they can be cut here and now.

    Args:
        model (`nn.Module`): a dense transformers model with its weights in memory.
        on_meta (`bool`): it may be on the meta device, its weights are cut elsewhere.
        cut_before (`bool`): it may be pruned already.

    Returns:
        `list[Unit]`: see [`find_units`].

    Raises:
        UnsupportedModelError: if the model is already pruned, quantised, without weights (meta device, offloaded), has
            adapters in its units, or has none that can be cut (see [`find_units`]).
    """
    check_finished(model)
    label = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise UnsupportedModelError(
            f"{label} is quantised, and packed weights cannot be cut by neuron. "
            "Load it without quantization_config, prune, then quantise the pruned model."
        )
    _check_no_adapters(label, model)
    units = find_units(model)
    if not cut_before and is_cut(model):
        raise UnsupportedModelError(
            f"{label} is already pruned (widths {[unit.count for unit in units]}). This needs the dense base model."
        )
    for unit in units:
        for path, name in unit.tensors:
            _check_tensor(label, unit, model.get_submodule(path), name, on_meta=on_meta)
    return units


def is_cut(model: Any) -> bool:
    """Whether a model is pruned already, by its config."""
    config = getattr(model, "config", None)
    return config is not None and bool(layer_counts(text_configs(model)[0]) or getattr(config, "pruning_config", None))


def cut_counts(model: Any) -> dict[str, list[int]]:
    """Return how many pieces every layer of a pruned model has, by kind of unit; empty for others.

    Its config lists them, or has one number where the layers of a model are alike, so that it is a stock checkpoint.
    """
    if counts := layer_counts(text_configs(model)[0]):
        return counts
    made = getattr(model.config, "pruning_config", None)
    if not isinstance(made, dict) or "dense_widths" not in made or "export" in made:  # another tool's, or a runtime's
        return {}
    try:
        return {unit.kind: [other.count for other in units] for units in [find_units(model)] for unit in units[:1]}
    except UnsupportedModelError:  # packed weights
        return {}


def _check_no_adapters(label: str, model: nn.Module) -> None:
    """Refuse adapters anywhere: transformers saves them alone, and the cut below them would be lost."""
    named = (path for path, module in model.named_modules() if hasattr(module, "adapter_layer_names"))
    place = next(named, "its door" if getattr(model, "peft_config", None) else None)
    if place is not None:
        raise UnsupportedModelError(
            f"{label} has an adapter at {place}. Merge adapters (PEFT: merge_and_unload) or remove them, prune, then add new ones."
        )


def _check_tensor(label: str, unit: Unit, module: Any, name: str, *, on_meta: bool) -> None:
    tensor = getattr(module, name)
    if not isinstance(tensor, torch.Tensor) or (tensor.is_meta and not on_meta):
        raise UnsupportedModelError(
            f"{label}: the weights of {unit.path} are not in memory (meta device or offloaded). Prune it from file to file, with "
            'output_dir=... or --stream, or load it with device_map="cpu" or on one device.'
        )
    if type(tensor).__name__ == "DTensor":
        raise UnsupportedModelError(
            f"{label}: the weights of {unit.path} are spread over devices (DTensor). Prune the model before it is."
        )
    if not tensor.is_floating_point() or type(tensor) not in (nn.Parameter, torch.Tensor):
        raise UnsupportedModelError(
            f"{label}: the weights of {unit.path} are {type(tensor).__name__} of {tensor.dtype}, which cannot be "
            "cut by neuron. Prune the unquantised model, then quantise the pruned one."
        )
    if module._parameters.get(name) is not tensor:
        raise UnsupportedModelError(
            f"{label}: {unit.path} holds a {type(module).__name__}, an adapter or parametrisation over the real "
            "weight. Merge or remove it (PEFT: merge_and_unload), prune, then add it again."
        )
    if tensor.dim() > 1 and linear_shape(module) is None:
        raise UnsupportedModelError(f"{label}: {unit.path} holds a {type(module).__name__}, which is no projection.")


def check_kept(units: Sequence[Unit], kept: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the kept pieces of every unit in ascending order, so that they stay in their original order."""
    if len(kept) != len(units):
        raise InvalidInputError(f"Kept neurons for {len(kept)} layers were given; the model has {len(units)} layers.")
    ordered = []
    for layer, (unit, indices) in enumerate(zip(units, kept, strict=True)):
        indices = torch.as_tensor(indices, dtype=torch.int64).cpu().sort().values
        if not len(indices):
            raise InvalidInputError(f"Layer {layer} would keep no neuron; keep at least one.")
        if indices[0] < 0 or indices[-1] >= unit.count or bool((indices[1:] == indices[:-1]).any()):
            raise InvalidInputError(f"Kept neurons of layer {layer} must be distinct and in [0, {unit.count}).")
        ordered.append(indices)
    return ordered


def slice_units(
    model: nn.Module, kept: Sequence[torch.Tensor], units: Sequence[Unit] | None = None, *, on_meta: bool = False
) -> list[Unit]:
    """Cut every unit to its kept pieces, in place; one unit at a time, so little extra memory is used.

    Args:
        model (`nn.Module`): a dense model; keeps its class, device and dtype.
        kept (`Sequence[torch.Tensor]`): one `[k] int64` per unit, in any order; the pieces keep their original order.
        units (`Sequence[Unit]`, *optional*): what `prunable_units` returned for this model, where that was called already.
        on_meta (`bool`): the model may be on the meta device.

    Returns:
        `list[Unit]`: the units with their new counts, which the text config lists from now on.

    Raises:
        UnsupportedModelError: if the model cannot be pruned (see [`prunable_units`]).
        InvalidInputError: if the indices do not fit the model. In both cases nothing was changed.
    """
    units = prunable_units(model, on_meta=on_meta) if units is None else units
    ordered = check_kept(units, kept)
    counts, narrow = [unit.count for unit in units], []
    set_counts(model, units, counts)
    for index, (unit, indices) in enumerate(zip(units, ordered, strict=True)):
        counts[index] = len(indices)
        narrow.append(
            unit
            if len(indices) == unit.count
            else take(model, unit, indices, partial(set_counts, model, units, counts))
        )
        note_kept(model, [unit], [indices])
    return narrow


@contextlib.contextmanager
def changing(model: Any, what: str) -> Iterator[None]:
    """Mark a model while it is changed in place: what an interrupt leaves is whole layer by layer, but no model of any plan.

    Args:
        model (`PreTrainedModel`): the model.
        what (`str`): what is done to it.
    """
    model.config.lop_unfinished = what
    yield
    del model.config.lop_unfinished


def check_finished(model: Any) -> None:
    """Refuse a model that an interrupt has left in the middle of a change.

    Raises:
        UnsupportedModelError: if it is one.
    """
    if what := getattr(getattr(model, "config", None), "lop_unfinished", None):
        raise UnsupportedModelError(
            f"This {type(model).__name__} was left in the middle of {what} by an interrupt or an error: some of its layers are "
            "changed, others not. Load it again, and do the same again."
        )


def list_counts(model: nn.Module) -> None:
    """Let the config of a pruned model list what its layers have, if some of them were removed after the cut."""
    if getattr(model, "hf_quantizer", None) is not None:
        return  # what packs weights can hide what a layer has
    for kind, counts in layer_counts(text_configs(model)[0]).items():
        units = KINDS[kind](model)
        if (found := [unit.count for unit in units]) != counts:
            set_counts(model, units, found)


def output_weight(model: nn.Module, unit: Unit) -> torch.Tensor:
    """Return the output projection of a unit as `[d, n]`, n entries of pieces: a view (`Conv1D` stores its transpose)."""
    weight: torch.Tensor = getattr(model.get_submodule(unit.output.module), unit.output.tensor).detach()
    return weight if unit.output.axis == 1 else weight.T


def set_output_weight(model: nn.Module, unit: Unit, weight: torch.Tensor) -> None:
    """Give a unit another output projection `[d, n]`; the parameter that was there may be another model's, and is left alone."""
    module = model.get_submodule(unit.output.module)
    stored = weight if unit.output.axis == 1 else weight.T
    setattr(module, unit.output.tensor, nn.Parameter(stored, requires_grad=False))


@contextlib.contextmanager
def watching(
    model: nn.Module, units: Sequence[Unit], see: Callable[[int, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Show what enters the output projection of every unit, while the context lasts.

    Args:
        model (`nn.Module`): the model that the units were found in.
        units (`Sequence[Unit]`): which ones.
        see (`Callable`): called with the index of the unit and its activations `[..., n]`, n entries of pieces; what it
            returns, if not None, takes their place.
    """

    def hook(index: int) -> Callable[..., Any]:
        def run(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            changed = see(index, args[0])
            return None if changed is None else (changed, *args[1:])

        return run

    handles = []
    try:
        for index, unit in enumerate(units):
            handles.append(model.get_submodule(unit.output.module).register_forward_pre_hook(hook(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def masking(model: nn.Module, units: Sequence[Unit], kept: Sequence[torch.Tensor]) -> Iterator[None]:
    """Silence all pieces but the kept ones while the context lasts: the output a pruned model would give.

    Args:
        model (`nn.Module`): the dense model; no weight is touched.
        units (`Sequence[Unit]`): the units to mask.
        kept (`Sequence[torch.Tensor]`): the pieces to keep, one `[k] int64` per unit.
    """
    dropped = []
    for unit, indices in zip(units, check_kept(units, kept), strict=True):
        stays = torch.zeros(unit.count, dtype=torch.bool)
        stays[indices] = True
        dropped.append(unit.columns((~stays).nonzero().flatten()))
    with watching(model, units, lambda index, x: x.index_fill(-1, dropped[index].to(x.device), 0.0)):
        yield
