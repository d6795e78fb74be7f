"""A model as a checkpoint would load, without its weights: on the meta device, every tensor traced to where it is stored.

Transformers itself loads and saves: tensors without data take the place of the stored ones, so renamed weights, tied weights,
conversions and dtypes come out as they would in memory.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors.torch import _TYPES as TORCH_DTYPES
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_lop.errors import CheckpointMismatchError, LOPError, UnsupportedModelError
from hf_lop.hub.read.checkpoint import Shards
from hf_lop.hub.read.load import ODD, check_dtypes, check_layers, check_loaded, model_class


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model (`PreTrainedModel`): the model, in evaluation mode.
        origins (`dict`): stored names, by identity of the tensors without data that it was loaded from.
        stored (`dict[str, torch.Tensor]`): these tensors, by stored name.
    """

    model: PreTrainedModel
    origins: dict[tuple[Any, ...], str]
    stored: dict[str, torch.Tensor]

    def source(self, tensor: torch.Tensor) -> str | None:
        """Return the stored name of a tensor, or None if it is not the very tensor that is stored."""
        return self.origins.get(_identity(tensor))

    def saved(self) -> dict[str, torch.Tensor]:
        """Return what `save_pretrained` writes, by the name under which it does, in its order."""
        state = self.model.state_dict()
        for name in self.model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        state = remove_tied_weights_from_state_dict(state, self.model)
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(self.model, state)
        return reverted


def load_skeleton(name: str | Path, config: PreTrainedConfig, shards: Shards, **hub: Any) -> Skeleton:
    """Build a model on the meta device as if its checkpoint had been loaded.

    Args:
        name (`str` or `Path`): Hub id or folder.
        config (`PreTrainedConfig`): its config.
        shards (`Shards`): its weights.
        **hub: `revision`, `token`.

    Raises:
        UnsupportedModelError: if the model does not generate text, is quantised, or is loaded in an unusual way.
        CheckpointMismatchError: if weights are missing or do not fit the config.
    """
    _check_ordinary(str(name), config, shards)
    cls = model_class(config)
    try:
        stored = _empty(config, shards)
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(stored),
            device_map={"": "meta"},
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded refuses them, and says why
        )
        check_loaded(str(name), info)
        check_layers(str(name), model, info)
        check_dtypes(str(name), model, {key: place.dtype for key, place in shards.places.items()})
        model.name_or_path = model.config.name_or_path = str(name)
        if model.can_generate() and hasattr(model, "adjust_generation_fn"):
            options = {"cache_dir": None, "force_download": False, "proxies": None, "subfolder": "", "token": None}
            options |= {"local_files_only": constants.HF_HUB_OFFLINE, "trust_remote_code": None, "revision": None}
            model.adjust_generation_fn(None, True, None, str(name), **(options | hub))
    except LOPError:
        raise
    except ODD as error:
        raise CheckpointMismatchError(
            f"{name}: no model can be built from its configs ({type(error).__name__}: {str(error)[:300]}). Take them from the "
            "repository again."
        ) from error
    skeleton = Skeleton(model.eval(), {_identity(tensor): own for own, tensor in stored.items()}, stored)
    _tie_equal(skeleton, shards)
    return skeleton


def _check_ordinary(name: str, config: PreTrainedConfig, shards: Shards) -> None:
    """Refuse what transformers would load from elsewhere, or not as it is stored."""
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{name} is quantised, and packed weights cannot be cut by neuron. Prune the unquantised model, then quantise "
            "the pruned one."
        )
    extra_files = getattr(type(config), "extra_files", ())  # the older transformers has none
    unusual = [file for file in ("adapter_config.json", *extra_files) if shards.files.size(file) is not None]
    if getattr(config, "transformers_weights", None) is not None:
        unusual.append("transformers_weights in config.json")
    if unusual:
        raise UnsupportedModelError(
            f"{name} has {unusual[0]}, so its weights are not only in the usual files. Prune it in memory: without --stream, "
            "or without output_dir."
        )


def _empty(config: PreTrainedConfig, shards: Shards) -> dict[str, torch.Tensor]:
    """Return a tensor without data for every stored one, in the dtype that it is loaded in, file by file as loaders do."""
    dtypes = {}
    for name, place in sorted(shards.places.items(), key=lambda entry: (entry[1].file, entry[0])):
        dtype = TORCH_DTYPES.get(place.dtype)
        if dtype is None:
            raise UnsupportedModelError(f"{place.file}: {name} is stored as {place.dtype}, which torch cannot load.")
        dtypes[name] = dtype
    floats = [dtype for dtype in dtypes.values() if dtype.is_floating_point]
    wanted = getattr(config, "dtype", None) or (floats[0] if floats else torch.float32)
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    return {
        name: torch.empty(shards.places[name].shape, dtype=wanted if dtype.is_floating_point else dtype, device="meta")
        for name, dtype in dtypes.items()
    }


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _tie_equal(skeleton: Skeleton, shards: Shards) -> None:
    """Tie weights that are stored twice if they are equal, as loaders do that can see them."""
    model = skeleton.model
    for target, source in list(model.all_tied_weights_keys.items()):
        twins = [model.get_parameter_or_buffer(name) for name in (target, source)]
        if twins[0] is twins[1]:
            continue
        first, second = (skeleton.source(twin) for twin in twins)
        if first is None or second is None:
            raise CheckpointMismatchError(
                f"{shards.files.name} stores the tied weights {target} and {source} in a form that cannot be compared. Prune "
                "the model in memory."
            )
        if _equal(shards, first, second):
            parent, _, own = target.rpartition(".")
            setattr(model.get_submodule(parent), own, twins[1])
        else:
            model.all_tied_weights_keys.pop(target)


def _equal(shards: Shards, first: str, second: str) -> bool:
    shape = shards.places[first].shape
    if shape != shards.places[second].shape or not shape:
        return False
    step = max(1, 2**23 // max(1, torch.Size(shape[1:]).numel()))
    return all(
        torch.equal(
            shards.rows(first, start, min(start + step, shape[0])),
            shards.rows(second, start, min(start + step, shape[0])),
        )
        for start in range(0, shape[0], step)
    )
