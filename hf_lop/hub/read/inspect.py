"""What a model consists of and whether it can be pruned, from its config alone: no weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lop.errors import UnsupportedModelError
from hf_lop.hub.read.load import auto_class, read_config
from hf_lop.learning.config import LOPConfig
from hf_lop.units.find import FFN, find_ffns
from hf_lop.units.modeling_lop import layer_widths, text_configs, text_decoder


@dataclass(frozen=True, slots=True)
class Inspection:
    """Facts about one model.

    Attributes:
        name (`str`): id or folder, as given.
        architecture (`str`): model class.
        model_type (`str`): top-level model type.
        ffns (`tuple[FFN, ...]`): one per decoder layer; empty if there is a reason against pruning.
        parameters (`dict[str, int]`): parameters by part: "ffn" (the decoder's), "decoder" (its other weights),
            "embeddings" (token embeddings and vocabulary projection), "other" (such as the vision tower).
        reason (`str`, *optional*): why the model cannot be pruned; None if it can.
        pruned (`dict`, *optional*): how it was pruned already, from its config.
    """

    name: str
    architecture: str
    model_type: str
    ffns: tuple[FFN, ...]
    parameters: dict[str, int]
    reason: str | None
    pruned: dict[str, Any] | None

    @property
    def widths(self) -> list[int]:
        """Neurons of each decoder layer's FFN, `[L]`."""
        return [ffn.width for ffn in self.ffns]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "name": self.name,
            "architecture": self.architecture,
            "model_type": self.model_type,
            "can_be_pruned": self.reason is None,
            "reason": self.reason,
            "pruned": self.pruned,
            "widths": self.widths,
            "parameters": {**self.parameters, "total": sum(self.parameters.values())},
            "ffns": [
                {"path": f.path, "inputs": list(f.inputs), "output": f.output, "width": f.width} for f in self.ffns
            ],
        }


def inspect_model(name: str | Path, *, revision: str | None = None) -> Inspection:
    """Inspect a model by Hub id or folder; it is built on the meta device, so only its config is fetched.

    Args:
        name (`str` or `Path`): Hub id or folder.
        revision (`str`, *optional*): branch, tag or commit.

    Returns:
        `Inspection`: its FFNs, parameters by part, and whether it can be pruned.

    Raises:
        InvalidInputError: if there is no such model.
        UnsupportedModelError: if the model does not generate text, or is a pruner.
    """
    config = read_config(name, revision=revision)
    if isinstance(config, LOPConfig):
        raise UnsupportedModelError(
            f"{name} is a pruner, not a model to prune. `hf-lop plan {name} --ratio 0.3` shows what it plans; pass its "
            f"base model here ({config.base_model or 'on no Hub repository'})."
        )
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config)
    reason = None
    try:
        ffns = find_ffns(model)
    except UnsupportedModelError as error:
        ffns, reason = [], str(error)
    pruned = getattr(model.config, "pruning_config", None)
    if pruned or layer_widths(text_configs(model)[0]) is not None:
        reason = f"{type(model).__name__} is already pruned; prune its dense base model instead."
        pruned = {**(pruned or {}), "widths": [ffn.width for ffn in ffns]}
    elif getattr(config, "quantization_config", None) is not None:
        reason = f"{type(model).__name__} is quantised; prune the unquantised model, then quantise the pruned one."
    return Inspection(
        name=str(name),
        architecture=type(model).__name__,
        model_type=str(config.model_type),
        ffns=tuple(ffns),
        parameters=_parts(model, ffns),
        reason=reason,
        pruned=pruned,
    )


def _parts(model: PreTrainedModel, ffns: list[FFN]) -> dict[str, int]:
    """Count parameters by part; each shared tensor once, in the first part that holds it."""
    ffn_modules = [module for ffn in ffns for side in ffn.modules(model) for module in _as_list(side)]
    embeddings = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module]
    groups = {"ffn": ffn_modules, "embeddings": embeddings, "decoder": [text_decoder(model)], "other": [model]}
    seen: set[int] = set()
    counts = {}
    for part, modules in groups.items():
        fresh = {id(p): p.numel() for module in modules for p in module.parameters() if id(p) not in seen}
        counts[part] = sum(fresh.values())
        seen |= set(fresh)
    return counts


def _as_list(side: Any) -> list[Any]:
    return side if isinstance(side, list) else [side]
