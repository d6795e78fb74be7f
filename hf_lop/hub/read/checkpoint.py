"""Reading safetensors checkpoints lazily and safely, from a folder or from the Hub, without downloading them whole.

    with open_shards("org/base", revision=commit) as shards:
        place = shards.places["lm_head.weight"]
        shards.read_into(place, 0, buffer)

A repository may be hostile: names, headers and offsets are checked before anything is read by them, and pickles are refused.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import _TYPES as TORCH_DTYPES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.hub.read.files import Files, Folder, Repository
from hf_lop.hub.read.safetensors import LENGTH, Place, header_length, parse_header, parse_json

__all__ = ["Place", "Shards", "open_shards"]

LARGEST_INDEX = 100_000_000  # bytes; that of a model of 100,000 tensors has about 10 MB


class Shards:
    """The tensors of a checkpoint, every header of it checked; their bytes are read only when asked for.

    Attributes:
        files: where the bytes come from.
        places (`dict[str, Place]`): of every tensor, by name; file by file in order of offset.
        stamps (`dict[str, str]`): by file, what changes when it does, as it was when it was opened.
    """

    def __init__(self, files: Files) -> None:
        """Read and check index and headers.

        Raises:
            CheckpointMismatchError: if one is damaged or hostile, or the weights are pickles.
            InvalidInputError: if there are no weights.
        """
        self.files = files
        self.places: dict[str, Place] = {}
        self.stamps: dict[str, str] = {}
        try:
            for file, named in _shard_names(files).items():
                self.stamps[file], own = _read_header(files, file)
                if absent := named - own.keys():
                    raise CheckpointMismatchError(
                        f"The index of {files.name} says that {file} holds {min(absent)!r}; it does not. Index and shards are "
                        "of different commits: download all of them again."
                    )
                if twice := own.keys() & self.places.keys():
                    raise CheckpointMismatchError(
                        f"{files.name}: tensor {min(twice)!r} is both in {self.places[min(twice)].file} and in {file}. "
                        "Download all of them again."
                    )
                self.places |= own
        except BaseException:
            files.close()
            raise

    def read_into(self, place: Place, start: int, buffer: Any) -> None:
        """Fill a writable buffer with the bytes of a tensor from its byte `start` on.

        Raises:
            InvalidInputError: if that exceeds the tensor, or the Hub does not answer.
            CheckpointMismatchError: if the file became shorter.
        """
        view = memoryview(buffer).cast("B")
        if start < 0 or place.start + start + len(view) > place.end:
            raise InvalidInputError(
                f"Bytes {start} to {start + len(view)} were asked for; the tensor has {place.end - place.start}."
            )
        self.files.read_into(place.file, place.start + start, view)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows `[start, stop)` of a tensor (all of it by default), in its dtype.

        Raises:
            CheckpointMismatchError: if there is no such tensor, or torch has no such dtype.
            InvalidInputError: if there are no such rows.
        """
        if name not in self.places:
            raise CheckpointMismatchError(
                f"{self.files.name} holds no tensor {name!r}. Take all files from one commit."
            )
        place = self.places[name]
        dtype = TORCH_DTYPES.get(place.dtype)
        if dtype is None:
            raise CheckpointMismatchError(
                f"{place.file}: {name!r} is {place.dtype}, which torch cannot read this way."
            )
        length = place.shape[0] if place.shape else 1
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise InvalidInputError(f"Rows {start} to {stop} of {name!r} were asked for; it has {length}.")
        size = (place.end - place.start) // length if length else 0
        found = torch.empty((stop - start, *place.shape[1:]) if place.shape else (), dtype=dtype)
        if found.numel():
            self.read_into(place, start * size, found.view(-1).view(torch.uint8).numpy())
        return found

    def check_unchanged(self) -> None:
        """Refuse what was read if a file changed meanwhile: some of it may be of other weights.

        Raises:
            CheckpointMismatchError: if one did.
        """
        for file, stamp in self.stamps.items():
            if self.files.size(file) is None or self.files.stamp(file) != stamp:
                raise CheckpointMismatchError(
                    f"{file} in {self.files.name} changed while it was read. Do the same again, and do not change it meanwhile."
                )

    def close(self) -> None:
        """Close what is open."""
        self.files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def open_shards(name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Shards:
    """Open the weights of a Hub id or folder.

    Args:
        name (`str` or `Path`): Hub id or folder.
        revision (`str`, *optional*): branch, tag or commit; it is resolved once, so that all bytes are of one commit.
        token (`str` or `bool`, *optional*): for the Hub.

    Returns:
        `Shards`: close it, or use it as a context.

    Raises:
        InvalidInputError: if there is no such model, or it has no weights.
        CheckpointMismatchError: if a file of it is damaged or hostile, or it holds pickles only.
    """
    if Path(name).is_dir():
        return Shards(Folder(name))
    try:
        path = hf_hub_download(str(name), "config.json", revision=revision, token=token)
    except (OSError, HFValidationError) as error:
        raise InvalidInputError(f"{name} cannot be read as a model: {error} Pass a folder or a Hub id.") from error
    return Shards(Repository(str(name), Path(path).parent.name, token=token))


def _read(files: Files, file: str, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    files.read_into(file, start, memoryview(buffer))
    return bytes(buffer)


def _shard_names(files: Files) -> dict[str, set[str]]:
    """Return the weight files, in order, each with the tensors that an index says it has."""
    if files.size(SAFE_WEIGHTS_NAME) is not None:  # where both exist, transformers reads this one too
        return {SAFE_WEIGHTS_NAME: set()}
    size = files.size(SAFE_WEIGHTS_INDEX_NAME)
    if size is None:
        if any(files.size(name) is not None for name in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
            raise CheckpointMismatchError(
                f"{files.name} holds its weights as a pickle (pytorch_model.bin), which can run code when it is read. hf_lop "
                "reads safetensors only. Get the checkpoint as safetensors from its author."
            )
        raise InvalidInputError(
            f"{files.name} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. Pass a folder or Hub id with the "
            f"weights of a model.{files.hint}"
        )
    label = f"{SAFE_WEIGHTS_INDEX_NAME} of {files.name}"
    if size > LARGEST_INDEX:
        raise CheckpointMismatchError(
            f"{label} has {size:,} bytes; at most {LARGEST_INDEX:,} are read. Do not use it."
        )
    named = parse_json(label, _read(files, SAFE_WEIGHTS_INDEX_NAME, 0, size)).get("weight_map")
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


def _read_header(files: Files, file: str) -> tuple[str, dict[str, Place]]:
    """Return stamp and tensors of a file."""
    size, label = files.size(file), f"{file} of {files.name}"
    if size is None:
        raise CheckpointMismatchError(
            f"{label} is missing, but the index names it. Download all files again.{files.hint}"
        )
    stamp = files.stamp(file)
    length = header_length(label, _read(files, file, 0, min(LENGTH, size)), size)
    return stamp, parse_header(file, _read(files, file, LENGTH, length), size, label=label)
