"""A config with one width for all layers, where the stock class builds just the shapes that a model has: any program loads it.

Not every class does: some round widths up, or size other parts by them. So the class itself is asked, on the meta device.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lop.errors import UnsupportedModelError
from hf_lop.units.checks import DENSE_WIDTH, UNITS
from hf_lop.units.configs import layer_counts, stored_field, text_configs
from hf_lop.units.kinds import find_units
from hf_lop.units.modeling_lop import OUTPUT_BIAS, set_counts
from hf_lop.units.slice import cut_counts


def misfits(model: PreTrainedModel) -> list[str]:
    """Return the names of weights whose shapes are not those that the class gives them for the model's config."""
    with torch.device("meta"):
        stock = type(model)._from_config(copy.deepcopy(model.config))
    expected = {name: tuple(value.shape) for name, value in stock.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def write_integer(model: PreTrainedModel, dense: int, width: int) -> list[str]:
    """Make the config of a model an ordinary one, with one width for all layers.

    Args:
        model (`PreTrainedModel`): a model whose layers all have that width.
        dense (`int`): the width before pruning.
        width (`int`): the width.

    Returns:
        `list[str]`: weights that do not fit it, whatever is tried; then the config is that of no class.
    """
    configs = text_configs(model)
    for config in configs:
        vars(config)[stored_field(type(config))] = width
        vars(config).pop(DENSE_WIDTH, None)
    wrong = misfits(model)
    if not wrong:
        return wrong
    # The family's own config can have another name for it, such as n_inner: the one that fits.
    alike = [name for name, value in vars(configs[0]).items() if type(value) is int and value == dense]
    for name in [*alike, "n_inner"] if hasattr(configs[0], "n_inner") else alike:
        before = [getattr(config, name) for config in configs]
        for config in configs:
            setattr(config, name, width)
        if not misfits(model):
            return []
        for config, value in zip(configs, before, strict=True):
            setattr(config, name, value)
    return wrong


def _dense(made: dict[str, Any]) -> int:
    """Return the width before pruning, as far as a config says it, which may hold anything; else 0."""
    listed = made.get("dense_widths")
    first = listed[0] if isinstance(listed, list) and listed else 0
    return first if type(first) is int else 0


def list_changed(model: PreTrainedModel) -> None:
    """Let the config of a model that was saved as a stock checkpoint list its widths, if its layers were changed since."""
    if getattr(model, "hf_quantizer", None) is None and not layer_counts(text_configs(model)[0]):
        for counts in cut_counts(model).values():
            if misfits(model):
                set_counts(model, find_units(model), counts)


@contextlib.contextmanager
def as_stock(model: PreTrainedModel) -> Iterator[bool]:
    """Show one width in the config of a pruned model while the context lasts, and give whether that is so.

    It is not where layers differ, where something else than FFN neurons went, or where the stock class would build other shapes.
    """
    configs = text_configs(model)
    before = [dict(vars(config)) for config in configs]
    try:
        yield _alike(model)
    finally:
        for config, values in zip(configs, before, strict=True):
            vars(config).clear()
            vars(config).update(values)


def _alike(model: Any) -> bool:
    """Write one width into the config if it says all; what is written otherwise is to be undone."""
    configs, made = text_configs(model), getattr(model.config, "pruning_config", None)
    plain = not any(vars(config).get(UNITS) or getattr(config, OUTPUT_BIAS, False) for config in configs)
    if not layer_counts(configs[0]):
        return plain  # one that was saved so before
    counts = set(next(iter(layer_counts(configs[0]).values())))
    if not plain or not isinstance(made, dict) or len(counts) > 1:
        return False
    try:
        find_units(model)
        return not write_integer(model, _dense(made), counts.pop())
    except UnsupportedModelError:  # packed weights
        return False
