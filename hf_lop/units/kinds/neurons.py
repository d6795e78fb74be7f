"""FFN neurons: the feed-forward network of every decoder layer, found by structure, without a table of model names.

Every repository of a pruned model carries a copy of this file beside `modeling_lop.py`.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from hf_lop.errors import CheckpointMismatchError, UnsupportedModelError
from hf_lop.units.checks import DENSE_WIDTH, WIDTH
from hf_lop.units.configs import stored_field
from hf_lop.units.decoder import decoder_layers, text_decoder
from hf_lop.units.unit import Unit, linear_shape, linear_slots

if TYPE_CHECKING:
    from torch import nn


class _FFN(NamedTuple):
    """One way to read some projections of a layer as an FFN.

    Attributes:
        path (`str`): of the parent module, from the layer.
        inputs (`tuple[str, ...]`): children whose output rows are the neurons: gate and up projection, one plain projection,
            or one fused gate-up projection.
        output (`str`): child whose input columns are the neurons.
        width (`int`): number of neurons.
        fused (`bool`): whether the single input projection holds gate rows, then up rows.
    """

    path: str
    inputs: tuple[str, ...]
    output: str
    width: int
    fused: bool


def find_neurons(model: Any) -> list[Unit]:
    """Find the FFN of every decoder layer.

    Args:
        model (`nn.Module`): a transformers model.

    Returns:
        `list[Unit]`: one per decoder layer, in order of the layers.

    Raises:
        UnsupportedModelError: if some layer has no FFN, a mixture of experts, or an FFN that cannot be cut neuron by
            neuron.
    """
    config = getattr(text_decoder(model), "config", None)
    config = config.get_text_config(decoder=True) if config is not None else None
    if config is not None and not hasattr(config, "model_type"):
        raise CheckpointMismatchError(
            f"The config of the text decoder is {str(config)[:200]!r}. The config.json is damaged: take it from the repository again."
        )
    hidden = getattr(config, "hidden_size", None)
    label = type(model).__name__
    layers = decoder_layers(model, lambda layer: bool(_readings(layer, None)))
    if not layers:
        raise UnsupportedModelError(f"{label} has no list of decoder layers. hf_lop prunes transformer decoders.")
    readings = [_readings(layer, hidden) for _, layer in layers]
    expected = _expected_widths(config, len(layers))

    units = []
    for index, ((name, layer), candidates) in enumerate(zip(layers, readings, strict=True)):
        where = f"{label}: decoder layer {index} ({type(layer).__name__})"
        if "expert" in str(layer).lower():
            raise UnsupportedModelError(
                f"{where} is a mixture of experts; hf_lop prunes dense FFNs, one in every decoder layer."
            )
        if not candidates:
            raise UnsupportedModelError(
                f"{where} has no gated or plain FFN; hf_lop needs one in every decoder layer, made of one or two "
                "projections hidden -> X (or one hidden -> 2X) and one X -> hidden."
            )
        clean = [ffn for ffn in candidates if not _per_neuron_extras(layer, ffn, hidden)]
        ffn = _choose(clean or candidates, readings, expected)
        if not clean:
            extras = ", ".join(_per_neuron_extras(layer, ffn, hidden))
            raise UnsupportedModelError(
                f"{label}: decoder layer {index} has per-neuron parameters inside its FFN ({extras}), "
                "so removing a neuron changes the others. Such FFNs cannot be pruned exactly."
            )
        if getattr(layer.get_submodule(ffn.path), "activation_sparsity", 0):
            raise UnsupportedModelError(
                f"{where} keeps only the neurons that stand out from the mean of all (activation_sparsity), "
                "so removing a neuron changes the others. Such FFNs cannot be pruned exactly."
            )
        units.append(_unit(index, name, layer, ffn, config))
    outputs = {id(model.get_submodule(unit.output.module).weight) for unit in units}
    if len(outputs) < len(units):
        raise UnsupportedModelError(
            f"{label}: {len(units)} decoder layers share {len(outputs)} FFNs, so layers cannot have widths of their own."
        )
    return units


def _unit(index: int, name: str, layer: Any, ffn: _FFN, config: Any) -> Unit:
    """Write a reading down as a unit: its slots, and where config and modules keep the width."""
    parent = layer.get_submodule(ffn.path)
    path = ".".join(filter(None, (name, ffn.path)))
    slots = []
    for child in ffn.inputs:
        parts = 2 if ffn.fused else 1
        slots += linear_slots(
            f"{path}.{child}", parent.get_submodule(child), output=False, parts=parts, count=ffn.width
        )
    slots += linear_slots(f"{path}.{ffn.output}", parent.get_submodule(ffn.output), output=True)
    ints = [  # some forward passes split by a stored width
        (path, attribute, 1)
        for attribute, value in vars(parent).items()
        if type(value) is int and value == ffn.width and any(w in attribute for w in ("intermediate", "ff", "inner"))
    ]
    field = WIDTH if config is None else stored_field(type(config))
    return Unit("neurons", index, path, ffn.width, tuple(slots), ((field, 1),), tuple(ints))


def _match(path: str, linears: dict[str, tuple[int, int]], hidden: int | None) -> list[_FFN]:
    """All ways to read a set of projections as an FFN: 1-2 of shape a -> X (or one a -> 2X) and one X -> a."""
    found = []
    for output, (width, out) in linears.items():
        others = {name: shape for name, shape in linears.items() if name != output}
        plain = tuple(name for name, shape in others.items() if shape == (out, width))
        fused = tuple(name for name, shape in others.items() if shape == (out, 2 * width))
        if hidden is not None and out != hidden:
            continue
        if len(plain) in (1, 2) and len(others) == len(plain):
            found.append(_FFN(path, plain, output, width, fused=False))
        elif len(fused) == 1 and len(others) == 1:
            found.append(_FFN(path, fused, output, width, fused=True))
    return found


def _readings(layer: "nn.Module", hidden: int | None) -> list[_FFN]:
    """All readings of one decoder layer, without its token mixers: their projections can have the shapes of an FFN."""
    found = []
    for path, module in layer.named_modules():
        convolves = any("conv" in type(c).__name__.lower() and linear_shape(c) is None for c in module.children())
        if convolves or "att" in path.lower():
            continue
        direct = {n: shape for n, child in module.named_children() if (shape := linear_shape(child))}
        found += _match(path, direct, hidden)
        nested, sources = dict(direct), set(direct)  # BERT's way: `intermediate.dense` and `output.dense`
        for name, child in module.named_children():
            inner = {f"{name}.{n}": shape for n, c in child.named_children() if (shape := linear_shape(c))}
            if inner and "att" not in name.lower():
                nested |= inner
                sources.add(name)
        if len(sources) > 1 and len(nested) > len(direct):
            found += _match(path, nested, hidden)
    return found


def _per_neuron_extras(layer: "nn.Module", ffn: _FFN, hidden: int | None) -> list[str]:
    """Parameters of the FFN beside its projections that have one entry per neuron (such as an inner norm)."""
    if ffn.width == hidden:
        return []  # any norm of the layer has that size
    parent = layer.get_submodule(ffn.path)
    return [
        f"{name}.{own}" if name else own
        for name, module in parent.named_modules()
        if linear_shape(module) is None and "att" not in name.lower()
        for own, parameter in module.named_parameters(recurse=False)
        if tuple(parameter.shape) == (ffn.width,)
    ]


def _choose(candidates: list[_FFN], readings: list[list[_FFN]], expected: list[set[int]]) -> _FFN:
    """Pick among several readings of one layer.

    Where a width equals the hidden size, shapes do not tell an input from an output projection; layers of another width
    do. A second network in the layer (an adapter, a low-rank gate) gives way to the one with the width that the config
    names, else to the wider one.
    """

    def place(ffn: _FFN) -> tuple[str, tuple[str, ...], str]:
        return ffn.path, ffn.inputs, ffn.output

    def rank(ffn: _FFN) -> tuple[int, int, int, int]:
        same = [[c for c in reading if place(c) == place(ffn)] for reading in readings]
        alone = sum(len(reading) == 1 == len(hits) for reading, hits in zip(readings, same, strict=True))
        named = sum(c.width in widths for hits, widths in zip(same, expected, strict=True) for c in hits)
        widest = sum(c.width for hits in same for c in hits)
        return alone, named, widest, candidates.index(ffn)  # at last, the output projection is defined last

    return max(candidates, key=rank)


def _expected_widths(config: Any, count: int) -> list[set[int]]:
    """Per decoder layer, the FFN widths that a text config names: its own, and what it was before pruning."""
    named = vars(config).get(stored_field(type(config))) if config is not None else None
    dense = {w for w in (named, getattr(config, DENSE_WIDTH, None)) if isinstance(w, int)}
    widths = named if isinstance(named, list) and len(named) == count else [0] * count
    return [dense | {width, max(widths)} for width in widths]
