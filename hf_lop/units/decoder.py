"""Where the text decoder of a model is, and its layers.

Every repository of a pruned model carries a copy of this file beside `modeling_lop.py`.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

BUILT = "lop_built"  # marks the config that decoder layers are being built from; copies of it carry the mark too


def text_decoder(model: Any) -> Any:
    """Return the text decoder inside a model; the model itself where it names none."""
    while hasattr(model, "get_decoder"):
        decoder = model.get_decoder()
        if decoder is None or decoder is model or not any(_lists(decoder)):
            break
        model = decoder
    return model


def holds_decoder(model: Any, config: Any, *, encodes: bool) -> bool:
    """Whether a model that was just built has the layers that a text config describes: heads may be those of another part.

    Args:
        model (`nn.Module`): the model.
        config (`PreTrainedConfig`): the text config; it and its copies have the mark `BUILT`.
        encodes (`bool`): whether it describes an encoder as well.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    if not any(found is config or BUILT in getattr(found, "__dict__", ()) for found in configs):
        return False
    decoder = text_decoder(model)
    if not encodes:
        return True
    first = min((name for name, _ in _lists(decoder)), key=lambda name: name.count("."), default="")
    names = f"{type(decoder).__name__}.{first}".lower()
    return "encoder" not in names or "decoder" in names


def part_config(config: Any, config_cls: type) -> Any:
    """Return the config that a class is built from: Auto classes give remote code that of the whole, also for its text part.

    Args:
        config (`PreTrainedConfig`): what was given.
        config_cls (`type`): what the class takes.
    """
    if getattr(config, "sub_configs", {}).get("text_config") is not config_cls:
        return config
    text = config.get_text_config()
    if (packed := getattr(config, "quantization_config", None)) is not None:
        text.quantization_config = packed
    return text


def decoder_layers(model: Any, is_layer: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """Return the decoder layers of a model, each with its path from the model; none if it has no list of modules.

    They are the outermost list that holds a layer, and its likes: some decoders run two stacks in turn.

    Args:
        model (`nn.Module`): a transformers model.
        is_layer (`Callable`): whether a module looks like a layer.
    """
    decoder = text_decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    lists = sorted(_lists(decoder), key=lambda entry: entry[0].count("."))
    if not lists:
        return []
    first = next((stack for stack in lists if any(is_layer(layer) for layer in stack[1])), lists[0])
    kinds = {type(layer) for layer in first[1]}
    stacks = [first, *(s for s in lists if s is not first and {type(layer) for layer in s[1]} <= kinds)]
    return [
        (".".join(filter(None, (prefix, name, str(index)))), layer)
        for name, stack in stacks
        for index, layer in enumerate(stack)
    ]


def _lists(module: "nn.Module") -> "Iterator[tuple[str, nn.ModuleList]]":
    from torch import nn

    return ((name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m))
