"""The pieces that a pruned model kept, as its repository stores them: a small file beside the weights.

`pruning/kept.safetensors` holds one tensor `{kind}.{layer}` per unit, `[k] int32`: the numbers that its pieces had in the dense
model, in the order of the pieces here. It lies in a folder of its own, as loaders take any safetensors beside config.json for
weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from hf_lop.errors import CheckpointMismatchError, InvalidInputError, UnsupportedModelError
from hf_lop.hub.read.load import read_config
from hf_lop.hub.read.made import KEPT, NOT_KNOWN
from hf_lop.hub.read.names import origin
from hf_lop.units.configs import text_configs
from hf_lop.units.kept import Earlier, check_pieces, dense_counts, note_kept, noted
from hf_lop.units.modeling_lop import OUTPUT_BIAS
from hf_lop.units.slice import cut_counts
from hf_lop.units.unit import Unit

Kept = dict[str, list[torch.Tensor]]


def pack(kept: Kept) -> bytes:
    """Return the file that stores kept pieces, `[k] int64` of every unit by kind."""
    named = {
        f"{kind}.{layer}": pieces.to(torch.int32) for kind, units in kept.items() for layer, pieces in enumerate(units)
    }
    return save(named, metadata={"format": "pt"})


def read_kept(name: str | Path, *, revision: str | None = None) -> Kept | None:
    """Read the kept pieces of a repository.

    Args:
        name (`str` or `Path`): Hub id or folder.
        revision (`str`, *optional*): commit, for a Hub id.

    Returns:
        `dict`: `[k] int64` of every unit by kind; None where the repository does not say.

    Raises:
        CheckpointMismatchError: if the file is damaged.
        InvalidInputError: if the Hub does not answer.
    """
    path = Path(name) / KEPT
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(str(name), KEPT, revision=revision))
        except LocalEntryNotFoundError as error:  # also an EntryNotFoundError, but it is the Hub that was not reached
            raise InvalidInputError(f"The Hub did not answer whether {name} has {KEPT}: {error} Try again.") from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError) as error:
            raise InvalidInputError(f"{KEPT} of {name} cannot be read: {error} Try again.") from error
    if not path.is_file():
        return None
    kept: dict[str, dict[int, torch.Tensor]] = {}
    try:
        for key, pieces in load_file(path).items():
            kind, _, layer = key.rpartition(".")
            if pieces.dtype != torch.int32 or pieces.dim() != 1:
                raise ValueError(f"{key} is {pieces.dtype} of {list(pieces.shape)}")
            kept.setdefault(kind, {})[int(layer)] = pieces.long()
        return {kind: [units[layer] for layer in range(len(units))] for kind, units in kept.items()}
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointMismatchError(
            f"{KEPT} of {name} is damaged ({error}). Download or copy it again, or remove it: then the model can no longer be cut "
            "further."
        ) from error


def kept_of(model: Any) -> Kept | None:
    """Return what a pruned model kept: as its modules remember, else as the repository says that it was loaded from.

    Returns:
        `dict`: `[k] int64` of every unit by kind; None where nobody knows, or the model has other counts by now.

    Raises:
        CheckpointMismatchError: if the file is damaged.
        InvalidInputError: if the Hub does not answer.
    """
    counts = cut_counts(model)

    def fits(kept: Kept) -> bool:
        return kept.keys() == counts.keys() and all(
            [len(pieces) for pieces in kept[kind]] == own for kind, own in counts.items()
        )

    kept: Kept | None = noted(model)
    if kept:
        return kept if fits(kept) else None
    source, commit = origin(model)
    if source is None and (not model.name_or_path or not Path(model.name_or_path).is_dir()):
        return None
    kept = read_kept(source or model.name_or_path, revision=commit)
    if kept is None:
        return None
    kept = {kind: units[: len(counts.get(kind, ()))] for kind, units in kept.items()}  # the first layers may be all
    return kept if fits(kept) else None


def earlier_cut(model: Any, units: list[Unit]) -> Earlier:
    """Return the cut that a pruned model has behind it; its modules remember it from now on.

    Raises:
        UnsupportedModelError: if nobody knows which pieces it kept.
        CheckpointMismatchError: if what is known cannot be.
    """
    known = kept_of(model)
    if known is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is already pruned (widths {[unit.count for unit in units]}), and {NOT_KNOWN.format(KEPT=KEPT)}"
        )
    if any(getattr(config, OUTPUT_BIAS, False) for config in text_configs(model)):
        raise UnsupportedModelError(
            f"{type(model).__name__} is pruned, and has biases that this pruning added in place of what it took; a further cut "
            "would leave them wrong. Prune the dense base model."
        )
    kept, dense = known[units[0].kind], dense_counts(model, units)
    check_pieces(kept, [unit.count for unit in units], dense)
    if not noted(model):
        note_kept(model, units, kept)
    made = getattr(model.config, "pruning_config", None)
    return Earlier(units, kept, dense, made if isinstance(made, dict) else {})


# -- Two cuts ------------------------------------------------------------------------------------------------------------


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
    (made, kept), (other, others) = _read_cut(left), _read_cut(right)
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


def _read_cut(name: str | Path) -> tuple[dict[str, Any], list[torch.Tensor]]:
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
