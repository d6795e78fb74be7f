"""What hf_lop made, a pruner, a pruned model or an elastic repository, read from JSON and headers: no torch is imported for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.hub.read.files import Files
from hf_lop.hub.read.safetensors import WHOLE, Place, open_files, parse_json, read_bytes, read_headers, shard_names
from hf_lop.planning.blocks import shown
from hf_lop.planning.budget import Budget
from hf_lop.planning.known import Known, format_of
from hf_lop.planning.plan import Plan
from hf_lop.planning.predict import Array, predict_ratios
from hf_lop.units.checks import WIDTH, check_format

CONFIG, KEPT = "config.json", "pruning/kept.safetensors"
NOT_KNOWN = "which pieces it kept is not known: it has no {KEPT}, as those of before 0.2. Prune the dense base model."
LARGEST_CONFIG = 20_000_000  # bytes
PREFIX = "predictor."
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class Planner:
    """What plans widths.

    Attributes:
        config (`Mapping`): the pruner's config.json.
        known (`Known`): what that says about sizes and blocks.
        weights (`Mapping`): the predictor's, `float32` by name.
    """

    config: Mapping[str, Any]
    known: Known
    weights: Mapping[str, Array]

    def plan(self, budget: Budget) -> Plan:
        """Plan the width of every layer; a limit of latency needs the pruner itself, see [`~hf_lop.LOPPruner.plan`]."""
        kind, layers = str(self.config.get("predictor", "transformer")), len(self.known.size.widths)
        return self.known.plan(partial(self._predict, kind, layers), budget)

    def _predict(self, kind: str, layers: int, ratio: float) -> Any:
        return predict_ratios(kind, self.weights, ratio, layers)


def read_json(files: Files, file: str = CONFIG) -> dict[str, Any]:
    """Read a JSON object of a repository.

    Raises:
        InvalidInputError: if there is no such file.
        CheckpointMismatchError: if it is damaged, or too large to be one.
    """
    size = files.size(file)
    if size is None:
        raise InvalidInputError(f"{files.name} has no {file}. Pass a folder or a Hub id.{files.hint}")
    if size > LARGEST_CONFIG:
        raise CheckpointMismatchError(
            f"{file} of {files.name} has {size:,} bytes; at most {LARGEST_CONFIG:,} are read."
        )
    return parse_json(f"{file} of {files.name}", read_bytes(files, file, 0, size))


def read_planner(name: str | Path, *, revision: str | None = None) -> Planner:
    """Read what plans, of a pruner or of the one in an elastic repository.

    Args:
        name (`str` or `Path`): Hub id or folder.
        revision (`str`, *optional*): branch, tag or commit.

    Raises:
        InvalidInputError: if there is no such repository.
        CheckpointMismatchError: if it is no pruner repository, or a file of it is damaged.
    """
    files = open_files(name, revision=revision)
    try:
        config, folder = read_json(files), ""
        if isinstance(config.get("elastic_config"), dict):
            folder = "pruner/"
            config = read_json(files, folder + CONFIG)
        if config.get("model_type") != "lop":
            raise CheckpointMismatchError(
                f"{name} holds a model of type {config.get('model_type')!r}, not a pruner ('lop'). Pass the id of a pruner "
                "repository."
            )
        check_format(format_of(config))
        places = read_headers(files, folder + WHOLE)
        weights = {
            key.removeprefix(PREFIX): _array(files, place) for key, place in places.items() if key.startswith(PREFIX)
        }
        return Planner(config, Known.of(config), weights)
    finally:
        files.close()


def _array(files: Files, place: Place) -> Array:
    """Read a floating-point tensor as float32."""
    if place.dtype not in DTYPES:
        raise CheckpointMismatchError(
            f"{place.file} of {files.name} has a predictor of {place.dtype}. Download it again."
        )
    raw = np.frombuffer(read_bytes(files, place.file, place.start, place.end - place.start), DTYPES[place.dtype])
    if place.dtype == "BF16":  # the upper half of a float32
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    found = raw.astype(np.float32).reshape(place.shape)
    if not np.isfinite(found).all():
        raise CheckpointMismatchError(
            f"{place.file} of {files.name} has a predictor with numbers that are not finite. Fit it anew, or download it again."
        )
    return found


# -- Facts -------------------------------------------------------------------------------------------------------------


def inspect_made(name: str | Path, *, revision: str | None = None) -> dict[str, Any] | None:
    """Return the facts of what hf_lop made, or None where that is another model, whose units are found by building it.

    Args:
        name (`str` or `Path`): Hub id or folder.
        revision (`str`, *optional*): branch, tag or commit.

    Returns:
        `dict`: plain JSON types; `kind` is "pruner", "pruned" or "elastic".

    Raises:
        InvalidInputError: if there is no such repository.
        CheckpointMismatchError: if a file of it is damaged.
    """
    files = open_files(name, revision=revision)
    try:
        config = read_json(files)
        facts = {"name": str(name), "model_type": str(config.get("model_type"))}
        if config.get("model_type") == "lop":
            return {**facts, "kind": "pruner", "pruner": _pruner_facts(config)}
        named = config.get("architectures")
        facts["architecture"] = str(named[0] if isinstance(named, list) and named else named)
        if isinstance(made := config.get("elastic_config"), dict):
            inside = _pruner_facts(read_json(files, "pruner/" + CONFIG))
            return {
                **facts,
                "kind": "elastic",
                "elastic": made,
                "pruner": inside,
                "parameters": _parameters(files, config),
            }
        if isinstance(made := config.get("pruning_config"), dict) and "dense_widths" in made:
            widths = _widths(files, config)
            reason = None if files.size(KEPT) is not None else NOT_KNOWN.format(KEPT=KEPT)
            return {
                **facts,
                "kind": "pruned",
                "can_be_pruned": reason is None,
                "reason": reason,
                "pruned": {**made, "widths": widths},
                "widths": widths,
                "parameters": _parameters(files, config),
            }
        return None
    finally:
        files.close()


def _pruner_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    check_format(format_of(config))
    known = Known.of(config)
    named = ("base_model", "base_revision", "base_model_type", "criterion", "predictor", "sketch_rows", "max_ratio")
    return {
        **{key: config.get(key) for key in named},
        "widths": list(known.size.widths),
        "parameters": known.size.parameters,
        "round_to": None if known.blocks is None else shown(known.blocks),
        "calibration": config.get("calibration"),
    }


def _widths(files: Files, config: Mapping[str, Any]) -> list[int] | None:
    """Return what every layer of a pruned model has, by its kept pieces, or by the list in its config."""
    if files.size(KEPT) is not None:
        places = read_headers(files, KEPT)
        named = {key: place.shape[0] for key, place in places.items() if len(place.shape) == 1}
        if set(named) == {f"neurons.{layer}" for layer in range(len(named))}:
            return [named[f"neurons.{layer}"] for layer in range(len(named))]
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    lists = [part[WIDTH] for part in parts if isinstance(part.get(WIDTH), list)]
    return lists[0] if lists else None


def _parameters(files: Files, config: Mapping[str, Any]) -> dict[str, int]:
    """Count what the weight files hold; nothing where numbers are packed."""
    if config.get("quantization_config"):
        return {}
    counts = [prod(p.shape) for file in shard_names(files) for p in read_headers(files, file).values()]
    return {"total": sum(counts)}
