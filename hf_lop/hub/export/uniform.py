"""A pruned model as an ordinary one: every FFN zero-padded to the widest layer, one scalar width in the config."""

import torch
from transformers import PreTrainedModel

from hf_lop.errors import UnsupportedModelError
from hf_lop.hub.write.stock import write_integer
from hf_lop.units.kinds import find_units
from hf_lop.units.unit import Unit, segments, take


@torch.no_grad()
def widen(model: PreTrainedModel, unit: Unit, count: int) -> Unit:
    """Add pieces that do nothing to one unit, in place.

    Args:
        model (`PreTrainedModel`): the model that the unit was found in.
        unit (`Unit`): the unit.
        count (`int`): pieces it shall have.

    Returns:
        `Unit`: the same place with its new count.
    """
    if count == unit.count:
        return unit
    wide = take(model, unit, torch.arange(count) % unit.count)
    for (path, name), slots in wide.tensors.items():
        tensor = getattr(model.get_submodule(path), name)
        for begin, block in segments(slots):
            tensor.narrow(slots[0].axis, begin + unit.count * block, (count - unit.count) * block).zero_()
    return wide


def make_uniform(model: PreTrainedModel, dense: int) -> int:
    """Pad every FFN of a pruned model to the widest, in place, and make its config an ordinary one.

    Args:
        model (`PreTrainedModel`): a pruned model; its function stays the same.
        dense (`int`): the width before pruning.

    Returns:
        `int`: the width that all layers have now.

    Raises:
        UnsupportedModelError: if other parts of the model are sized by the width before pruning.
    """
    units = find_units(model)
    width = max(unit.count for unit in units)
    vars(model.config).pop("auto_map", None)
    for unit in units:
        widen(model, unit, width)
    if wrong := write_integer(model, dense, width):
        raise UnsupportedModelError(
            f"{type(model).__name__} sizes other weights by its FFN width too ({wrong[0]}), so no ordinary config fits it. "
            "Load the pruned repository itself, with hf_lop or trust_remote_code=True."
        )
    return width
