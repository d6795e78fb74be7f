"""Writing the folder of a pruned model from the files of the dense one, tensor by tensor, whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from hf_lop.errors import CheckpointMismatchError
from hf_lop.hub.read.checkpoint import Shards
from hf_lop.hub.read.files import Folder
from hf_lop.hub.write.check import check_tensors
from hf_lop.hub.write.companions import PROCESSOR, TERMS, TOKENIZER, matches
from hf_lop.hub.write.staging import Staging
from hf_lop.hub.write.tensors import Cutter, SavedTensor, layout
from hf_lop.hub.write.whole import check_new, check_room

# Beside the weights, what the result has of the dense model's.
BESIDE = (*PROCESSOR, *TOKENIZER, *TERMS, "README.md", GENERATION_CONFIG_NAME)
SHARD_SIZE = "50GB"  # that of save_pretrained


def write_pruned(
    model: PreTrainedModel,
    tensors: Sequence[SavedTensor],
    shards: Shards,
    out: Path,
    *,
    recovery: str,
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """Write what `model.save_pretrained(out)` would, byte by byte, with the weights from the files of the dense model.

    The folder appears when it is complete. The same call goes on where an earlier one was killed.

    Args:
        model (`PreTrainedModel`): the pruned model, on the meta device.
        tensors (`Sequence[SavedTensor]`): its tensors, in the order in which it saves them.
        shards (`Shards`): of the dense model.
        out (`Path`): the folder; new or empty.
        recovery (`str`): what determines the results of `SavedTensor.solve`, such as a digest.
        max_shard_size (`str`): see `save_pretrained`.

    Raises:
        InvalidInputError: if the folder holds something, the disk is too full, or another process writes it.
        CheckpointMismatchError: if a file of the dense model changed meanwhile.
    """
    check_new(out)
    by_name = {tensor.name: tensor for tensor in tensors}
    empty = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    files = {
        file: layout([by_name[name] for name in names], {"format": "pt"})
        for file, names in split.filename_to_tensors.items()
    }
    job = _digest(model, tensors, shards, [recovery, *(header.hex() for header, _ in files.values())])
    total = sum(len(header) + sum(tensor.num_bytes for tensor in inside) for header, inside in files.values())
    ordered = [tensor for _, inside in files.values() for tensor in inside]
    with Staging(out, job) as staging, Cutter(shards, ordered) as cutter:
        check_room(staging.root, total - staging.resumed)
        staging.once("companions", lambda: model.save_pretrained(staging.folder, state_dict={}))
        with tqdm(desc="streaming", total=total, unit="B", unit_scale=True) as bar:
            for file, (header, inside) in files.items():
                staging.write(file, _parts(header, inside, cutter, bar))
        if split.is_sharded:
            metadata = {"total_parameters": model.num_parameters(), **split.metadata}
            index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            staging.write(SAFE_WEIGHTS_INDEX_NAME, [(text.encode(), len(text.encode()))])
        try:
            shards.check_unchanged()
            check_tensors(type(model).__name__, empty, staging.folder)
        except CheckpointMismatchError:
            staging.clear()  # parts are of other weights, which a later run cannot see
            raise
        staging.finish()


def _parts(
    header: bytes, inside: Sequence[SavedTensor], cutter: Cutter, bar: Any
) -> Iterator[tuple[bytes | Callable[[], Iterator[memoryview]], int]]:
    yield header, len(header)
    bar.update(len(header))
    for tensor in inside:
        yield partial(cutter.parts, tensor), tensor.num_bytes
        bar.update(tensor.num_bytes)


def _digest(model: PreTrainedModel, tensors: Sequence[SavedTensor], shards: Shards, more: list[str]) -> str:
    """Return what changes when a byte of the result would."""
    digest = hashlib.sha256()

    def add(text: str) -> None:
        digest.update(f"{len(text)}:{text}".encode())

    for text in (model.config.to_json_string(), shards.files.name, *more):
        add(text)
    for file, stamp in sorted(shards.stamps.items()):
        add(f"{file} {stamp}")
    files = shards.files
    for path in sorted(files.path.iterdir()) if isinstance(files, Folder) else ():  # those of a commit do not change
        if path.is_file() and matches(path.name, BESIDE):
            add(f"{path.name} {files.stamp(path.name)}")
    kept: dict[int, str] = {}
    for tensor in tensors:
        rows = None
        if tensor.kept is not None:
            key = id(tensor.kept)
            if key not in kept:
                raw: Any = tensor.kept.numpy()
                kept[key] = hashlib.sha256(raw.tobytes()).hexdigest()
            rows = kept[key]
        add(f"{tensor.name} {tensor.source} {tensor.axis} {rows} {tensor.solve is not None}")
    return digest.hexdigest()
