"""Cutting tensors from file to file: a few megabytes are in memory at a time, however large the model is.

What a pruned model consists of is known beforehand, as a list of `Output`: tensors that stay as they are, tensors that lose
rows or columns, and output projections that a recovery changes. The bytes are those that safetensors writes for the same
tensors in memory.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save

from hf_lop.ffn.stored import LENGTH, Place, parse_json

BLOCK = 2**20  # bytes that are read at a time: what stays in the processor's cache is copied fastest
AHEAD = 2**25  # bytes that the system shall have read before they are needed
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy has no bfloat16


class Tensors(Protocol):
    """Where tensors are read from."""

    places: dict[str, Place]

    def read_into(self, place: Place, start: int, buffer: Any) -> None:
        """Fill a buffer with the bytes of a tensor from its byte `start` on."""

    def expect(self, place: Place, start: int = 0, stop: int | None = None) -> None:
        """Hint that these bytes of a tensor are read next."""

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
        fit (`Callable`, *optional*): instead, makes it from all of the stored tensor, in the dtype it shall have.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    axis: int | None = None
    kept: torch.Tensor | None = None
    fit: Callable[[torch.Tensor], torch.Tensor] | None = None

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
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in found.items():
        start, end = end, end + by_name[name].num_bytes
        header[name] = {"dtype": entry["dtype"], "shape": list(by_name[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH)
    return len(text).to_bytes(LENGTH, "little") + text, [by_name[name] for name in found]


class Cutter:
    """Makes the bytes of outputs, with buffers that it uses again and again."""

    def __init__(self, tensors: Tensors, block: int = BLOCK) -> None:
        self.tensors, self.block = tensors, block
        self._read = torch.empty(block, dtype=torch.uint8)
        self._write = torch.empty(block, dtype=torch.uint8)

    def parts(self, output: Output) -> Iterator[memoryview]:
        """Yield the bytes of an output; each part must be used before the next one is asked for."""
        place = self.tensors.places[output.source]
        dtype = self.tensors.rows(output.source, 0, 0).dtype if place.shape else output.dtype
        if output.fit is not None:
            yield _bytes(output.fit(self.tensors.rows(output.source).to(output.dtype)))
        elif not place.shape:
            yield _bytes(self.tensors.rows(output.source).to(output.dtype))
        elif output.kept is None and dtype == output.dtype:
            yield from self._copied(place)
        elif place.end > place.start:
            yield from self._cut(output, place, dtype)

    def _copied(self, place: Place) -> Iterator[memoryview]:
        buffer = _bytes(self._read)
        self.tensors.expect(place, 0, AHEAD)
        for start in range(0, place.end - place.start, self.block):
            self.tensors.expect(place, start + AHEAD, start + AHEAD + self.block)
            part = buffer[: min(self.block, place.end - place.start - start)]
            self.tensors.read_into(place, start, part)
            yield part

    def _cut(self, output: Output, place: Place, dtype: torch.dtype) -> Iterator[memoryview]:
        rows, row = place.shape[0], (place.end - place.start) // place.shape[0]
        step = max(1, self.block // row)
        buffer = self._read if row <= self.block else torch.empty(row, dtype=torch.uint8)
        self.tensors.expect(place, 0, AHEAD)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            self.tensors.expect(place, start * row + AHEAD, stop * row + AHEAD)
            raw = buffer[: (stop - start) * row]
            kept, axis = output.kept, output.axis
            if kept is not None and axis == 0:
                first, last = (int(i) for i in torch.searchsorted(kept, torch.tensor([start, stop])))
                if first == last:
                    continue
                kept = kept[first:last] - start
            self.tensors.read_into(place, start * row, _bytes(raw))
            part = raw.view(dtype).view(stop - start, *place.shape[1:])
            if kept is not None and axis is not None:
                part = self._select(part, axis, kept)
            yield _bytes(part if part.dtype == output.dtype else part.to(output.dtype))

    def _select(self, part: torch.Tensor, axis: int, kept: torch.Tensor) -> torch.Tensor:
        """Gather along an axis; numpy is three times as fast as torch here if it need not check the indices again."""
        shape = (*part.shape[:axis], len(kept), *part.shape[axis + 1 :])
        size = torch.Size(shape).numel() * part.element_size()
        room = self._write[:size] if size <= self.block else torch.empty(size, dtype=torch.uint8)
        kind = _INTEGERS[part.element_size()]
        raw: Any = part.view(kind).numpy()
        np.take(raw, kept.numpy(), axis=axis, out=room.view(kind).view(shape).numpy(), mode="clip")
        return room.view(part.dtype).view(shape)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, without a copy."""
    if not tensor.numel():
        return memoryview(b"")
    raw: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)
