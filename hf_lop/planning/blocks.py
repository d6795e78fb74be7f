"""Blocks: what the widths of a plan are multiples of, since kernels are slow at odd ones.

On a GPU a matrix product whose inner size is odd takes several times as long as one of 8 more: examples/guides/results.md, Speed.
"""

import operator
from collections.abc import Sequence
from typing import Literal

from hf_lop.errors import InvalidInputError

AUTO: Literal["auto"] = "auto"
PREFERRED = (64, 32, 16, 8)  # times the hard step of the kind
LEAST = 32  # blocks that a layer must have of one of these, so that plans stay fine
SMALLEST, FEWEST = 8, 16  # the last choice, and the blocks that are enough for it: 16 bytes of bfloat16

Blocks = tuple[int, ...]


def auto_block(count: int, step: int = 1) -> int:
    """Return the block of a layer with so many pieces: the largest that divides them and leaves enough blocks.

    Args:
        count (`int`): pieces of the dense layer.
        step (`int`): the hard step of their kind; counts are multiples of it anyway.
    """
    for block in (step * p for p in PREFERRED):
        if count % block == 0 and count // block >= LEAST:
            return block
    smallest = step * SMALLEST
    return smallest if count % smallest == 0 and count // smallest >= FEWEST else step


def resolve(
    round_to: int | Literal["auto"], dense: Sequence[int], default: Sequence[int] | None = None
) -> tuple[Blocks, tuple[str, ...]]:
    """Return the block of every layer `[L]`, and what there is to say about them.

    Args:
        round_to (`int` or `str`): a number for all layers, or "auto".
        dense (`Sequence[int]`): `[L]` dense widths.
        default (`Sequence[int]`, *optional*): what "auto" is, where something knows better than the widths.
    """
    if round_to != AUTO:
        return (round_to,) * len(dense), ()
    blocks = tuple(default or map(auto_block, dense))
    odd = [layer for layer, block in enumerate(blocks) if block % SMALLEST]
    if not odd:
        return blocks, ()
    counts = ", ".join(map(str, sorted({dense[layer] for layer in odd})))
    note = (
        f"round_to is {shown(blocks)}, as layers of {counts} neurons have no {FEWEST} blocks of {SMALLEST}; GPUs are slow at widths "
        f"that are no multiples of {SMALLEST}."
    )
    return blocks, (note,)


def halved(blocks: Blocks, step: int = 1) -> Blocks | None:
    """Return half of every block that can be halved; None if none can."""
    smaller = tuple(block // 2 if block % (2 * step) == 0 else block for block in blocks)
    return smaller if smaller != blocks else None


def shown(blocks: Sequence[int]) -> int | list[int]:
    """Return blocks as configs and cards have them: one number where all are equal."""
    return blocks[0] if len(set(blocks)) == 1 else list(blocks)


def read_blocks(stored: object, layers: int) -> Blocks | None:
    """Return the blocks that [`shown`] made, or None if it is nothing or something else."""
    values: list[object] = list(stored) if isinstance(stored, list | tuple) else [stored] * layers
    blocks = tuple(block for block in values if type(block) is int and block >= 1)
    return blocks if len(blocks) == len(values) == layers else None


def read_round_to(value: object) -> int | Literal["auto"]:
    """Return `round_to` as a caller may give it.

    Raises:
        InvalidInputError: if it is neither "auto" nor a positive integer.
    """
    if isinstance(value, str) and value == AUTO:
        return AUTO
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise InvalidInputError(f'round_to is {value!r}; it must be "auto" or a positive integer.')
    return number
