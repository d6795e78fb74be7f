"""Elastic repositories, the reading side: the weights of one size, put together from ranges of bytes."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.ffn.stored import BITS, LENGTH, Place
from hf_lop.hub.elastic import PRODUCTS, TRANSPOSED
from hf_lop.hub.files import Files
from hf_lop.hub.shards import Shards
from hf_lop.hub.staging import check_room
from hf_lop.hub.stored_ffns import StoredFFN

__all__ = ["open_transposed", "write_size"]

CHUNK = 2**25  # bytes of one request, at most
READERS = 8  # requests at a time


class _Inside:
    """The files of a folder inside a repository; see `Files`."""

    def __init__(self, files: Files, folder: str) -> None:
        self._files, self._folder, self.name = files, folder, f"{folder}/ in {files.name}"

    def size(self, file: str) -> int | None:
        """Return the bytes of a file, or None if there is none."""
        return self._files.size(f"{self._folder}/{file}")

    def stamp(self, file: str) -> str:
        """Return what changes when a file does."""
        return self._files.stamp(f"{self._folder}/{file}")

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on."""
        self._files.read_into(f"{self._folder}/{file}", start, buffer)

    def expect(self, file: str, start: int, length: int) -> None:
        """Hint that these bytes are read next."""
        self._files.expect(f"{self._folder}/{file}", start, length)

    def close(self) -> None:
        """Leave the repository open: it is closed by itself."""


def open_transposed(files: Files) -> Shards:
    """Open the extra tensors of an elastic repository.

    Raises:
        CheckpointMismatchError: if they are missing or damaged.
    """
    try:
        return Shards(_Inside(files, TRANSPOSED))
    except InvalidInputError as error:
        raise CheckpointMismatchError(
            f"{files.name} says that it is elastic, but its folder {TRANSPOSED}/ has no weights ({error}). Download all of "
            "it again, or load the whole model and prune it with the pruner in the same repository."
        ) from error


class _Copy(NamedTuple):
    """Bytes that are taken over as they are: of one file from `start` on, to `at` in the new one."""

    file: str
    start: int
    length: int
    at: int


class Fits(NamedTuple):
    """What makes an output projection of `width` neurons, given its layer.

    Attributes:
        whole (`Callable`): from the dense one, `[d, n]`.
        prefix (`Callable`): from its first columns, `[d, k]`, and its products with the sketch, `[d, r] float32`.
    """

    whole: Callable[[int, torch.Tensor], torch.Tensor]
    prefix: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class _Part(NamedTuple):
    """A tensor whose first neurons are taken, to `at` in the new file, by more than copying bytes."""

    name: str
    entry: StoredFFN
    width: int
    at: int


def write_size(
    main: Shards,
    transposed: Shards,
    entries: Mapping[str, StoredFFN],
    widths: Sequence[int],
    path: Path,
    *,
    fits: Fits | None,
    remote: bool,
) -> None:
    """Write the weights of a model of given widths as one safetensors file, reading little more than they weigh.

    Args:
        main (`Shards`): the dense checkpoint with sorted neurons.
        transposed (`Shards`): its extra tensors. Where one is missing or has too few rows, the whole tensor is read.
        entries (`Mapping[str, StoredFFN]`): which tensors of `main` have entries for every neuron.
        widths (`Sequence[int]`): `[L]` neurons to keep.
        path (`Path`): file to write.
        fits (`Fits`, *optional*): lets the output projections take over what the removed neurons did.
        remote (`bool`): whether bytes come over a network: several requests run at a time then, with a progress bar on
            stderr.

    Raises:
        CheckpointMismatchError: if the extra tensors are not those of the checkpoint, or a file is damaged.
        InvalidInputError: if the Hub does not answer, or the disk has no room.
    """
    shapes = {name: _shape(place, entries.get(name), widths) for name, place in main.places.items()}
    # Larger numbers first, so that every tensor is aligned, as safetensors has it; else in the order they are stored.
    names = sorted(main.places, key=lambda name: -BITS[main.places[name].dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, at = {}, 0
    for name in names:
        starts[name] = at
        at += _bytes(main.places[name].dtype, shapes[name])
        header[name] = {
            "dtype": main.places[name].dtype,
            "shape": list(shapes[name]),
            "data_offsets": [starts[name], at],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin, copies, parts = LENGTH + len(text), [], []
    for name in names:
        entry, place = entries.get(name), main.places[name]
        if entry is None or widths[entry.layer] == entry.width:
            copies.append(_Copy(place.file, place.start, place.end - place.start, begin + starts[name]))
        elif entry.dim == 0 and not (entry.output and fits):
            copies += _prefixes(place, entry, widths[entry.layer], begin + starts[name])
        else:
            parts.append(_Part(name, entry, widths[entry.layer], begin + starts[name]))
    check_room(path.parent, begin + at)
    with open(path, "wb") as file:
        file.truncate(begin + at)
        file.write(len(text).to_bytes(LENGTH, "little") + text)
        file.flush()
        jobs = [*(_copy_job(main, copy) for copy in _chunks(copies))]
        jobs += [_part_job(main, transposed, part, fits) for part in parts]
        _run(jobs, file.fileno(), total=at, remote=remote)


def _shape(place: Place, entry: StoredFFN | None, widths: Sequence[int]) -> tuple[int, ...]:
    shape = list(place.shape)
    if entry is not None:
        shape[entry.dim] = entry.parts * widths[entry.layer]
    return tuple(shape)


def _bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * BITS[dtype] // 8


def _prefixes(place: Place, entry: StoredFFN, width: int, at: int) -> Iterator[_Copy]:
    """The first rows of every part of a tensor."""
    part = (place.end - place.start) // entry.parts
    length = part // entry.width * width
    for index in range(entry.parts):
        yield _Copy(place.file, place.start + index * part, length, at + index * length)


def _chunks(copies: Sequence[_Copy]) -> Iterator[_Copy]:
    """The same copies, joined where one begins where another ends, and split into requests of moderate length."""
    joined: list[_Copy] = []
    for copy in copies:
        last = joined[-1] if joined else _Copy("", 0, 0, 0)
        ends = (last.file, last.start + last.length, last.at + last.length)
        if ends == (copy.file, copy.start, copy.at):
            joined[-1] = last._replace(length=last.length + copy.length)
        elif copy.length:
            joined.append(copy)
    for copy in joined:
        for done in range(0, copy.length, CHUNK):
            yield _Copy(copy.file, copy.start + done, min(CHUNK, copy.length - done), copy.at + done)


Job = Callable[[int], int]  # writes into the open file and returns how many bytes


def _copy_job(main: Shards, copy: _Copy) -> Job:
    def run(file: int) -> int:
        buffer = bytearray(copy.length)
        main.files.read_into(copy.file, copy.start, memoryview(buffer))
        return _write(file, memoryview(buffer), copy.at)

    return run


def _part_job(main: Shards, transposed: Shards, part: _Part, fits: Fits | None) -> Job:
    name, entry, place = part.name, part.entry, main.places[part.name]
    extra, products = (transposed.places.get(own) for own in (name, name + PRODUCTS))
    turned = entry.dim == 1  # neurons are columns of what is stored
    if extra is not None and (extra.dtype != place.dtype or extra.shape[1:] != place.shape[:1] or not turned):
        raise _damaged(
            name, f"{place.dtype} of {list(place.shape)} and transposed as {extra.dtype} of {list(extra.shape)}"
        )
    features = place.shape[1 - entry.dim] if len(place.shape) == 2 else 0
    if products is not None and (
        products.dtype != "F32" or products.shape[:1] != (features,) or len(products.shape) != 2
    ):
        raise _damaged(name, f"{list(place.shape)}, its products as {products.dtype} of {list(products.shape)}")
    is_prefix = not turned or (extra is not None and extra.shape[0] >= part.width and entry.parts == 1)
    fit = fits if entry.output else None

    def columns() -> torch.Tensor:
        """The tensor `[d, k]`, of the first neurons only."""
        if not turned:
            return main.rows(name, 0, part.width).T
        if is_prefix:
            found = transposed.rows(name, 0, part.width).T
            _check_row(main, name, found[0])
            return found
        dense: Any = main.rows(name)
        return dense.unflatten(1, (entry.parts, -1))[:, :, : part.width].flatten(1)  # type: ignore[no-any-return]

    def run(file: int) -> int:
        if fit is None:
            tensor = columns()
        elif is_prefix and products is not None:
            tensor = fit.prefix(entry.layer, columns(), transposed.rows(name + PRODUCTS))
        else:
            tensor = fit.whole(entry.layer, main.rows(name) if turned else main.rows(name).T)
        data: Any = (tensor if turned else tensor.T).contiguous().view(-1).view(torch.uint8).numpy()
        return _write(file, memoryview(data), part.at)

    return run


def _damaged(name: str, what: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{name} is stored as {what}. The elastic repository is damaged: make it anew with make_elastic."
    )


def _check_row(main: Shards, name: str, row: torch.Tensor) -> None:
    """Compare the first row with the checkpoint's: weights that were replaced later have others."""
    place = main.places[name]
    stored = bytearray(len(row) * row.element_size())
    main.read_into(place, 0, stored)
    if stored != row.contiguous().view(torch.uint8).numpy().tobytes():
        raise CheckpointMismatchError(
            f"{name} differs from its transposed copy: the weights were replaced after the repository was made elastic. "
            "Make it anew with make_elastic, or load the whole model."
        )


def _write(file: int, data: memoryview, at: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], at + done)
    return done


def _run(jobs: Sequence[Job], file: int, *, total: int, remote: bool) -> None:
    if not remote:
        for job in jobs:
            job(file)
        return
    pool = ThreadPoolExecutor(READERS)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="Reading prefixes") as bar:
            for written in pool.map(lambda job: job(file), jobs):
                bar.update(written)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, what has not begun is left
