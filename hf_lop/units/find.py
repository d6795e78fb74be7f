"""Which models can be pruned, checked before any work."""

import torch
from torch import nn

from hf_lop.errors import UnsupportedModelError
from hf_lop.units.modeling_lop import FFN, find_ffns, layer_widths, linear_shape, text_configs

__all__ = ["FFN", "find_ffns", "prunable_ffns"]


def prunable_ffns(model: nn.Module, *, on_meta: bool = False) -> list[FFN]:
    """Find the FFNs of a model and check that they can be cut here and now.

    Args:
        model (`nn.Module`): a dense transformers model with its weights in memory.
        on_meta (`bool`): it may be on the meta device, its weights are cut elsewhere.

    Returns:
        `list[FFN]`: one per decoder layer.

    Raises:
        UnsupportedModelError: if the model is already pruned, quantised, without weights (meta device, offloaded), has
            adapters in its FFNs, or has no FFN that can be cut (see [`find_ffns`]).
    """
    label = type(model).__name__
    ffns = find_ffns(model)
    config = getattr(model, "config", None)
    widths = layer_widths(text_configs(model)[0]) if config is not None else None
    if widths is not None or getattr(config, "pruning_config", None):
        raise UnsupportedModelError(
            f"{label} is already pruned (widths {widths}). Prune the dense base model: neuron orders and plans refer to it."
        )
    if getattr(config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise UnsupportedModelError(
            f"{label} is quantised, and packed weights cannot be cut by neuron. "
            "Load it without quantization_config, prune, then quantise the pruned model."
        )
    for ffn in ffns:
        inputs, output = ffn.modules(model)
        for module in (*inputs, output):
            weight = module.weight
            if not isinstance(weight, torch.Tensor) or (weight.is_meta and not on_meta):
                raise UnsupportedModelError(
                    f"{label}: the weights of {ffn.path} are not in memory (meta device or offloaded). "
                    'Load the model with device_map="cpu" or on one device, then prune.'
                )
            if not weight.is_floating_point() or type(weight) not in (nn.Parameter, torch.Tensor):
                raise UnsupportedModelError(
                    f"{label}: the weights of {ffn.path} are {type(weight).__name__} of {weight.dtype}, which cannot be "
                    "cut by neuron. Prune the unquantised model, then quantise the pruned one."
                )
            if module._parameters.get("weight") is not weight:
                raise UnsupportedModelError(
                    f"{label}: {ffn.path} holds a {type(module).__name__}, an adapter or parametrisation over the real "
                    "weight. Merge or remove it (PEFT: merge_and_unload), prune, then add it again."
                )
            if linear_shape(module) is None:
                raise UnsupportedModelError(
                    f"{label}: {ffn.path} holds a {type(module).__name__}, which is no projection."
                )
    return ffns
