"""Checks of what a config says about widths, before anything is built from it: it may be damaged, or hostile.

Every repository of a pruned model carries a copy of this file beside `modeling_lop.py`.
"""

from collections.abc import Container, Sequence
from typing import Any

from hf_lop.errors import CheckpointMismatchError

FORMAT = 1  # of `pruning_config` and of pruners; repositories without one are of format 0
WIDTH = "intermediate_size"
DENSE_WIDTH = "unpruned_" + WIDTH  # what the width was before pruning; other parts of a model may be sized by it
UNITS = "pruned_units"
WIDEST = 2**20  # pieces of a layer; far above any FFN known, far below what a hostile config could ask for
DEEPEST = 2**12  # decoder layers; likewise


def _short(value: Any) -> str:
    return repr(value)[:200]


def check_format(made: Any) -> None:
    """Check the format that a `pruning_config` or the config of a pruner names.

    Args:
        made (`dict`): with `format`, 0 if it has none, and `hf_lop_version`.

    Raises:
        CheckpointMismatchError: if this code does not know the format.
    """
    number = made.get("format", 0) if isinstance(made, dict) else 0
    if type(number) is not int or not 0 <= number <= FORMAT:
        version = made.get("hf_lop_version")
        wanted = f"hf_lop >= {version[:40]}" if isinstance(version, str) else "a newer hf_lop"
        raise CheckpointMismatchError(
            f"The config.json has format {_short(number)}; this code knows formats 0 to {FORMAT}. It needs {wanted}: update hf_lop, "
            "or, with trust_remote_code=True, take modeling_lop.py from the repository again."
        )


def check_depth(layers: Any) -> None:
    """Check a number of layers read from a config.

    Raises:
        CheckpointMismatchError: if it is above 4096.
    """
    if type(layers) is int and layers > DEEPEST:
        raise CheckpointMismatchError(
            f"The config names {layers:,} layers; at most {DEEPEST:,} are built. Do not use this repository."
        )


def check_counts(counts: Sequence[Any], num_layers: int | None, field: str = WIDTH) -> None:
    """Check a list of counts read from a config.

    Raises:
        CheckpointMismatchError: if its length is not the number of layers, or an entry is no integer in [1, 2**20].
    """
    check_depth(len(counts))
    if num_layers is not None and len(counts) != num_layers:
        raise CheckpointMismatchError(
            f"{field[:200]} has {len(counts)} entries for {num_layers} decoder layers; it needs one per layer. "
            "The config.json is damaged: take it from the repository again."
        )
    for layer, count in enumerate(counts):
        if type(count) is not int or not 1 <= count <= WIDEST:
            raise CheckpointMismatchError(
                f"{field[:200]}[{layer}] is {_short(count)}; each width must be an integer from 1 to {WIDEST}. "
                "The config.json is damaged: take it from the repository again."
            )


def check_unpruned(config_dict: dict[str, Any]) -> None:
    """Check the width before pruning that a config names beside a list of widths.

    Raises:
        CheckpointMismatchError: if it is no integer from 1 to 2**20.
    """
    dense = config_dict.get(DENSE_WIDTH)
    if dense is not None and (
        type(dense) is not int or not 1 <= dense <= WIDEST
    ):  # some classes build wider layers from it
        raise CheckpointMismatchError(
            f"{DENSE_WIDTH} is {_short(dense)}; it must be an integer from 1 to {WIDEST}. "
            "The config.json is damaged: take it from the repository again."
        )


def check_marks(marks: Any, kinds: Container[str]) -> None:
    """Check `pruned_units` read from a config.

    Raises:
        CheckpointMismatchError: if an entry does not name a known unit and two positive numbers.
    """
    if not isinstance(marks, dict):
        raise CheckpointMismatchError(
            f"{UNITS} is {_short(marks)}; it must say by field which unit it counts. The config.json is damaged: take it from the "
            "repository again."
        )
    for field, mark in marks.items():
        values = mark if isinstance(mark, dict) else {}
        numbers = [values.get(key) for key in ("per", "unpruned")]
        if not all(type(number) is int and 1 <= number <= WIDEST for number in numbers):
            raise CheckpointMismatchError(
                f'{UNITS}[{_short(field)}] is {_short(mark)}; it must be {{"unit": name, "per": integer, "unpruned": integer}}. '
                "The config.json is damaged: take it from the repository again."
            )
        if not isinstance(values.get("unit"), str) or values.get("unit") not in kinds:
            raise CheckpointMismatchError(
                f"{UNITS}[{_short(field)}] counts the unit {_short(values.get('unit'))}, which this version of hf_lop does not know. "
                "Update hf_lop."
            )
