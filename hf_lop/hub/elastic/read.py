"""Elastic repositories, the reading side: the tensors of one size, read in prefixes."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.hub.elastic.write import PRODUCTS, TRANSPOSED
from hf_lop.hub.read.checkpoint import Shards
from hf_lop.hub.read.files import Files
from hf_lop.hub.read.stored import StoredPieces
from hf_lop.recovery.solve import RowSolver, in_blocks


class _Inside:
    """The files of a folder inside a repository; see `Files`."""

    def __init__(self, files: Files, folder: str) -> None:
        self._files, self._folder = files, folder
        self.name, self.hint = f"{folder}/ in {files.name}", files.hint

    def size(self, file: str) -> int | None:
        """Return the bytes of a file, or None if there is none."""
        return self._files.size(f"{self._folder}/{file}")

    def stamp(self, file: str) -> str:
        """Return what changes when a file does."""
        return self._files.stamp(f"{self._folder}/{file}")

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on."""
        self._files.read_into(f"{self._folder}/{file}", start, buffer)

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


class Solvers(NamedTuple):
    """What makes an output projection of `width` neurons, given its layer.

    Attributes:
        whole (`Callable`): given its dtype, from the rows of the dense one, `[d, n]`.
        prefix (`Callable`): from its first columns, `[d, k]`, and its products with the sketch, `[d, r] float32`.
    """

    whole: RowSolver
    prefix: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def check_transposed(main: Shards, transposed: Shards, entries: Mapping[str, StoredPieces]) -> None:
    """Refuse extra tensors that cannot be those of a checkpoint, by their shapes.

    Raises:
        CheckpointMismatchError: if there is one.
    """
    for name, entry in entries.items():
        place = main.places[name]
        extra, products = (transposed.places.get(own) for own in (name, name + PRODUCTS))
        if extra is not None and (extra.dtype, extra.shape[1:], entry.axis) != (place.dtype, place.shape[:1], 1):
            raise _damaged(
                name, f"{place.dtype} of {list(place.shape)} and transposed as {extra.dtype} of {list(extra.shape)}"
            )
        if products is not None and (products.dtype, products.shape[:-1]) != ("F32", (place.shape[1 - entry.axis],)):
            raise _damaged(name, f"{list(place.shape)}, its products as {products.dtype} of {list(products.shape)}")


def read_prefix(
    main: Shards, transposed: Shards, name: str, entry: StoredPieces, width: int, solvers: Solvers | None
) -> torch.Tensor:
    """Read the first neurons of a tensor.

    Args:
        main (`Shards`): the dense checkpoint with sorted neurons.
        transposed (`Shards`): its extra tensors. Where one is missing or has too few rows, the whole tensor is read.
        name (`str`): of the tensor in `main`.
        entry (`StoredPieces`): where its neurons are.
        width (`int`): how many of them.
        solvers (`Solvers`, *optional*): lets an output projection take over what the removed neurons did.

    Returns:
        `torch.Tensor`: as it is stored, but for its width; not always contiguous.

    Raises:
        CheckpointMismatchError: if the extra tensor is of other weights, or a file is damaged.
        InvalidInputError: if the Hub does not answer.
    """
    turned = entry.axis == 1  # neurons are columns of what is stored
    extra = transposed.places.get(name)
    length = entry.length(width)
    is_prefix = not turned or (extra is not None and extra.shape[0] >= length and entry.is_prefix)
    if solvers is not None and entry.output and not (is_prefix and name + PRODUCTS in transposed.places):
        dense = main.rows(name)
        solved = in_blocks(solvers.whole(entry.layer, dense.dtype), dense if turned else dense.T)
        return solved if turned else solved.T
    if turned and is_prefix:
        found = transposed.rows(name, 0, length).T
        _check_row(main, name, found[0])
    elif turned:
        whole = main.rows(name)
        found = torch.cat([whole[:, start:stop] for start, stop in entry.runs(width)], 1)
    else:
        rows = [main.rows(name, start, stop) for start, stop in entry.runs(width)]
        found = rows[0] if len(rows) == 1 else torch.cat(rows)
    if solvers is None or not entry.output:
        return found
    products = transposed.rows(name + PRODUCTS)
    return solvers.prefix(entry.layer, found, products) if turned else solvers.prefix(entry.layer, found.T, products).T


def read_size(
    main: Shards,
    transposed: Shards,
    entries: Mapping[str, StoredPieces],
    widths: Sequence[int],
    solvers: Solvers | None,
) -> dict[str, torch.Tensor]:
    """Read all tensors of a size into memory; see [`read_prefix`] for arguments and errors.

    Args:
        main (`Shards`): see `read_prefix`, as for `transposed` and `solvers`.
        transposed (`Shards`): see `read_prefix`.
        entries (`Mapping[str, StoredPieces]`): which tensors of `main` have entries for every neuron.
        widths (`Sequence[int]`): `[L]` neurons to keep.
        solvers (`Solvers`, *optional*): see `read_prefix`.

    Returns:
        `dict[str, torch.Tensor]`: by name, as they are stored.
    """
    check_transposed(main, transposed, entries)
    found = {}
    for name in main.places:
        entry = entries.get(name)
        if entry is None or widths[entry.layer] == entry.unit.count:
            found[name] = main.rows(name)
        else:
            found[name] = read_prefix(main, transposed, name, entry, widths[entry.layer], solvers).contiguous()
    return found


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
