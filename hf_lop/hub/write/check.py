"""Checks that what was written is the model in memory: by headers and names, in milliseconds."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import _TYPES as TORCH_DTYPES
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_lop.errors import CheckpointMismatchError, UnsupportedModelError
from hf_lop.hub.read.checkpoint import Place, open_shards
from hf_lop.hub.write.companions import code_beside
from hf_lop.units import modeling_lop
from hf_lop.units.configs import layer_counts, text_configs
from hf_lop.units.kinds import KINDS
from hf_lop.units.ship import ENTRY, remote_code


def check_classes(model: Any) -> None:
    """Refuse, before it is changed, a model whose classes transformers has not: nobody could load what is saved of it.

    Raises:
        UnsupportedModelError: if its config is of another class than any of transformers.
    """
    name = type(model.config).__name__
    stock = getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedConfig) and isinstance(model.config, stock)):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a config of class {name}, which transformers has not: it is code of its own, and what is "
            "saved of it pruned could not be loaded. Prune a model of transformers' own classes."
        )


def check_saved(
    model: PreTrainedModel,
    folder: Path,
    state: Mapping[str, torch.Tensor] | None = None,
    *,
    save_original_format: bool = True,
) -> None:
    """Check a folder that a model was just saved to.

    Args:
        model (`PreTrainedModel`): the model, with lists in its config, or elastic.
        folder (`Path`): where it was saved to.
        state (`Mapping`, *optional*): the tensors that were saved, by name; all of the model's by default. If it is empty, the
            weights are written elsewhere, and are not checked here.
        save_original_format (`bool`): whether transformers was asked for the names and forms of the source.

    Raises:
        CheckpointMismatchError: if something in the folder is not what is in memory, with what to do.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    wrong = _classes(config, folder)
    for missing in _code(folder):
        warnings.warn(missing, stacklevel=4)
    if getattr(model, "hf_quantizer", None) is None:  # packed weights are stored in a form of their quantiser's
        wrong += _counts(model)
        tensors = model.state_dict() if state is None else state
        if tensors and all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors.values()):
            wrong += _tensors(model, tensors, folder, save_original_format)
    _refuse(type(model).__name__, wrong)


def check_tensors(label: str, expected: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Check the names, dtypes and shapes of the tensors in a folder that was just written.

    Args:
        label (`str`): what they are of.
        expected (`Mapping`): the tensors, by the names under which they are stored; they may be without data.
        folder (`Path`): the folder.

    Raises:
        CheckpointMismatchError: if something in the folder is not as expected.
    """
    with open_shards(folder) as shards:
        places = shards.places
    wrong = [
        f"{name} is stored as {place.dtype}, expected {expected[name].dtype}. Do the same again."
        for name, place in places.items()
        if name in expected and TORCH_DTYPES.get(place.dtype) != expected[name].dtype
    ]
    _refuse(label, [*wrong, *_misplaced(expected, places)])


def _refuse(label: str, wrong: Sequence[str]) -> None:
    if wrong:
        raise CheckpointMismatchError(
            f"What was written of this {label} is not what is in memory, so it was not kept: {wrong[0]}"
        )


def _misplaced(expected: Mapping[str, torch.Tensor], places: Mapping[str, Place]) -> list[str]:
    """What is wrong with the names and shapes of stored tensors."""
    wrong = [f"{name} is missing. Save it again." for name in sorted(expected.keys() - places.keys())]
    wrong += [f"{name} is not of the model. Save it again." for name in sorted(places.keys() - expected.keys())]
    for name in expected.keys() & places.keys():
        shapes = [list(expected[name].shape), list(places[name].shape)]
        if shapes[0] != shapes[1]:
            wrong.append(f"{name} is {shapes[1]}, in memory {shapes[0]}. Save it again.")
    return wrong


def _classes(config: Mapping[str, Any], folder: Path) -> list[str]:
    """What is wrong with the classes that config.json names."""
    named: dict[str, str] = config.get("auto_map") or {}
    wrong = []
    for auto, name in named.items():
        module, _, cls = name.rpartition(".")
        if module == ENTRY.removesuffix(".py") and not hasattr(modeling_lop, cls):
            wrong.append(f"{auto} is {name}, which does not exist. Prune models of transformers' own classes.")
    missing = [name for name in remote_code() if named and not (folder / name).is_file()]
    return wrong + [f"{name} is missing. Save to a new folder." for name in missing]


def _counts(model: PreTrainedModel) -> list[str]:
    """What is wrong with the lists of a config."""
    wrong = []
    for kind, counts in layer_counts(text_configs(model)[0]).items():
        found = [unit.count for unit in KINDS[kind](model)]
        if found != counts:
            wrong.append(f"the config lists {counts} {kind}, the layers have {found}. Load the model again.")
    return wrong


def _code(folder: Path) -> list[str]:
    """What is wrong with the code that processor and tokenizer files name."""
    return [
        f"{file.name} names code in {module}.py, which is not in the folder: nobody can load that. Copy it there yourself."
        for file in sorted(folder.glob("*_config.json"))
        for module in sorted(code_beside(file))
        if not (folder / f"{module}.py").is_file()
    ]


def _tensors(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], folder: Path, save_original_format: bool
) -> list[str]:
    """What is wrong with the stored tensors.

    Names and shapes must be those in memory after transformers' renames for files, dtypes must be some that are in memory.
    """
    tensors = dict(state)
    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    tensors = remove_tied_weights_from_state_dict(tensors, model)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    expected = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    if save_original_format:
        expected = revert_weight_conversion(model, expected)
    with open_shards(folder) as shards:
        places = shards.places
    wrong = [
        f"{name} is stored as {place.dtype}, which no weight of the model is: transformers converts it back to what it was loaded "
        "from. Pass save_original_format=False to save_pretrained."
        for name, place in places.items()
        if TORCH_DTYPES.get(place.dtype) not in dtypes
    ]
    return wrong + _misplaced(expected, places)
