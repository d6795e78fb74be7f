"""The weights of one size of an elastic repository as one file, put together from ranges of bytes."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from hf_lop.hub.elastic.read import Solvers, check_transposed, read_prefix
from hf_lop.hub.read.checkpoint import Shards
from hf_lop.hub.read.safetensors import BITS, Place, make_header, num_bytes
from hf_lop.hub.read.stored import StoredPieces
from hf_lop.hub.write.whole import check_room

CHUNK = 2**25  # bytes of one request, at most
READERS = 8  # requests at a time


class _Copy(NamedTuple):
    """Bytes that are taken over as they are: of one file from `start` on, to `at` in the new one."""

    file: str
    start: int
    length: int
    at: int


class _Part(NamedTuple):
    """A tensor whose first neurons are taken, to `at` in the new file, by more than copying bytes."""

    name: str
    entry: StoredPieces
    width: int
    at: int


def write_size(
    main: Shards,
    transposed: Shards,
    entries: Mapping[str, StoredPieces],
    widths: Sequence[int],
    path: Path,
    *,
    solvers: Solvers | None,
    remote: bool,
) -> None:
    """Write the weights of a model of given widths as one safetensors file, reading little more than they weigh.

    Args:
        main (`Shards`): the dense checkpoint with sorted neurons.
        transposed (`Shards`): its extra tensors. Where one is missing or has too few rows, the whole tensor is read.
        entries (`Mapping[str, StoredPieces]`): which tensors of `main` have entries for every neuron.
        widths (`Sequence[int]`): `[L]` neurons to keep.
        path (`Path`): file to write.
        solvers (`Solvers`, *optional*): lets the output projections take over what the removed neurons did.
        remote (`bool`): whether bytes come over a network: several requests run at a time then, with a progress bar on
            stderr.

    Raises:
        CheckpointMismatchError: if the extra tensors are not those of the checkpoint, or a file is damaged.
        InvalidInputError: if the Hub does not answer, or the disk has no room.
    """
    check_transposed(main, transposed, entries)
    shapes = {name: _shape(place, entries.get(name), widths) for name, place in main.places.items()}
    # Larger numbers first, so that every tensor is aligned, as safetensors has it; else in the order they are stored.
    names = sorted(main.places, key=lambda name: -BITS[main.places[name].dtype])
    tensors = {name: (main.places[name].dtype, shapes[name]) for name in names}
    header, starts = make_header(tensors, {"format": "pt"})
    total = len(header) + sum(num_bytes(*tensor) for tensor in tensors.values())
    copies, parts = [], []
    for name in names:
        entry, place = entries.get(name), main.places[name]
        if entry is None or widths[entry.layer] == entry.unit.count:
            copies.append(_Copy(place.file, place.start, place.end - place.start, starts[name]))
        elif entry.axis == 0 and not (entry.output and solvers):
            copies += _prefixes(place, entry, widths[entry.layer], starts[name])
        else:
            parts.append(_Part(name, entry, widths[entry.layer], starts[name]))
    check_room(path.parent, total)
    with open(path, "wb") as file:
        file.truncate(total)
        file.write(header)
    jobs = [*(_copy_job(main, copy) for copy in _chunks(copies))]
    jobs += [_part_job(main, transposed, part, solvers) for part in parts]
    _run(jobs, path, total=total - len(header), remote=remote)


def _shape(place: Place, entry: StoredPieces | None, widths: Sequence[int]) -> tuple[int, ...]:
    shape = list(place.shape)
    if entry is not None:
        shape[entry.axis] = entry.length(widths[entry.layer])
    return tuple(shape)


def _prefixes(place: Place, entry: StoredPieces, width: int, at: int) -> Iterator[_Copy]:
    """The rows of a tensor that are left with its first pieces."""
    row = (place.end - place.start) // entry.size
    for start, stop in entry.runs(width):
        yield _Copy(place.file, place.start + start * row, (stop - start) * row, at)
        at += (stop - start) * row


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


Job = Callable[[Path], int]  # writes into the file and returns how many bytes


def _copy_job(main: Shards, copy: _Copy) -> Job:
    def run(path: Path) -> int:
        buffer = bytearray(copy.length)
        main.files.read_into(copy.file, copy.start, memoryview(buffer))
        return _write(path, memoryview(buffer), copy.at)

    return run


def _part_job(main: Shards, transposed: Shards, part: _Part, solvers: Solvers | None) -> Job:
    def run(path: Path) -> int:
        tensor = read_prefix(main, transposed, part.name, part.entry, part.width, solvers)
        data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        return _write(path, memoryview(data), part.at)

    return run


def _write(path: Path, data: memoryview, at: int) -> int:
    # Every job opens the file itself. After a second Ctrl-C jobs go on, with nobody waiting for them: the number of a file that
    # is closed by then may be that of another one.
    done = 0
    with open(path, "r+b", buffering=0) as file:
        while done < len(data):
            done += os.pwrite(file.fileno(), data[done:], at + done)
    return done


def _run(jobs: Sequence[Job], path: Path, *, total: int, remote: bool) -> None:
    if not remote:
        for job in jobs:
            job(path)
        return
    pool = ThreadPoolExecutor(READERS)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="Reading prefixes") as bar:
            for written in pool.map(lambda job: job(path), jobs):
                bar.update(written)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, what has not begun is left
