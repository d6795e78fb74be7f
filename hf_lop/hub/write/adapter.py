"""Cutting a LoRA of the dense model to fit a pruned one: its rows and columns of removed pieces go, as the weights' own did."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_lop.errors import CheckpointMismatchError, InvalidInputError, UnsupportedModelError
from hf_lop.files import write_whole
from hf_lop.hub.read.kept import earlier_cut
from hf_lop.hub.read.load import auto_class, read_config
from hf_lop.hub.read.names import hub_id
from hf_lop.hub.read.safetensors import parse_json
from hf_lop.hub.write.whole import check_new, whole_folder
from hf_lop.units.kept import CutTensor
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import is_cut

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every name that PEFT stores
# Settings of PEFT's LoRA by which tensors are other than A and B, or lie elsewhere.
OTHERWISE = ("use_qalora", "use_bdlora", "target_parameters", "layer_replication", "monteclora_config", "kasa_config")
# Along which axis a tensor of PEFT has the outputs of its projection, and the inputs; B A is added to the weight.
OUTPUTS = {
    "lora_A.weight": None,
    "lora_B.weight": 0,
    "lora_B.bias": 0,
    "lora_magnitude_vector": 0,
    "base_layer.bias": 0,
}
INPUTS = {"lora_A.weight": 1, "lora_B.weight": None, "lora_B.bias": None, "base_layer.bias": None}


def cut_adapter(
    adapter: str | Path, model: str | Path, out: str | Path, *, revision: str | None = None
) -> dict[str, Any]:
    """Cut a LoRA that was trained on the dense model to fit a model that was pruned from it.

    The pruned model with the cut adapter computes what the dense one with the whole adapter does where the removed pieces are
    masked, unless a recovery changed the output projections; what the adapter did on removed pieces is gone.

    Args:
        adapter (`str` or `Path`): Hub id or folder of a LoRA as PEFT stores it.
        model (`str` or `Path`): Hub id or folder of the pruned model; only its config and the numbers of the kept pieces are read.
        out (`str` or `Path`): new or empty folder; appears whole or not at all.
        revision (`str`, *optional*): branch, tag or commit of the adapter.

    Returns:
        `dict`: how many `tensors` the adapter has, and how many were `cut`.

    Raises:
        InvalidInputError: if adapter or model cannot be read, or the model is not pruned.
        UnsupportedModelError: if the adapter is no plain LoRA, or which pieces the model kept is not known.
        CheckpointMismatchError: if the adapter does not fit the dense model.
    """
    check_new(Path(out))
    settings, tensors = _read(adapter, revision)
    _check_plain(adapter, settings)
    config = read_config(model)
    with torch.device("meta"):
        skeleton: Any = auto_class(config).from_config(config)
    skeleton.name_or_path = str(model)
    skeleton.config._commit_hash = getattr(config, "_commit_hash", None)
    if not is_cut(skeleton):
        raise InvalidInputError(f"{model} is not pruned, so the adapter fits it as it is.")
    cut = earlier_cut(skeleton, find_units(skeleton)).tensors(skeleton)
    modules = dict(skeleton.named_modules())
    made = {name: _cut(adapter, name, tensor, modules, cut) for name, tensor in tensors.items()}
    settings |= {"base_model_name_or_path": hub_id(model), "revision": None}
    with whole_folder(Path(out).resolve()) as folder:
        save_file(made, folder / WEIGHTS, metadata={"format": "pt"})
        write_whole(folder / CONFIG, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    return {"tensors": len(made), "cut": sum(made[name].shape != tensors[name].shape for name in made)}


def _read(adapter: str | Path, revision: str | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = Path(adapter)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(adapter), revision=revision, allow_patterns=[CONFIG, WEIGHTS, PICKLE]))
        except (OSError, HFValidationError) as error:
            raise InvalidInputError(
                f"{adapter} cannot be read as an adapter: {error} Pass a folder or a Hub id."
            ) from error
    if not (folder / CONFIG).is_file():
        raise InvalidInputError(f"{adapter} has no {CONFIG}: it is no adapter of PEFT. Pass the folder of one.")
    if not (folder / WEIGHTS).is_file():
        there = f"a pickle, {PICKLE}, only" if (folder / PICKLE).is_file() else f"no {WEIGHTS}"
        raise InvalidInputError(
            f"{adapter} has {there}. Save it again with PEFT: save_pretrained(..., safe_serialization=True)."
        )
    try:
        return parse_json(f"{CONFIG} of {adapter}", (folder / CONFIG).read_bytes()), load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointMismatchError(
            f"{WEIGHTS} of {adapter} is damaged ({error}). Download or copy it again."
        ) from error


def _check_plain(adapter: str | Path, settings: Mapping[str, Any]) -> None:
    kind, special = settings.get("peft_type"), [name for name in OTHERWISE if settings.get(name)]
    if kind != "LORA" or special:
        what = f"of the type {kind!r}" if kind != "LORA" else f"a LoRA with {', '.join(special)}"
        raise UnsupportedModelError(
            f"{adapter} is {what}; only plain LoRAs (with DoRA on projections that make the pieces) can be cut. Merge it into "
            "the dense model (PEFT: merge_and_unload), and prune that with the same pruner."
        )


def _cut(
    adapter: str | Path, name: str, tensor: torch.Tensor, modules: Mapping[str, Any], cut: Mapping[int, CutTensor]
) -> torch.Tensor:
    """Return a tensor of the adapter as the pruned model needs it."""
    path, part = _parted(name)
    if path not in modules:
        raise CheckpointMismatchError(
            f"{adapter} has {name}, but the pruned model has no module {path}. It is an adapter of another model, or of another "
            "class of it: take one of the dense model that was pruned."
        )
    place = cut.get(id(getattr(modules[path], "weight", None)))
    if place is None:
        return tensor
    axes = INPUTS if place.slots[0].output else OUTPUTS
    if part not in axes:
        raise UnsupportedModelError(
            f"{adapter} has {name}, which cannot be cut: it holds what depends on all pieces together, or the whole projection. "
            "Merge the adapter into the dense model (PEFT: merge_and_unload), and prune that with the same pruner."
        )
    axis, dense = axes[part], place.shape[place.slots[0].axis]
    if axis is None:
        return tensor
    if tensor.dim() <= axis or tensor.shape[axis] != dense:
        raise CheckpointMismatchError(
            f"{name} of {adapter} is {list(tensor.shape)}; an adapter of the dense model has {dense} along axis {axis}. It is of "
            "another model, or was cut already."
        )
    return tensor.index_select(axis, place.index).contiguous()


def _parted(name: str) -> tuple[str, str]:
    """Part a name of PEFT into the path of the module, and which of its tensors it is."""
    inside = name.removeprefix(PREFIX).removesuffix(".weight" if "magnitude" in name else "")
    for part in OUTPUTS:
        if inside.endswith(f".{part}"):
            return inside.removesuffix(f".{part}"), part
    path, _, part = inside.rpartition(".")
    return path.removesuffix(".base_layer"), part
