"""Per-layer FFN widths for transformers decoders, in one self-contained file.

The package imports this file, and every pruned repository carries a copy of it as remote code. It does three things:

* `find_ffns` finds the feed-forward network (FFN) of every decoder layer by structure, without a table of model names.
* `take_neurons` keeps some neurons of an FFN, in place.
* A config whose `intermediate_size` is a list, one width per decoder layer, loads: the model is built with one scalar
  width, then each FFN is cut to its own width, and given an output bias if the config says that pruning added one,
  before any weight is read. `install()` does this for all of transformers' loaders; `modeling_lop.<ClassName>`, which `auto_map` names, does it for `trust_remote_code=True`.

Importing it changes nothing and loads neither torch nor transformers.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

WIDTH = "intermediate_size"
DENSE_WIDTH = "unpruned_" + WIDTH  # what the width was before pruning; other parts of a model may be sized by it
OUTPUT_BIAS = "pruned_ffn_output_bias"  # whether pruning gave output projections a bias that their class has not
WIDEST = 2**20  # neurons; far above any FFN known, far below what a hostile config could ask for
DEEPEST = 2**12  # decoder layers; likewise


class LOPError(Exception):
    """Base of all errors raised by hf_lop."""


class UnsupportedModelError(LOPError, ValueError):
    """The model has no FFN of a kind that can be pruned."""


class CheckpointMismatchError(LOPError, ValueError):
    """A checkpoint, config or pruner does not fit the model it is used with."""


# -- Finding FFNs ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class FFN:
    """Where one decoder layer's FFN is.

    Attributes:
        path (`str`): dotted path of the parent module, from the model that was searched.
        inputs (`tuple[str, ...]`): children of the parent whose output rows are the neurons: gate and up projection,
            one plain projection, or one fused gate-up projection.
        output (`str`): child whose input columns are the neurons.
        width (`int`): number of neurons.
        fused (`bool`): whether the single input projection holds gate rows, then up rows.
    """

    path: str
    inputs: tuple[str, ...]
    output: str
    width: int
    fused: bool

    def modules(self, model: "nn.Module") -> tuple[list[Any], Any]:
        """Return the input projections and the output projection inside `model`."""
        parent = model.get_submodule(self.path)
        return [parent.get_submodule(name) for name in self.inputs], parent.get_submodule(self.output)


def linear_shape(module: Any) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear-like module (`Linear` or `Conv1D`), else None."""
    if hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight"):
        return int(module.in_features), int(module.out_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def _match(path: str, linears: dict[str, tuple[int, int]], hidden: int | None) -> list[FFN]:
    """All ways to read a set of projections as an FFN: 1-2 of shape a -> X (or one a -> 2X) and one X -> a."""
    found = []
    for output, (width, out) in linears.items():
        others = {name: shape for name, shape in linears.items() if name != output}
        plain = tuple(name for name, shape in others.items() if shape == (out, width))
        fused = tuple(name for name, shape in others.items() if shape == (out, 2 * width))
        if hidden is not None and out != hidden:
            continue
        if len(plain) in (1, 2) and len(others) == len(plain):
            found.append(FFN(path, plain, output, width, fused=False))
        elif len(fused) == 1 and len(others) == 1:
            found.append(FFN(path, fused, output, width, fused=True))
    return found


def _layer_ffns(layer: "nn.Module", hidden: int | None) -> list[FFN]:
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


def _per_neuron_extras(layer: "nn.Module", ffn: FFN, hidden: int | None) -> list[str]:
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


def text_decoder(model: Any) -> Any:
    """Return the text decoder inside a model; the model itself where it names none."""
    while hasattr(model, "get_decoder"):
        decoder = model.get_decoder()
        if decoder is None or decoder is model or not any(_lists(decoder)):
            break
        model = decoder
    return model


def _lists(module: "nn.Module") -> "Iterator[tuple[str, nn.ModuleList]]":
    from torch import nn

    return ((name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m))


def _layer_stacks(decoder: "nn.Module") -> list[tuple[str, Any]]:
    """The outermost list of layers, and its likes: some decoders run two stacks in turn."""
    lists = sorted(_lists(decoder), key=lambda entry: entry[0].count("."))
    if not lists:
        return []
    first = next((stack for stack in lists if any(_layer_ffns(layer, None) for layer in stack[1])), lists[0])
    kinds = {type(layer) for layer in first[1]}
    return [first, *(stack for stack in lists if stack is not first and {type(layer) for layer in stack[1]} <= kinds)]


def _choose(candidates: list[FFN], readings: list[list[FFN]], expected: list[set[int]]) -> FFN:
    """Pick among several readings of one layer.

    Where a width equals the hidden size, shapes do not tell an input from an output projection; layers of another width
    do. A second network in the layer (an adapter, a low-rank gate) gives way to the one with the width that the config
    names, else to the wider one.
    """

    def place(ffn: FFN) -> tuple[str, tuple[str, ...], str]:
        return ffn.path, ffn.inputs, ffn.output

    def rank(ffn: FFN) -> tuple[int, int, int, int]:
        same = [[c for c in reading if place(c) == place(ffn)] for reading in readings]
        alone = sum(len(reading) == 1 == len(hits) for reading, hits in zip(readings, same, strict=True))
        named = sum(c.width in widths for hits, widths in zip(same, expected, strict=True) for c in hits)
        widest = sum(c.width for hits in same for c in hits)
        return alone, named, widest, candidates.index(ffn)  # at last, the output projection is defined last

    return max(candidates, key=rank)


def _expected_widths(config: Any, count: int) -> list[set[int]]:
    """Per decoder layer, the FFN widths that a text config names: its own, and what it was before pruning."""
    named = vars(config).get(_field(type(config))) if config is not None else None
    dense = {w for w in (named, getattr(config, DENSE_WIDTH, None)) if isinstance(w, int)}
    widths = named if isinstance(named, list) and len(named) == count else [0] * count
    return [dense | {width, max(widths)} for width in widths]


def find_ffns(model: "nn.Module") -> list[FFN]:
    """Find the FFN of every decoder layer by structure.

    Works on any device, the meta device included. Only the text decoder is searched (`model.get_decoder()` where the
    model has one), so a vision tower's FFNs are never taken.

    Args:
        model (`nn.Module`): a transformers model, text-only or multimodal.

    Returns:
        `list[FFN]`: one per decoder layer, in order of the layers; paths start at `model`.

    Raises:
        UnsupportedModelError: if some layer has no FFN, a mixture of experts, or an FFN that cannot be cut neuron by
            neuron.
    """
    decoder = text_decoder(model)
    config = getattr(decoder, "config", None)
    config = config.get_text_config(decoder=True) if config is not None else None
    hidden = getattr(config, "hidden_size", None)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    label = type(model).__name__
    stacks = _layer_stacks(decoder)
    if not stacks:
        raise UnsupportedModelError(f"{label} has no list of decoder layers. hf_lop prunes transformer decoders.")
    layers = [(f"{name}.{index}", layer) for name, stack in stacks for index, layer in enumerate(stack)]
    readings = [_layer_ffns(layer, hidden) for _, layer in layers]
    expected = _expected_widths(config, len(layers))

    ffns = []
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
        ffns.append(dataclasses.replace(ffn, path=".".join(filter(None, (prefix, name, ffn.path)))))
    outputs = {id(ffn.modules(model)[1].weight) for ffn in ffns}
    if len(outputs) < len(ffns):
        raise UnsupportedModelError(
            f"{label}: {len(ffns)} decoder layers share {len(outputs)} FFNs, so layers cannot have widths of their own."
        )
    return ffns


# -- Cutting FFNs ------------------------------------------------------------------------------------------------------


def _take(module: Any, kept: "torch.Tensor", *, rows: bool) -> None:
    """Keep output rows or input columns of one projection; its old weight is freed as soon as the new one exists."""
    from torch import nn

    conv1d = linear_shape(module) is not None and not hasattr(module, "in_features")
    weight = module.weight
    dim = 0 if rows != conv1d else 1  # Conv1D stores [in, out], Linear [out, in]
    module.weight = nn.Parameter(weight.detach().index_select(dim, kept), requires_grad=weight.requires_grad)
    bias = getattr(module, "bias", None)
    if rows and bias is not None:
        module.bias = nn.Parameter(bias.detach().index_select(0, kept), requires_grad=bias.requires_grad)
    name = ("nf" if rows else "nx") if conv1d else ("out_features" if rows else "in_features")
    setattr(module, name, len(kept))


def take_neurons(model: "nn.Module", ffn: FFN, kept: "torch.Tensor") -> FFN:
    """Keep some neurons of one FFN, in place.

    Args:
        model (`nn.Module`): the model `ffn` was found in.
        ffn (`FFN`): the FFN to cut.
        kept (`torch.Tensor`): `[k] int64`, indices of the neurons to keep, in the order they shall have.

    Returns:
        `FFN`: the same place with its new width.
    """
    import torch

    inputs, output = ffn.modules(model)
    for module in inputs:
        index = kept.to(module.weight.device)
        _take(module, torch.cat([index, index + ffn.width]) if ffn.fused else index, rows=True)
    _take(output, kept.to(output.weight.device), rows=False)
    parent = model.get_submodule(ffn.path)
    for name, value in vars(parent).items():  # some forward passes split by a stored width
        if type(value) is int and value == ffn.width and any(word in name for word in ("intermediate", "ff", "inner")):
            setattr(parent, name, len(kept))
    return dataclasses.replace(ffn, width=len(kept))


def _unbiased(model: "nn.Module", ffns: Sequence[FFN]) -> list[Any]:
    outputs = [ffn.modules(model)[1] for ffn in ffns]
    return [output for output in outputs if getattr(output, "bias", None) is None]


def add_output_biases(model: "nn.Module", ffns: Sequence[FFN]) -> bool:
    """Give the output projection of every FFN a bias of zeros, where it has none; return whether there was such a one."""
    import torch
    from torch import nn

    outputs = _unbiased(model, ffns)
    for output in outputs:
        weight = output.weight
        bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        output.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)
    return bool(outputs)


# -- Configs that hold one width per layer -----------------------------------------------------------------------------


def _field(config_cls: type) -> str:
    """Name under which this config class stores the FFN width (`attribute_map` may rename it)."""
    return str(getattr(config_cls, "attribute_map", {}).get(WIDTH, WIDTH))


def layer_widths(config: "PreTrainedConfig") -> list[int] | None:
    """Return the per-layer widths that a pruned text config holds, or None for an ordinary config."""
    widths = vars(config).get(_field(type(config)))
    pruned = getattr(type(config), "_lop_enabled", False) or DENSE_WIDTH in vars(config)  # else a family's own lists
    return widths if isinstance(widths, list) and pruned else None


def check_depth(layers: Any) -> None:
    """Check a number of layers read from a config.

    Raises:
        CheckpointMismatchError: if it is above 4096.
    """
    if type(layers) is int and layers > DEEPEST:
        raise CheckpointMismatchError(
            f"The config names {layers:,} layers; at most {DEEPEST:,} are built. Do not use this repository."
        )


def check_widths(widths: list[Any], num_layers: int | None) -> None:
    """Check a width list read from a config.

    Raises:
        CheckpointMismatchError: if its length is not the number of layers, or an entry is no integer in [1, 2**20].
    """
    check_depth(len(widths))
    if num_layers is not None and len(widths) != num_layers:
        raise CheckpointMismatchError(
            f"{WIDTH} has {len(widths)} entries for {num_layers} decoder layers; it needs one per layer. "
            "The config.json is damaged: take it from the repository again."
        )
    for layer, width in enumerate(widths):
        if type(width) is not int or not 1 <= width <= WIDEST:
            raise CheckpointMismatchError(
                f"{WIDTH}[{layer}] is {width!r}; each width must be an integer from 1 to {WIDEST}. "
                "The config.json is damaged: take it from the repository again."
            )


def _widths_within(config: Any) -> "Iterator[tuple[PreTrainedConfig, list[int]]]":
    """This config and all configs inside it that hold a width list which the models cannot read by themselves."""
    widths = layer_widths(config)
    if widths is not None and getattr(type(config), "_lop_enabled", False):
        yield config, widths
    for key in getattr(type(config), "sub_configs", {}):
        if (sub := getattr(config, key, None)) is not None:
            yield from _widths_within(sub)


@contextlib.contextmanager
def _scalar_widths(found: "list[tuple[PreTrainedConfig, list[int]]]") -> Iterator[None]:
    """Show the dense width on these very config objects: models keep references to them, so copies would not do."""
    for config, widths in found:
        vars(config)[_field(type(config))] = getattr(config, DENSE_WIDTH, None) or max(widths)
    try:
        yield
    finally:
        for config, widths in found:
            vars(config)[_field(type(config))] = widths


def _fit(model: "nn.Module", widths: list[int], bias: bool) -> None:
    """Give a freshly built model its widths and biases; no value matters, the weights are read afterwards."""
    import torch

    ffns = find_ffns(model)
    check_widths(widths, len(ffns))
    ffns = [take_neurons(model, ffn, torch.arange(w) % ffn.width) for ffn, w in zip(ffns, widths, strict=True)]
    for config in text_configs(model):  # some models give their parts copies of the config
        vars(config)[_field(type(config))] = list(widths)
    if bias:
        add_output_biases(model, ffns)


def _wrap_constructor(model_cls: type) -> None:
    """Let one model class be built from a config with a width list in it."""
    original = model_cls.__init__  # type: ignore[misc]
    if getattr(original, "_lop", False):
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        config: Any = kwargs.get("config", args[0] if args else None)
        found = list(_widths_within(config)) if config is not None else []
        with _scalar_widths(found):
            original(self, *args, **kwargs)
        for own, widths in found:
            _fit(self, widths, bias=getattr(own, OUTPUT_BIAS, False) is True)

    __init__._lop = True  # type: ignore[attr-defined]
    model_cls.__init__ = __init__  # type: ignore[misc]


def _model_classes(config_cls: type) -> list[type]:
    """All model classes in the modules that implement this config's models."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel

    modules = []
    for cls in config_cls.__mro__:
        sibling = cls.__module__.replace(".configuration_", ".modeling_")
        if sibling != cls.__module__ and importlib.util.find_spec(sibling):
            modules.append(importlib.import_module(sibling))
        for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
            if cls in mapping:
                entry = mapping[cls]
                modules += [sys.modules[c.__module__] for c in (entry if isinstance(entry, tuple) else (entry,))]
    return [
        cls
        for module in dict.fromkeys(modules)
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__
    ]


def _takes_lists(config_cls: type, name: str) -> bool:
    """Whether a config class takes a list of widths by itself (then its models read it by themselves too)."""
    try:
        for validator in config_cls.__validators__.get(name, []):  # type: ignore[attr-defined]
            validator([1, 1])
    except (TypeError, ValueError):
        return False
    return name in config_cls.__validators__  # type: ignore[attr-defined]


def enable(config_cls: type) -> None:
    """Let one text config class hold a width list, and its models be built from it."""
    name = _field(config_cls)
    if vars(config_cls).get("_lop_enabled"):
        return
    validators = getattr(config_cls, "__validators__", {})
    if name in validators:
        if _takes_lists(config_cls, name):
            return

        def accept(value: Any, stock: list[Callable[[Any], None]] = validators[name]) -> None:
            if isinstance(value, list):
                check_widths(value, None)
            else:
                for validator in stock:
                    validator(value)

        config_cls.__validators__ = {**validators, name: [accept]}  # type: ignore[attr-defined]
    config_cls._lop_enabled = True  # type: ignore[attr-defined]
    _enable_models(config_cls)


def _enable_models(config_cls: type) -> None:
    """Let all models of one config class be built from a config with a width list in it."""
    for model_cls in _model_classes(config_cls):
        if "__init__" in vars(model_cls):
            _wrap_constructor(model_cls)


def enable_for(config_cls: type, config_dict: dict[str, Any]) -> bool:
    """Enable every (sub-)config class for which `config_dict` carries a width list; return whether there was one."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    _read_per_layer_config(config_dict)
    widths = config_dict.get(_field(config_cls), config_dict.get(WIDTH))
    found = isinstance(widths, list)
    if isinstance(widths, list):
        enable(config_cls)
        if vars(config_cls).get("_lop_enabled"):
            check_widths(widths, None)  # their number is checked with the model: not every config tells it
    for key, sub in getattr(config_cls, "sub_configs", {}).items():
        if isinstance(value := config_dict.get(key), dict):
            if not (inspect.isclass(sub) and issubclass(sub, PreTrainedConfig)):  # AutoConfig: the dict says which
                sub = CONFIG_MAPPING[value["model_type"]] if value.get("model_type") in CONFIG_MAPPING else None
            if sub is not None and enable_for(sub, value):
                _enable_models(config_cls)
                found = True
    return found


def _read_per_layer_config(config_dict: dict[str, Any]) -> None:
    """Accept transformers' other spelling, a sparse `per_layer_config` that varies the FFN width only."""
    overrides, default = config_dict.get("per_layer_config"), config_dict.get(WIDTH)
    if not isinstance(overrides, dict) or not all(isinstance(entry, dict) for entry in overrides.values()):
        return
    if overrides and isinstance(default, int) and all(set(entry) <= {WIDTH} for entry in overrides.values()):
        own = {int(layer): entry.get(WIDTH, default) for layer, entry in overrides.items()}
        check_depth(config_dict["num_hidden_layers"])
        config_dict[WIDTH] = [own.get(layer, default) for layer in range(config_dict["num_hidden_layers"])]
        del config_dict["per_layer_config"]


def text_configs(model: Any) -> "list[PreTrainedConfig]":
    """Return the config objects that describe the text decoder: the decoder's own and its twins in `model.config`."""
    own = getattr(text_decoder(model), "config", None) or model.config
    found: list[Any] = [own]

    def traits(config: Any) -> tuple[Any, ...]:  # another tower can have a config of the same class
        width = getattr(config, DENSE_WIDTH, None) or vars(config).get(_field(type(config)))
        return type(config), getattr(config, "hidden_size", None), width

    def walk(config: Any) -> None:
        if traits(config) == traits(own) and all(config is not seen for seen in found):
            found.append(config)
        for key in getattr(type(config), "sub_configs", {}):
            if (sub := getattr(config, key, None)) is not None:
                walk(sub)

    walk(model.config)
    return found


def set_widths(model: Any, widths: list[int]) -> None:
    """Write one width per decoder layer into the model's text config."""
    check_widths(widths, None)
    for config in text_configs(model):
        write_widths(config, widths)
    _enable_models(type(model.config))


def write_widths(config: "PreTrainedConfig", widths: list[int]) -> None:
    """Write one width per decoder layer into a text config."""
    enable(type(config))
    dense = vars(config).get(_field(type(config)))
    if dense is not None and DENSE_WIDTH not in vars(config):
        setattr(config, DENSE_WIDTH, dense if isinstance(dense, int) else max(dense))
    setattr(config, WIDTH, list(widths))


def check_output_biases(model: Any, ffns: Sequence[FFN]) -> None:
    """Check that every output projection has a bias, or can be given one that survives saving and loading.

    Raises:
        UnsupportedModelError: if not.
    """
    outputs = _unbiased(model, ffns)
    possible = all("bias" in output._parameters for output in outputs)
    for cls in map(type, text_configs(model)):  # where a family reads lists by itself, nothing would build the biases
        field, own = _field(cls), not vars(cls).get("_lop_enabled")
        possible = possible and not (own and field in getattr(cls, "__validators__", {}) and _takes_lists(cls, field))
    if outputs and not possible:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the output projections of its FFNs cannot be given a bias. Choose another recovery."
        )


def mark_output_biases(model: Any) -> None:
    """Let the text config of a pruned model say that its output projections got a bias."""
    for config in text_configs(model):
        setattr(config, OUTPUT_BIAS, True)


# -- Entry points ------------------------------------------------------------------------------------------------------


def install() -> None:
    """Hook config reading: a config that carries widths enables its own architecture first. Idempotent."""
    from transformers.configuration_utils import PreTrainedConfig

    original = PreTrainedConfig.from_dict.__func__  # type: ignore[attr-defined]
    if getattr(original, "_lop", False):
        return

    @functools.wraps(original)
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        enable_for(cls, config_dict)
        return original(cls, config_dict, **kwargs)

    from_dict._lop = True  # type: ignore[attr-defined]
    PreTrainedConfig.from_dict = classmethod(from_dict)  # type: ignore[method-assign, arg-type, assignment]


def _keep_weight_names(model_cls: Any) -> None:
    """Register the stock key conversions anew.

    Transformers skips them for classes defined outside it, and then loads random weights with only a warning.
    """
    from transformers import conversion_mapping

    for key in (model_cls.__name__, model_cls.config_class.model_type):
        if (mapping := conversion_mapping.get_checkpoint_conversion_mapping(key)) is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(key, mapping, overwrite=True)


def _remote_class(base: Any) -> type:
    """Build a thin subclass of a transformers class: remote code must not register the stock class itself."""
    from transformers import PreTrainedConfig

    namespace: dict[str, Any] = {"__module__": __name__, "__qualname__": base.__name__}
    if issubclass(base, PreTrainedConfig):

        def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            enable_for(base, config_dict)
            return base.from_dict.__func__(cls, config_dict, **kwargs)

        read: Any = classmethod(from_dict)  # type: ignore[arg-type]
        return type(base.__name__, (base,), {**namespace, "from_dict": read})
    _keep_weight_names(base)
    config_cls = base.config_class
    if config_cls.__module__.startswith("transformers."):
        config_cls = getattr(sys.modules[__name__], config_cls.__name__)  # made once, then a global
    # The code is transformers' own. As custom code it would skip some of its set-up of buffers and weight names.
    own_code: Any = classmethod(lambda cls: False)
    return type(base.__name__, (base,), {**namespace, "config_class": config_cls, "is_custom_code": own_code})


def __getattr__(name: str) -> Any:
    """Resolve `modeling_lop.<transformers class name>`, the form that `auto_map` entries have."""
    if name.startswith("_"):
        raise AttributeError(name)
    import transformers

    base = getattr(transformers, name, None)
    if not inspect.isclass(base) or not issubclass(
        base, (transformers.PreTrainedConfig, transformers.PreTrainedModel)
    ):
        raise AttributeError(f"modeling_lop has no {name!r}, and transformers no model or config class of that name")
    globals()[name] = cls = _remote_class(base)
    return cls
