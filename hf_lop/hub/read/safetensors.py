"""The safetensors format: where each tensor is in a file, from a header that is checked before it is believed, or made.

A file is 8 bytes, N as a little-endian integer; N bytes of JSON, the header; then the bytes of all tensors, without gaps.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.hub.read.files import Files, Folder

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_INDEX = 100_000_000  # bytes; that of a model of 100,000 tensors has about 10 MB
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
LENGTH = 8  # bytes before the header
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
# Bare pickles, and the zip that torch.save puts one into.
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


class Place(NamedTuple):
    """Where a stored tensor is.

    Attributes:
        file (`str`): file name inside the checkpoint.
        dtype (`str`): as safetensors spells it, such as "BF16"; a key of `BITS`.
        shape (`tuple[int, ...]`): its shape.
        start (`int`): byte offset in the file.
        end (`int`): byte offset behind its last byte.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def num_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return what a tensor takes."""
    return math.prod(shape) * BITS[dtype] // 8


def make_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return what a file begins with, and at which byte of it each tensor begins.

    Args:
        tensors (`Mapping`): dtype, a key of `BITS`, and shape by name, in the order in which their bytes follow.
        metadata (`Mapping[str, str]`): what the header says about the file.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + num_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH)  # so that tensors are aligned in memory
    begin = LENGTH + len(text)
    return len(text).to_bytes(LENGTH, "little") + text, {name: begin + start for name, start in starts.items()}


def header_length(label: str, first: bytes, size: int) -> int:
    """Return N, the length of a file's header.

    Args:
        label (`str`): what messages call the file.
        first (`bytes`): its first 8 bytes, fewer if it has no more.
        size (`int`): bytes of the file.

    Raises:
        CheckpointMismatchError: if the file is no safetensors file, or the header exceeds it or 100 MB.
    """
    length = int.from_bytes(first, "little")
    # A header of 896 bytes begins like a pickle, too; but what a pickle begins with is no length that fits its file.
    if first.startswith(PICKLES) and length > size - LENGTH:
        raise CheckpointMismatchError(
            f"{label} begins with {first!r}: it is a pickle, which can run code when it is read. hf_lop reads safetensors "
            "only. Get the checkpoint as safetensors from its author."
        )
    if len(first) < LENGTH or length > size - LENGTH or length < 2:
        raise CheckpointMismatchError(
            f"{label} has {size:,} bytes, too few for a header of {length:,}. It is no safetensors file, or truncated: "
            "download or copy it again."
        )
    if length > LONGEST_HEADER:
        raise CheckpointMismatchError(
            f"{label} claims a header of {length:,} bytes; safetensors allows {LONGEST_HEADER:,}. Do not use this file."
        )
    return length


def parse_json(label: str, text: bytes) -> dict[str, Any]:
    """Return a JSON object of a repository.

    Raises:
        CheckpointMismatchError: if it is none, is nested without end, or has a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key comes twice")
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are no text, and endless numbers
        raise CheckpointMismatchError(f"{label} is damaged: {error}. Download or copy it again.") from error
    if not isinstance(parsed, dict):
        raise CheckpointMismatchError(
            f"{label} holds a JSON {type(parsed).__name__}, not an object. Download it again."
        )
    return parsed


def parse_header(file: str, text: bytes, size: int, *, label: str | None = None) -> dict[str, Place]:
    """Return the place of every tensor that a header names, in order of offset.

    Args:
        file (`str`): file name inside the checkpoint.
        text (`bytes`): the header.
        size (`int`): bytes of the file.
        label (`str`, *optional*): what messages call the file; its name by default.

    Raises:
        CheckpointMismatchError: if an entry is malformed, has an unknown dtype, a size that is not that of its shape, or an
            offset outside the file, or if tensors overlap or leave gaps.
    """
    label, begin = label or file, LENGTH + len(text)
    entries = parse_json(f"The header of {label}", text)
    entries.pop("__metadata__", None)
    places = sorted(
        (_place(file, label, name, entry, begin) for name, entry in entries.items()),
        key=lambda found: (found[1].start, found[1].end),
    )
    expected = begin
    for name, place in places:
        if place.start != expected:
            kind = "overlaps the one before it" if place.start < expected else "leaves a gap before it"
            raise CheckpointMismatchError(
                f"{label}: tensor {name!r} begins at byte {place.start:,} and {kind}, which ends at {expected:,}. "
                "The file is damaged: download or copy it again."
            )
        expected = place.end
    if expected != size:
        raise CheckpointMismatchError(
            f"{label} has {size:,} bytes, its header describes {expected:,}. It is truncated or damaged: download or copy it "
            "again."
        )
    return dict(places)


def _place(file: str, label: str, name: str, entry: Any, begin: int) -> tuple[str, Place]:
    def whole(value: Any) -> TypeGuard[list[int]]:
        return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)

    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not whole(shape) or not whole(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise CheckpointMismatchError(
            f"{label}: the entry of tensor {name!r} is {str(entry)[:200]}; it needs a dtype, a shape and two data_offsets. "
            "The file is damaged: download or copy it again."
        )
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointMismatchError(
            f"{label}: tensor {name!r} has dtype {str(dtype)[:40]!r}; known are {', '.join(BITS)}. "
            "Update hf_lop, or store the tensor otherwise."
        )
    start, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - start):
        raise CheckpointMismatchError(
            f"{label}: tensor {name!r} takes bytes {start:,} to {end:,}, but {dtype} of shape {shape} takes {bits // 8:,}. "
            "The file is damaged: download or copy it again."
        )
    return name, Place(file, dtype, tuple(shape), begin + start, begin + end)


# -- Files ---------------------------------------------------------------------------------------------------------------


def open_files(name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Files:
    """Open the files of a Hub id or folder.

    Args:
        name (`str` or `Path`): Hub id or folder.
        revision (`str`, *optional*): branch, tag or commit; it is resolved once, so that all bytes are of one commit.
        token (`str` or `bool`, *optional*): for the Hub.

    Raises:
        InvalidInputError: if there is no such model.
    """
    if Path(name).is_dir():
        return Folder(name)
    from huggingface_hub import hf_hub_download  # a tenth of a second, which plans of a local pruner need not wait for
    from huggingface_hub.errors import HFValidationError

    from hf_lop.hub.read.repository import Repository

    try:
        path = hf_hub_download(str(name), "config.json", revision=revision, token=token)
    except (OSError, HFValidationError) as error:
        raise InvalidInputError(f"{name} cannot be read as a model: {error} Pass a folder or a Hub id.") from error
    return Repository(str(name), Path(path).parent.name, token=token)


def read_bytes(files: Files, file: str, start: int, length: int) -> bytes:
    """Read a part of a file."""
    buffer = bytearray(length)
    files.read_into(file, start, memoryview(buffer))
    return bytes(buffer)


def shard_names(files: Files) -> dict[str, set[str]]:
    """Return the weight files, in order, each with the tensors that an index says it has.

    Raises:
        CheckpointMismatchError: if the index is damaged or hostile, or the weights are pickles.
        InvalidInputError: if there are no weights.
    """
    if files.size(WHOLE) is not None:  # where both exist, transformers reads this one too
        return {WHOLE: set()}
    size = files.size(INDEX)
    if size is None:
        if any(files.size(name) is not None for name in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
            raise CheckpointMismatchError(
                f"{files.name} holds its weights as a pickle (pytorch_model.bin), which can run code when it is read. hf_lop "
                "reads safetensors only. Get the checkpoint as safetensors from its author."
            )
        raise InvalidInputError(
            f"{files.name} has neither {WHOLE} nor {INDEX}. Pass a folder or Hub id with the "
            f"weights of a model.{files.hint}"
        )
    label = f"{INDEX} of {files.name}"
    if size > LARGEST_INDEX:
        raise CheckpointMismatchError(
            f"{label} has {size:,} bytes; at most {LARGEST_INDEX:,} are read. Do not use it."
        )
    named = parse_json(label, read_bytes(files, INDEX, 0, size)).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointMismatchError(f"{label} has no weight_map of tensor names to files. Download it again.")
    found: dict[str, set[str]] = {}
    for tensor, file in named.items():
        found.setdefault(_checked_name(label, file), set()).add(tensor)
    return dict(sorted(found.items()))


def _checked_name(label: str, file: Any) -> str:
    """Return the name of a shard, if it is one inside the repository."""
    inside = isinstance(file, str) and file.isprintable() and not set(file) & set("\\:%?#*")
    if not inside or any(part in ("", ".", "..") for part in file.split("/")):
        raise CheckpointMismatchError(
            f"{label} names the shard {str(file)[:200]!r}, which is no file of the repository. Do not use this checkpoint."
        )
    if not file.endswith(".safetensors"):
        raise CheckpointMismatchError(
            f"{label} names the shard {file[:200]!r}; hf_lop reads .safetensors files only, as others can run code. "
            "Do not use this checkpoint."
        )
    return str(file)


def read_headers(files: Files, file: str) -> dict[str, Place]:
    """Return the tensors of a file.

    Raises:
        CheckpointMismatchError: if it is missing or damaged.
    """
    size, label = files.size(file), f"{file} of {files.name}"
    if size is None:
        raise CheckpointMismatchError(
            f"{label} is missing, but the index names it. Download all files again.{files.hint}"
        )
    length = header_length(label, read_bytes(files, file, 0, min(LENGTH, size)), size)
    return parse_header(file, read_bytes(files, file, LENGTH, length), size, label=label)
