"""Cutting FFNs to the neurons that stay, in memory and in place, and the same as a mask that changes no weight."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hf_lop.errors import InvalidInputError
from hf_lop.units.find import prunable_ffns
from hf_lop.units.modeling_lop import FFN, set_widths, take_neurons


def check_kept(ffns: Sequence[FFN], kept: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the kept indices in ascending order, so that neurons stay in their original order."""
    if len(kept) != len(ffns):
        raise InvalidInputError(f"Kept neurons for {len(kept)} layers were given; the model has {len(ffns)} layers.")
    ordered = []
    for layer, (ffn, indices) in enumerate(zip(ffns, kept, strict=True)):
        indices = torch.as_tensor(indices, dtype=torch.int64).cpu().sort().values
        if not len(indices):
            raise InvalidInputError(f"Layer {layer} would keep no neuron; keep at least one.")
        if indices[0] < 0 or indices[-1] >= ffn.width or bool((indices[1:] == indices[:-1]).any()):
            raise InvalidInputError(f"Kept neurons of layer {layer} must be distinct and in [0, {ffn.width}).")
        ordered.append(indices)
    return ordered


def slice_ffns(model: nn.Module, kept: Sequence[torch.Tensor], *, on_meta: bool = False) -> list[FFN]:
    """Cut every FFN to its kept neurons, in place; one projection at a time, so little extra memory is used.

    Args:
        model (`nn.Module`): a dense model; keeps its class, device and dtype.
        kept (`Sequence[torch.Tensor]`): one `[k] int64` per layer, in any order; the neurons keep their original order.
        on_meta (`bool`): the model may be on the meta device.

    Returns:
        `list[FFN]`: the FFNs with their new widths, which the text config's `intermediate_size` lists from now on.

    Raises:
        UnsupportedModelError: if the model cannot be pruned (see [`prunable_ffns`]).
        InvalidInputError: if the indices do not fit the model. In both cases nothing was changed.
    """
    ffns = prunable_ffns(model, on_meta=on_meta)
    ordered = check_kept(ffns, kept)
    set_widths(model, [len(indices) for indices in ordered])
    return [
        ffn if len(indices) == ffn.width else take_neurons(model, ffn, indices)
        for ffn, indices in zip(ffns, ordered, strict=True)
    ]


@contextlib.contextmanager
def mask_neurons(model: nn.Module, ffns: Sequence[FFN], kept: Sequence[torch.Tensor]) -> Iterator[None]:
    """Silence all neurons but the kept ones while the context lasts: the output a pruned model would give.

    Args:
        model (`nn.Module`): the dense model; no weight is touched.
        ffns (`Sequence[FFN]`): the FFNs to mask.
        kept (`Sequence[torch.Tensor]`): the neurons to keep, one `[k] int64` per FFN.
    """

    def silence(dropped: torch.Tensor) -> Callable[..., Any]:
        return lambda _module, args: (args[0].index_fill(-1, dropped, 0.0), *args[1:])

    handles = []
    try:
        for ffn, indices in zip(ffns, check_kept(ffns, kept), strict=True):
            output = ffn.modules(model)[1]
            stays = torch.zeros(ffn.width, dtype=torch.bool)
            stays[indices] = True
            dropped = (~stays).nonzero().flatten().to(output.weight.device)
            handles.append(output.register_forward_pre_hook(silence(dropped)))
        yield
    finally:
        for handle in handles:
            handle.remove()
