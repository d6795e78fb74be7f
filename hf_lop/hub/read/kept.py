"""The pieces that a pruned model kept, as its repository stores them: a small file beside the weights.

`pruning/kept.safetensors` holds one tensor `{kind}.{layer}` per unit, `[k] int32`: the numbers that its pieces had in the dense
model, in the order of the pieces here. It lies in a folder of its own, as loaders take any safetensors beside config.json for
weights.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from hf_lop.errors import CheckpointMismatchError, InvalidInputError, UnsupportedModelError
from hf_lop.hub.read.names import origin
from hf_lop.units.configs import layer_counts, text_configs
from hf_lop.units.kept import Earlier, check_pieces, dense_counts, note_kept, noted
from hf_lop.units.modeling_lop import OUTPUT_BIAS
from hf_lop.units.unit import Unit

KEPT = "pruning/kept.safetensors"

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
    counts = layer_counts(text_configs(model)[0])

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
            f"{type(model).__name__} is already pruned (widths {[unit.count for unit in units]}), and which pieces it kept is not "
            f"known: its repository has no {KEPT}, as those of before 0.2, or it was changed since. Prune the dense base model."
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
