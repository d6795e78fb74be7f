"""The kinds of units that can be pruned: each is one file with a function that finds it in every decoder layer.

Every repository of a pruned model carries a copy of this file beside `modeling_lop.py`.
"""

from collections.abc import Callable
from typing import Any

from hf_lop.errors import InvalidInputError
from hf_lop.units.kinds.neurons import find_neurons
from hf_lop.units.unit import Unit

# Name on disk -> finds one unit per decoder layer, or raises UnsupportedModelError.
KINDS: dict[str, Callable[[Any], list[Unit]]] = {"neurons": find_neurons}
WRAPPERS = (
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
)  # no transformers model, but around one


def find_units(model: Any) -> list[Unit]:
    """Find everything that can be pruned, by structure.

    Works on any device, the meta device included. Only the text decoder is searched (`model.get_decoder()` where the
    model has one), so a vision tower is never touched.

    Args:
        model (`nn.Module`): a transformers model, text-only or multimodal.

    Returns:
        `list[Unit]`: kind by kind, each in order of the layers; paths start at `model`.

    Raises:
        UnsupportedModelError: if some layer has nothing that can be cut piece by piece; the message says why.
        InvalidInputError: if the model is in a wrapper for several devices.
    """
    if type(model).__name__ in WRAPPERS:
        raise InvalidInputError(f"model is a {type(model).__name__} around a model. Pass what is in it, model.module.")
    return [unit for find in KINDS.values() for unit in find(model)]
