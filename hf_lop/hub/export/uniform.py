"""A pruned model as an ordinary one: every FFN zero-padded to the widest layer, one scalar width in the config."""

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lop.errors import UnsupportedModelError
from hf_lop.hub.read.load import auto_class
from hf_lop.units.modeling_lop import DENSE_WIDTH, FFN, _field, find_ffns, take_neurons, text_configs


def _silence(module: Any, first: int, width: int, *, rows: bool) -> None:
    """Zero what belongs to the neurons from `first` on: output rows, of every part of a fused projection, or input columns."""
    linear = hasattr(module, "in_features")  # Conv1D stores [in, out]
    weight = module.weight if rows == linear else module.weight.T
    for start in range(0, len(weight), width):
        weight[start + first : start + width] = 0
        if rows and getattr(module, "bias", None) is not None:
            module.bias[start + first : start + width] = 0


@torch.no_grad()
def widen(model: PreTrainedModel, ffn: FFN, width: int) -> FFN:
    """Add neurons that do nothing to one FFN, in place.

    Args:
        model (`PreTrainedModel`): the model `ffn` was found in.
        ffn (`FFN`): the FFN.
        width (`int`): neurons it shall have.

    Returns:
        `FFN`: the same place with its new width.
    """
    if width == ffn.width:
        return ffn
    wide = take_neurons(model, ffn, torch.arange(width) % ffn.width)
    inputs, output = wide.modules(model)
    for module in inputs:
        _silence(module, ffn.width, width, rows=True)
    _silence(output, ffn.width, width, rows=False)
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
    ffns = find_ffns(model)
    width = max(ffn.width for ffn in ffns)
    for config in text_configs(model):
        vars(config)[_field(type(config))] = width
        vars(config).pop(DENSE_WIDTH, None)
    vars(model.config).pop("auto_map", None)
    for ffn in ffns:
        widen(model, ffn, width)
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
