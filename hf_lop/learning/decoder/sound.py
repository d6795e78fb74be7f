"""Whether the weights of a model are numbers."""

from collections.abc import Sequence

import torch
from torch import nn

from hf_lop.errors import UnsupportedModelError
from hf_lop.units.unit import Unit


def finite(tensor: torch.Tensor) -> bool:
    """Whether all entries are finite, in one pass without a copy; types of 8 bits are compared in blocks of float32."""
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:
        return all(bool(torch.isfinite(rows.float()).all()) for rows in tensor.detach().flatten().split(2**20))
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.detach()))  # NaN is both ends


def not_finite(model: nn.Module) -> str | None:
    """Return the name of a model's first weight that holds NaN or infinity; None if there is none."""
    return next((name for name, parameter in model.named_parameters() if not finite(parameter)), None)


def check_weights(model: nn.Module, units: Sequence[Unit]) -> None:
    """Refuse units with NaN or infinity in their weights: no order, recovery or plan of them means anything.

    Raises:
        UnsupportedModelError: if there is one; it names the weight.
    """
    for unit in units:
        for path, tensor in unit.tensors:
            check_weight(f"{path}.{tensor}", getattr(model.get_submodule(path), tensor))


def check_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight, or some rows of it, if it is finite.

    Raises:
        UnsupportedModelError: if not; it names the weight.
    """
    if not finite(weight):
        raise UnsupportedModelError(
            f"The model's weight {name} holds NaN or infinity, so what is left of its layer would mean nothing. Load the model "
            "again, or take another."
        )
    return weight
