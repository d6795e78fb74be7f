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
from safetensors.torch import _TYPES as TORCH_DTYPES

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.hub.read.files import Files
from hf_lop.hub.read.safetensors import Place, open_files, read_headers, shard_names

__all__ = ["Place", "Shards", "open_shards"]


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
            for file, named in shard_names(files).items():
                if files.size(file) is not None:
                    self.stamps[file] = files.stamp(file)
                own = read_headers(files, file)
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
    return Shards(open_files(name, revision=revision, token=token))
