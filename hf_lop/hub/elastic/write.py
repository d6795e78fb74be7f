"""Elastic repositories, the writing side: a dense checkpoint with sorted neurons from which any size is read in prefixes.

    config.json, model*.safetensors ...   the whole sorted model: for every stock loader an ordinary dense checkpoint
    elastic/model*.safetensors            tensors whose neurons lie along dimension 1 (`down_proj`), transposed
    pruner/                               the pruner of the sorted model

With neurons sorted, width k is the first k rows of gate and up projection, a prefix of their bytes; but the first k columns
of `down_proj`, a piece of each of its rows. Those are stored once more, transposed, of the first `SHARE` of the neurons: the
extra file takes a quarter less for it, and a layer that keeps more than that reads its whole `down_proj` instead. Recovery
from a sketch needs what the columns that are left out do: that is the product of the whole `down_proj` with the sketch, a
few numbers per row, which the extra file has as well where it is smaller than reading the columns.
Loaders look for weights beside config.json, not in folders, so that nobody takes the extra file for weights.
"""

import json
import math
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_lop.files import write_whole
from hf_lop.hub.read.checkpoint import Shards
from hf_lop.hub.read.files import Folder
from hf_lop.hub.read.load import read_config
from hf_lop.hub.read.skeleton import load_skeleton
from hf_lop.hub.read.stored import StoredPieces, stored_pieces
from hf_lop.hub.write.companions import matches
from hf_lop.hub.write.push import WEIGHTS
from hf_lop.recovery.solve import sketch_products
from hf_lop.units.kinds import find_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRUNER, TRANSPOSED = "pruner", "elastic"  # folders of the repository
SHARE = 0.75  # of the neurons whose transposed weights are stored
SHARD = 5 * 10**9  # bytes of a file, at most
PRODUCTS = ".sketch_products"  # behind the name of an output projection W `[d, n]`: W B^T `[d, r]`, B being the sketch

_PRUNERS: "weakref.WeakKeyDictionary[Any, PreTrainedModel]" = weakref.WeakKeyDictionary()


def keep_pruner(model: "PreTrainedModel", pruner: "PreTrainedModel") -> None:
    """Remember the pruner of a sorted model until it is saved."""
    _PRUNERS[model] = pruner


def kept_pruner(model: "PreTrainedModel") -> "PreTrainedModel | None":
    """Return the pruner of a model that `make_elastic` sorted, else None."""
    return _PRUNERS.get(model) if isinstance(getattr(model.config, "elastic_config", None), dict) else None


def transposed_rows(entry: StoredPieces) -> int:
    """Return how many columns of a tensor are stored transposed; 0 where a prefix of pieces is one of the bytes anyway."""
    if entry.axis != 1 or not entry.is_prefix:
        return 0
    return entry.length(max(1, int(entry.unit.count * SHARE)))


def save_transposed(directory: Path, directions: Callable[[int], torch.Tensor], sketch_rows: int) -> None:
    """Write the extra files beside the weights that transformers just saved.

    Args:
        directory (`Path`): the folder.
        directions (`Callable`): gives the sketch of a layer, B `[r, n] float32`.
        sketch_rows (`int`): r; 0 if there is none.

    Raises:
        UnsupportedModelError: if the weights of the FFNs are not stored as the model has them.
    """
    target = directory / TRANSPOSED
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        if matches(path.name, WEIGHTS):  # what an earlier save left belongs to other weights
            path.unlink()
    with Shards(Folder(directory)) as shards:
        skeleton = load_skeleton(directory, read_config(directory), shards)
        entries = stored_pieces(skeleton, find_units(skeleton.model))
        makers: dict[str, Callable[[], torch.Tensor]] = {}
        sizes: dict[str, int] = {}
        for name, entry in entries.items():
            place = shards.places[name]
            size, features = place.end - place.start, math.prod(place.shape) // entry.size
            if rows := transposed_rows(entry):
                makers[name] = partial(_first_columns, shards, name, rows)
                sizes[name] = size // entry.size * rows
            if entry.output and 0 < 2 * features * sketch_rows * torch.float32.itemsize < size:
                makers[name + PRODUCTS] = partial(_products, shards, name, entry, directions)
                sizes[name + PRODUCTS] = features * sketch_rows * torch.float32.itemsize
        groups = _groups(sizes)
        names = [SAFE_WEIGHTS_NAME]
        if len(groups) > 1:
            names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        for file, group in zip(names, groups, strict=True):
            save_file({name: makers[name]() for name in group}, target / file, metadata={"format": "pt"})
    if len(groups) > 1:
        weight_map = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_whole(target / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2).encode())


def _first_columns(shards: Shards, name: str, columns: int) -> torch.Tensor:
    return shards.rows(name)[:, :columns].T.contiguous()


def _products(
    shards: Shards, name: str, entry: StoredPieces, directions: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    weight = shards.rows(name)
    return sketch_products(weight if entry.axis == 1 else weight.T, directions(entry.layer))


def _groups(sizes: dict[str, int]) -> list[list[str]]:
    """Fill one file after the other."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not groups:
            groups.append([])
            room = SHARD
        groups[-1].append(name)
        room -= size
    return groups
