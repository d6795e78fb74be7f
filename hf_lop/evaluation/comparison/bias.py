"""FLAP's bias, a recovery that is there to be compared with: it adds weights, which stock architectures have no place for.

Source: FLAP (arXiv 2312.11983), its baseline bias compensation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_lop.errors import UnsupportedModelError
from hf_lop.learning.statistics import Statistics
from hf_lop.recovery.by_layer import check_statistics
from hf_lop.recovery.solve import mean_of_removed
from hf_lop.units.configs import stored_field, takes_lists, text_configs
from hf_lop.units.modeling_lop import OUTPUT_BIAS, add_output_biases
from hf_lop.units.slice import check_kept, output_weight
from hf_lop.units.unit import Unit


def removed_means(
    model: nn.Module, units: Sequence[Unit], kept: Sequence[torch.Tensor], statistics: Sequence[Statistics]
) -> list[torch.Tensor]:
    """Return the mean output of the removed neurons, b = sum_{j in P} mu_j W_{:,j}.

    Args:
        model (`nn.Module`): the dense model; only read.
        units (`Sequence[Unit]`): its L units.
        kept (`Sequence[torch.Tensor]`): the pieces to keep, one `[k] int64` per unit, in any order.
        statistics (`Sequence[Statistics]`): of every layer; `mean` is mu.

    Returns:
        `list[torch.Tensor]`: b of every layer, `[d]` in the dtype and on the device of W.

    Raises:
        InvalidInputError: if the kept pieces or the statistics do not fit the model.
        UnsupportedModelError: if a projection has no bias and can be given none.
    """
    check_statistics(units, statistics)
    check_output_biases(model, units)
    biases = []
    for unit, indices, measured in zip(units, check_kept(units, kept), statistics, strict=True):
        weight = output_weight(model, unit)
        biases.append(mean_of_removed(weight, measured.mean, unit.columns(indices)).to(weight.dtype))
    return biases


def add_to_output_biases(model: nn.Module, units: Sequence[Unit], biases: Sequence[torch.Tensor]) -> None:
    """Add to the biases of the output projections; a projection without gets one, and the text config says so.

    Args:
        model (`nn.Module`): the pruned model; changed in place.
        units (`Sequence[Unit]`): its units.
        biases (`Sequence[torch.Tensor]`): `[d]` per layer, from [`removed_means`].
    """
    if add_output_biases(model, units):
        mark_output_biases(model)
    with torch.no_grad():
        for unit, bias in zip(units, biases, strict=True):
            unit.modules(model)[1].bias.add_(bias)


def check_output_biases(model: Any, units: Sequence[Unit]) -> None:
    """Check that every output projection has a bias, or can be given one.

    Raises:
        UnsupportedModelError: if not.
    """
    outputs = [model.get_submodule(unit.output.module) for unit in units]
    without = [output for output in outputs if getattr(output, "bias", None) is None]
    possible = all("bias" in output._parameters for output in without)
    for cls in map(type, text_configs(model)):  # where a family reads lists by itself, nothing would build the biases
        possible = possible and not takes_lists(cls, stored_field(cls))
    if without and not possible:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the output projections of its FFNs cannot be given a bias. Choose another recovery."
        )


def mark_output_biases(model: Any) -> None:
    """Let the text config say that output projections got a bias, as that of a model that version 0.1 pruned with one."""
    for config in text_configs(model):
        setattr(config, OUTPUT_BIAS, True)
