"""How much two cuts of one dense model have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.hub.read.kept import KEPT, read_kept
from hf_lop.hub.read.load import read_config


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two pruned models kept of the same dense one, by layer.

    Attributes:
        left (`tuple[int, ...]`): `[L]` pieces that the first kept.
        right (`tuple[int, ...]`): `[L]` pieces that the second kept.
        shared (`tuple[int, ...]`): `[L]` pieces that both kept.
        dense (`tuple[int, ...]`): `[L]` pieces of the dense model.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    shared: tuple[int, ...]
    dense: tuple[int, ...]

    @property
    def share(self) -> float:
        """Shared pieces, as a fraction of those of the smaller model."""
        return sum(self.shared) / min(sum(self.left), sum(self.right))

    @property
    def by_chance(self) -> float:
        """What `share` would be had both kept as many of each layer at random."""
        expected = sum(a * b / n for a, b, n in zip(self.left, self.right, self.dense, strict=True))
        return expected / min(sum(self.left), sum(self.right))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        layers = zip(self.left, self.right, self.shared, self.dense, strict=True)
        names = ("left", "right", "shared", "dense")
        return {
            "share": self.share,
            "by_chance": self.by_chance,
            "layers": [dict(zip(names, layer, strict=True)) for layer in layers],
        }


def overlap(left: str | Path, right: str | Path) -> Overlap:
    """Compare what two pruned models kept of the same dense one; no weight is read.

    Args:
        left (`str` or `Path`): Hub id or folder of a pruned model.
        right (`str` or `Path`): another one.

    Returns:
        `Overlap`: counts by layer.

    Raises:
        InvalidInputError: if one of them cannot be read, is not pruned, or does not say what it kept.
        CheckpointMismatchError: if they were cut from different models, or a file is damaged.
    """
    (made, kept), (other, others) = _read(left), _read(right)
    for fact in ("base_model", "base_revision", "dense_widths", "sorted_by"):
        values = made.get(fact), other.get(fact)
        known = None not in values or fact == "sorted_by"
        if known and values[0] != values[1]:
            raise CheckpointMismatchError(
                f"{left} and {right} were cut from different models ({fact} is {str(values[0])[:80]} and {str(values[1])[:80]}), so "
                "their pieces have different numbers. Compare two cuts of one model."
            )
    shared = tuple(int(torch.isin(a, b).sum()) for a, b in zip(kept, others, strict=True))
    left_counts, right_counts = (tuple(len(pieces) for pieces in one) for one in (kept, others))
    return Overlap(left_counts, right_counts, shared, tuple(made["dense_widths"]))


def _read(name: str | Path) -> tuple[dict[str, Any], list[torch.Tensor]]:
    config = read_config(name)
    made = getattr(config, "pruning_config", None)
    kept = read_kept(name, revision=getattr(config, "_commit_hash", None)) if isinstance(made, dict) else None
    if not isinstance(made, dict) or kept is None:
        raise InvalidInputError(
            f"{name} is not pruned, or does not say which pieces it kept (no {KEPT}, as before version 0.2). Prune its base again."
        )
    pieces, dense = kept.get("neurons", []), made.get("dense_widths")
    if not isinstance(dense, list) or len(dense) != len(pieces):
        raise CheckpointMismatchError(
            f"{name} has kept pieces of {len(pieces)} layers and dense_widths {str(dense)[:80]}. Take it from its repository again."
        )
    return made, pieces
