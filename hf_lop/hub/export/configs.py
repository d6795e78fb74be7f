"""Rewriting a pruned model's config.json to other spellings of one FFN width per layer; the weights stay as they are.

L is the number of decoder layers. Every function takes the parsed config.json and changes nothing in it.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.units.configs import WIDTH

# Where vLLM finds the decoder of a multimodal architecture, for those its AnyModel does not know by itself.
_QWEN2_VL = {
    "decoder_layer_module": ".qwen2",
    "decoder_layer_class": "Qwen2DecoderLayer",
    "layers_path": "language_model.model.layers",
    "init_prefix": "model",
    "layer_hf_config": "text_config",
}
ANYMODEL: dict[str, dict[str, str]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "Qwen3VLForConditionalGeneration": {},
    "Qwen2VLForConditionalGeneration": {**_QWEN2_VL, "base_model_module": ".qwen2_vl"},
    "Qwen2_5_VLForConditionalGeneration": {**_QWEN2_VL, "base_model_module": ".qwen2_5_vl"},
}


def check_field(config: Any) -> None:
    """Check that a text config calls its FFN width what the other loaders of per-layer widths read.

    Raises:
        UnsupportedModelError: if it has another name for it.
    """
    if WIDTH not in getattr(type(config), "__dataclass_fields__", {}):
        raise UnsupportedModelError(
            f"A {config.model_type!r} config has another name for its FFN width than {WIDTH!r}, and no other loader reads "
            "that per layer. Export it as uniform instead."
        )


def _scalar(config: dict[str, Any], widths: Sequence[int], dense: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Copy a config and put the dense width in place of the list; return the copy and the dict in it that held the list.

    Raises:
        InvalidInputError: if there is no such list.
    """
    result = copy.deepcopy(config)
    stack = [result]
    while stack:
        holder = stack.pop()
        if holder.get(WIDTH) == list(widths):
            holder[WIDTH] = dense
            return result, holder
        stack += [value for value in holder.values() if isinstance(value, dict)]
    raise InvalidInputError(
        f"The config has no {WIDTH} {list(widths)}. Pass the config.json of the pruned model itself."
    )


def per_layer_config(config: dict[str, Any], widths: Sequence[int], dense: int) -> dict[str, Any]:
    """Write the widths as transformers' sparse `per_layer_config`: entries where a layer differs from the dense width.

    Args:
        config (`dict`): parsed config.json of a pruned model.
        widths (`Sequence[int]`): `[L]` its widths.
        dense (`int`): what `intermediate_size` was before pruning.

    Returns:
        `dict`: the new config; `auto_map` stays, because `modeling_lop.py` reads this spelling too.

    Raises:
        InvalidInputError: if the config does not hold the widths.

    Source: transformers, integrations/heterogeneity/configuration_utils.py.
    """
    result, holder = _scalar(config, widths, dense)
    holder["per_layer_config"] = {str(i): {WIDTH: width} for i, width in enumerate(widths) if width != dense}
    return result


def anymodel(config: dict[str, Any], widths: Sequence[int], dense: int) -> dict[str, Any]:
    """Write the config that vLLM's AnyModel reads (vLLM pull request 36512, open when this was written).

    Args:
        config (`dict`): parsed config.json of a pruned model.
        widths (`Sequence[int]`): `[L]` its widths.
        dense (`int`): what `intermediate_size` was before pruning.

    Returns:
        `dict`: the new config.

    Raises:
        UnsupportedModelError: if AnyModel does not know the architecture.
    """
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ANYMODEL:
        raise UnsupportedModelError(
            f"vLLM's AnyModel runs {', '.join(ANYMODEL)}; this is {architecture}. Serve the pruned repository as it is by "
            "`vllm serve MODEL --model-impl transformers --trust-remote-code`, or export it as uniform."
        )
    result = per_layer_config(config, widths, dense)
    result.pop("auto_map", None)
    result |= {"architectures": ["AnyModel"], "base_architecture": architecture}
    if ANYMODEL[architecture]:
        result["anymodel_arch_info"] = dict(ANYMODEL[architecture])
    return result


def block_configs(config: dict[str, Any], widths: Sequence[int], dense: int) -> dict[str, Any]:
    """Write the `block_configs` of NVIDIA ModelOpt's Puzzletron: one entry per layer, attention and FFN.

    Args:
        config (`dict`): parsed config.json of a pruned model.
        widths (`Sequence[int]`): `[L]` its widths.
        dense (`int`): what `intermediate_size` was before pruning.

    Returns:
        `dict`: the new config.

    Raises:
        InvalidInputError: if the config does not hold the widths, or does not tell the number of attention heads.
    """
    result, holder = _scalar(config, widths, dense)
    heads = holder.get("num_key_value_heads", holder.get("num_attention_heads"))
    if heads is None:
        raise InvalidInputError(
            "The config.json has neither num_key_value_heads nor num_attention_heads, which block_configs repeats for every "
            "layer. Save the pruned model again with transformers, which writes them."
        )
    result.pop("auto_map", None)
    result["block_configs"] = [
        {
            "attention": {"no_op": False, "num_key_value_heads": heads},
            "ffn": {"no_op": False, WIDTH: width},
        }
        for width in widths
    ]
    return result


REWRITES: dict[str, Callable[[dict[str, Any], Sequence[int], int], dict[str, Any]]] = {
    "per_layer_config": per_layer_config,
    "anymodel": anymodel,
    "block_configs": block_configs,
}
