"""A pruned model as an ordinary one: every FFN zero-padded to the widest layer, one scalar width in the config."""

import torch
from transformers import PreTrainedModel

from hf_lop.errors import UnsupportedModelError
from hf_lop.hub.read.load import auto_class
from hf_lop.units.configs import DENSE_WIDTH, stored_field, text_configs
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
    for config in text_configs(model):
        vars(config)[stored_field(type(config))] = width
        vars(config).pop(DENSE_WIDTH, None)
    vars(model.config).pop("auto_map", None)
    for unit in units:
        widen(model, unit, width)
    if _misfits(model):
        _rename(model, dense, width)
    return width


def _misfits(model: PreTrainedModel) -> list[str]:
    """Names of weights whose shapes are not those that the stock class gives them for the model's config."""
    with torch.device("meta"):
        stock = auto_class(model.config).from_config(model.config)
    expected = {name: tuple(value.shape) for name, value in stock.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def _rename(model: PreTrainedModel, dense: int, width: int) -> None:
    """Set the width under the name that the family's own config has for it, such as n_inner: the one that fits."""
    wrong = _misfits(model)
    text = text_configs(model)
    names = [name for name, value in vars(text[0]).items() if value == dense or name == "n_inner"]
    for name in names:
        before = [getattr(config, name) for config in text]
        for config in text:
            setattr(config, name, width)
        if not _misfits(model):
            return
        for config, value in zip(text, before, strict=True):
            setattr(config, name, value)
    raise UnsupportedModelError(
        f"{type(model).__name__} sizes other weights by its FFN width too ({wrong[0]}), so no ordinary config fits it. "
        "Load the pruned repository itself, with hf_lop or trust_remote_code=True."
    )
