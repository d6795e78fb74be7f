"""What a model consists of and whether it can be pruned, from its config alone: no weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lop.errors import LOPError, UnsupportedModelError
from hf_lop.hub.read.kept import earlier_cut
from hf_lop.hub.read.load import auto_class, read_config
from hf_lop.learning.config import LOPConfig
from hf_lop.units.decoder import text_decoder
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import is_cut
from hf_lop.units.unit import Unit


@dataclass(frozen=True, slots=True)
class Inspection:
    """Facts about one model.

    Attributes:
        name (`str`): id or folder, as given.
        architecture (`str`): model class.
        model_type (`str`): top-level model type.
        units (`tuple[Unit, ...]`): one per decoder layer; empty if there is a reason against pruning.
        parameters (`dict[str, int]`): parameters by part: "ffn" (the decoder's), "decoder" (its other weights),
            "embeddings" (token embeddings and vocabulary projection), "other" (such as the vision tower).
        reason (`str`, *optional*): why the model cannot be pruned; None if it can.
        pruned (`dict`, *optional*): how it was pruned already, from its config.
    """

    name: str
    architecture: str
    model_type: str
    units: tuple[Unit, ...]
    parameters: dict[str, int]
    reason: str | None
    pruned: dict[str, Any] | None

    @property
    def widths(self) -> list[int]:
        """Neurons of each decoder layer's FFN, `[L]`."""
        return [unit.count for unit in self.units]

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
            "ffns": [_described(unit) for unit in self.units],
        }


def inspect_model(name: str | Path, *, revision: str | None = None) -> Inspection:
    """Inspect a model by Hub id or folder; it is built on the meta device, so only its config is fetched, and what it kept.

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
        units = find_units(model)
    except UnsupportedModelError as error:
        units, reason = [], str(error)
    pruned = getattr(model.config, "pruning_config", None)
    if is_cut(model):
        model.name_or_path, model.config._commit_hash = str(name), getattr(config, "_commit_hash", None)
        try:
            earlier_cut(model, units)
        except LOPError as error:
            reason = str(error)
        pruned = {**(pruned or {}), "widths": [unit.count for unit in units]}
    elif getattr(config, "quantization_config", None) is not None:
        reason = f"{type(model).__name__} is quantised; prune the unquantised model, then quantise the pruned one."
    return Inspection(
        name=str(name),
        architecture=type(model).__name__,
        model_type=str(config.model_type),
        units=tuple(units),
        parameters=_parts(model, units),
        reason=reason,
        pruned=pruned,
    )


def _parts(model: PreTrainedModel, units: list[Unit]) -> dict[str, int]:
    """Count parameters by part; each shared tensor once, in the first part that holds it."""
    in_units = [model.get_submodule(path) for unit in units for path, _ in unit.tensors]
    embeddings = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module]
    groups = {"ffn": in_units, "embeddings": embeddings, "decoder": [text_decoder(model)], "other": [model]}
    seen: set[int] = set()
    counts = {}
    for part, modules in groups.items():
        fresh = {id(p): p.numel() for module in modules for p in module.parameters() if id(p) not in seen}
        counts[part] = sum(fresh.values())
        seen |= set(fresh)
    return counts


def _described(unit: Unit) -> dict[str, Any]:
    """Where one FFN is, with the names of its projections inside of it."""
    inputs = dict.fromkeys(slot.module for slot in unit.slots if not slot.output)
    inside = len(unit.path) + 1
    names = [path[inside:] for path in inputs]
    return {"path": unit.path, "inputs": names, "output": unit.output.module[inside:], "width": unit.count}
