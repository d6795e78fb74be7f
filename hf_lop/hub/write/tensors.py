"""Cutting tensors from file to file: a few megabytes are in memory at a time, however large the model is.

What a pruned model consists of is known beforehand, as a list of `Output`: tensors that stay as they are, tensors that lose
rows or columns, and output projections that a recovery changes. The bytes are those that safetensors writes for the same
tensors in memory.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from safetensors.torch import save

from hf_lop.hub.read.safetensors import LENGTH, Place, make_header, parse_json
from hf_lop.recovery.solve import ROWS, NewRows, in_blocks
from hf_lop.units.gather import gather

BLOCK = 2**22  # bytes that are read at a time
AHEAD = 2  # blocks that are read before they are needed


class Tensors(Protocol):
    """Where tensors are read from."""

    places: dict[str, Place]

    def read_into(self, place: Place, start: int, buffer: Any) -> None:
        """Fill a buffer with the bytes of a tensor from its byte `start` on."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows `[start, stop)` of a tensor."""


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of a pruned model, and what it is made from.

    Attributes:
        name (`str`): under which it is written.
        shape (`tuple[int, ...]`): its shape.
        dtype (`torch.dtype`): its dtype.
        source (`str`): the stored tensor it is made from.
        axis (`int`, *optional*): axis along which neurons are removed; None to keep all.
        kept (`torch.Tensor`, *optional*): `[k] int64`, ascending, the indices along it that stay.
        fit (`Callable`, *optional*): for an output projection, returns what makes its new rows from the old ones, in the
            dtype it shall have; neurons lie along axis 1, or along axis 0 where the tensor is stored transposed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    axis: int | None = None
    kept: torch.Tensor | None = None
    fit: Callable[[], NewRows] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def layout(outputs: Sequence[Output], metadata: Mapping[str, str]) -> tuple[bytes, list[Output]]:
    """Return what a safetensors file begins with, and its tensors in the order in which they follow.

    Args:
        outputs (`Sequence[Output]`): the tensors of one file, in any order.
        metadata (`Mapping[str, str]`): what the header says about the file.
    """
    by_name = {output.name: output for output in outputs}
    empty = save({name: torch.empty(0, dtype=output.dtype) for name, output in by_name.items()})
    length = int.from_bytes(empty[:LENGTH], "little")
    found = parse_json("the header", empty[LENGTH : LENGTH + length])  # safetensors itself decides on order and names
    header, _ = make_header({name: (entry["dtype"], by_name[name].shape) for name, entry in found.items()}, metadata)
    return header, [by_name[name] for name in found]


class Cutter:
    """Makes the bytes of outputs, with buffers that it uses again and again.

    One thread reads ahead, and another recovers the next two output projections: that takes the processor, all else the disk.
    """

    def __init__(self, tensors: Tensors, outputs: Sequence[Output], block: int = BLOCK) -> None:
        """Prepare to make outputs, in this order; the first ones can be left out."""
        self.tensors, self.block = tensors, block
        self._reader, self._fitter = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        empty = torch.empty(0, dtype=torch.uint8)
        # One part is written while the next is made, and others are read.
        self._buffers = {"read": [empty] * (AHEAD + 2), "cut": [empty] * 2}
        self._fits: dict[str, Future[torch.Tensor]] = {}
        self._coming: dict[str, tuple[Output, ...]] = {}  # by output, it or what follows: the next two to recover
        coming: deque[Output] = deque(maxlen=2)
        for output in reversed(outputs):
            if output.fit is not None:
                coming.appendleft(output)
            self._coming[output.name] = tuple(coming)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._reader, self._fitter):
            pool.shutdown(cancel_futures=True)

    def _buffer(self, use: str, size: int) -> torch.Tensor:
        """Return the buffer `[size] uint8` of this use that was not used for longest."""
        ring = self._buffers[use]
        ring.append(ring.pop(0))
        if len(ring[-1]) < size:
            ring[-1] = torch.empty(max(size, self.block), dtype=torch.uint8)
        return ring[-1][:size]

    def parts(self, output: Output) -> Iterator[memoryview]:
        """Yield the bytes of an output; a part stays as it is until the one after the next is asked for."""
        place = self.tensors.places[output.source]
        for coming in self._coming[output.name]:
            if coming.name not in self._fits:
                self._fits[coming.name] = self._fitter.submit(self._fit, coming)
        if output.fit is not None:
            yield _bytes(self._fits.pop(output.name).result())
        elif not place.shape:
            yield _bytes(self.tensors.rows(output.source).to(output.dtype))
        elif place.end > place.start:
            for start, part in self._read(output):
                yield _bytes(self._cut(output, start, part).to(output.dtype))

    def _fit(self, output: Output) -> torch.Tensor:
        assert output.fit is not None
        fit, rows = output.fit(), self.tensors.places[output.source].shape[0]
        if output.axis == 0:
            return in_blocks(fit, self.tensors.rows(output.source).to(output.dtype).T).T.contiguous()
        fitted = torch.empty(output.shape, dtype=output.dtype)
        for start in range(0, rows, ROWS):
            part = self.tensors.rows(output.source, start, min(start + ROWS, rows))
            fitted[start : start + ROWS] = fit(part.to(output.dtype))
        return fitted

    def _read(self, output: Output) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield some rows at a time, with the index of the first; not those of which none is kept."""
        place = self.tensors.places[output.source]
        dtype = self.tensors.rows(output.source, 0, 0).dtype
        shape = place.shape
        if output.kept is None:  # number by number: a row may be as large as the tensor
            shape = (torch.Size(shape).numel(),)
        rows, row = shape[0], (place.end - place.start) // shape[0]
        step = max(1, self.block // row)

        def read(start: int, stop: int) -> torch.Tensor:
            raw = self._buffer("read", (stop - start) * row)
            self.tensors.read_into(place, start * row, _bytes(raw))
            return raw.view(dtype).view(stop - start, *shape[1:])

        waiting: deque[tuple[int, Future[torch.Tensor]]] = deque()
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            if output.kept is not None and output.axis == 0 and not len(_within(output.kept, start, stop)):
                continue
            waiting.append((start, self._reader.submit(read, start, stop)))
            if len(waiting) > AHEAD:
                first, part = waiting.popleft()
                yield first, part.result()
        for first, part in waiting:
            yield first, part.result()

    def _cut(self, output: Output, start: int, part: torch.Tensor) -> torch.Tensor:
        """Return what stays of the rows from `start` on."""
        kept, axis = output.kept, output.axis
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
