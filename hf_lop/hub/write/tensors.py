"""Cutting tensors from file to file: a few megabytes are in memory at a time, however large the model is.

What a pruned model consists of is known beforehand, as a list of `SavedTensor`: those that stay as they are, those that lose rows
or columns, and output projections that a recovery changes. The bytes are those that safetensors writes for the same tensors
in memory.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from safetensors.torch import save

from hf_lop.hub.read.safetensors import LENGTH, Place, make_header, parse_json
from hf_lop.learning.decoder.sound import check_weight
from hf_lop.recovery.gather import gather
from hf_lop.recovery.solve import ROWS, NewRows, in_blocks

BLOCK = 2**22  # bytes that are read at a time
AHEAD = 2  # blocks that are read before they are needed


class TensorSource(Protocol):
    """Where tensors are read from."""

    places: dict[str, Place]

    def read_into(self, place: Place, start: int, buffer: Any) -> None:
        """Fill a buffer with the bytes of a tensor from its byte `start` on."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows `[start, stop)` of a tensor."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor of a pruned model, and what it is made from.

    Attributes:
        name (`str`): under which it is written.
        shape (`tuple[int, ...]`): its shape.
        dtype (`torch.dtype`): its dtype.
        source (`str`): the stored tensor it is made from.
        axis (`int`, *optional*): axis along which neurons are removed; None to keep all.
        kept (`torch.Tensor`, *optional*): `[k] int64`, ascending, the indices along it that stay.
        solve (`Callable`, *optional*): for an output projection, returns what makes its new rows from the old ones, in the
            dtype it shall have; neurons lie along axis 1, or along axis 0 where the tensor is stored transposed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    axis: int | None = None
    kept: torch.Tensor | None = None
    solve: Callable[[], NewRows] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def layout(tensors: Sequence[SavedTensor], metadata: Mapping[str, str]) -> tuple[bytes, list[SavedTensor]]:
    """Return what a safetensors file begins with, and its tensors in the order in which they follow.

    Args:
        tensors (`Sequence[SavedTensor]`): the tensors of one file, in any order.
        metadata (`Mapping[str, str]`): what the header says about the file.
    """
    by_name = {saved.name: saved for saved in tensors}
    empty = save({name: torch.empty(0, dtype=saved.dtype) for name, saved in by_name.items()})
    length = int.from_bytes(empty[:LENGTH], "little")
    found = parse_json("the header", empty[LENGTH : LENGTH + length])  # safetensors itself decides on order and names
    header, _ = make_header({name: (entry["dtype"], by_name[name].shape) for name, entry in found.items()}, metadata)
    return header, [by_name[name] for name in found]


class Cutter:
    """Makes the bytes of tensors, with buffers that it uses again and again.

    One thread reads ahead, and another recovers the next two output projections: that takes the processor, all else the disk.
    """

    def __init__(self, source: TensorSource, tensors: Sequence[SavedTensor], block: int = BLOCK) -> None:
        """Prepare to make tensors, in this order; the first ones can be left out."""
        self.source, self.block = source, block
        self._reader, self._solver = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        empty = torch.empty(0, dtype=torch.uint8)
        # One part is written while the next is made, and others are read.
        self._buffers = {"read": [empty] * (AHEAD + 2), "cut": [empty] * 2}
        self._solved: dict[str, Future[torch.Tensor]] = {}
        self._coming: dict[str, tuple[SavedTensor, ...]] = {}  # by name, it or what follows: the next two to recover
        coming: deque[SavedTensor] = deque(maxlen=2)
        for saved in reversed(tensors):
            if saved.solve is not None:
                coming.appendleft(saved)
            self._coming[saved.name] = tuple(coming)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._reader, self._solver):
            pool.shutdown(cancel_futures=True)

    def _buffer(self, use: str, size: int) -> torch.Tensor:
        """Return the buffer `[size] uint8` of this use that was not used for longest."""
        ring = self._buffers[use]
        ring.append(ring.pop(0))
        if len(ring[-1]) < size:
            ring[-1] = torch.empty(max(size, self.block), dtype=torch.uint8)
        return ring[-1][:size]

    def parts(self, saved: SavedTensor) -> Iterator[memoryview]:
        """Yield the bytes of a tensor; a part stays as it is until the one after the next is asked for."""
        place = self.source.places[saved.source]
        for coming in self._coming[saved.name]:
            if coming.name not in self._solved:
                self._solved[coming.name] = self._solver.submit(self._solve, coming)
        if saved.solve is not None:
            yield _bytes(self._solved.pop(saved.name).result())
        elif not place.shape:
            yield _bytes(self.source.rows(saved.source).to(saved.dtype))
        elif place.end > place.start:
            for start, part in self._read(saved):
                if saved.kept is not None:
                    check_weight(saved.source, part)
                yield _bytes(self._cut(saved, start, part).to(saved.dtype))

    def _solve(self, saved: SavedTensor) -> torch.Tensor:
        assert saved.solve is not None
        solve, rows = saved.solve(), self.source.places[saved.source].shape[0]
        if saved.axis == 0:
            weight = check_weight(saved.source, self.source.rows(saved.source).to(saved.dtype))
            return in_blocks(solve, weight.T).T.contiguous()
        solved = torch.empty(saved.shape, dtype=saved.dtype)
        for start in range(0, rows, ROWS):
            part = check_weight(saved.source, self.source.rows(saved.source, start, min(start + ROWS, rows)))
            solved[start : start + ROWS] = solve(part.to(saved.dtype))
        return solved

    def _read(self, saved: SavedTensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield some rows at a time, with the index of the first; not those of which none is kept."""
        place = self.source.places[saved.source]
        dtype = self.source.rows(saved.source, 0, 0).dtype
        shape = place.shape
        if saved.kept is None:  # number by number: a row may be as large as the tensor
            shape = (torch.Size(shape).numel(),)
        rows, row = shape[0], (place.end - place.start) // shape[0]
        step = max(1, self.block // row)

        def read(start: int, stop: int) -> torch.Tensor:
            raw = self._buffer("read", (stop - start) * row)
            self.source.read_into(place, start * row, _bytes(raw))
            return raw.view(dtype).view(stop - start, *shape[1:])

        waiting: deque[tuple[int, Future[torch.Tensor]]] = deque()
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            if saved.kept is not None and saved.axis == 0 and not len(_within(saved.kept, start, stop)):
                continue
            waiting.append((start, self._reader.submit(read, start, stop)))
            if len(waiting) > AHEAD:
                first, part = waiting.popleft()
                yield first, part.result()
        for first, part in waiting:
            yield first, part.result()

    def _cut(self, saved: SavedTensor, start: int, part: torch.Tensor) -> torch.Tensor:
        """Return what stays of the rows from `start` on."""
        kept, axis = saved.kept, saved.axis
        if kept is None or axis is None:
            return part
        if axis == 0:
            kept = _within(kept, start, start + len(part)) - start
        shape = (*part.shape[:axis], len(kept), *part.shape[axis + 1 :])
        room = self._buffer("cut", torch.Size(shape).numel() * part.element_size())
        return gather(part, axis, kept, room.view(part.dtype).view(shape))


def _within(kept: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return those of ascending indices that are in `[start, stop)`."""
    first, last = (int(i) for i in torch.searchsorted(kept, torch.tensor([start, stop])))
    return kept[first:last]


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, without a copy."""
    if not tensor.numel():
        return memoryview(b"")
    raw: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)
