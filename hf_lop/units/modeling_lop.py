"""Loads models that hf_lop pruned, with plain transformers.

A config with one count per decoder layer, such as a list of FFN widths in `intermediate_size`, loads: the model is built
with the number that it had before pruning, then every layer is cut to its own count, before any weight is read. `install()`
does this for all of transformers' loaders; `modeling_lop.<ClassName>`, which `auto_map` names, does it for
`trust_remote_code=True`.

The package imports this file, and every pruned repository carries a copy of it as remote code, with the files beside it that
it imports, as `lop_errors.py`, `lop_unit.py` and so on. Importing it changes
nothing and loads neither torch nor transformers.
"""

import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_lop.units.checks import (
    FORMAT,
    UNITS,
    WIDTH,
    check_counts,
    check_format,
    check_marks,
    check_unpruned,
)
from hf_lop.units.configs import (
    enable_fields,
    forget_lists,
    layer_counts,
    lists_within,
    read_per_layer_config,
    scalars,
    stored_field,
    text_configs,
    write_counts,
)
from hf_lop.units.decoder import holds_decoder, part_config
from hf_lop.units.kinds import KINDS
from hf_lop.units.unit import Unit, take

if TYPE_CHECKING:
    from torch import nn

OUTPUT_BIAS = "pruned_ffn_output_bias"  # whether pruning gave output projections a bias that their class has not


# -- Building models ---------------------------------------------------------------------------------------------------


def _build(model: "nn.Module", config: Any, lists: dict[str, list[Any]]) -> None:
    """Give a freshly built model its counts and biases; no value matters, the weights are read afterwards."""
    import torch

    for kind, counts in layer_counts(config).items():
        units = KINDS[kind](model)
        if len(units) < len(counts):  # fewer layers than were saved are asked for: the first ones
            counts, lists = counts[: len(units)], {field: values[: len(units)] for field, values in lists.items()}
        check_counts(counts, len(units), next(iter(lists)))
        cpu = torch.device("cpu")  # the model itself may be on the meta device
        units = [
            take(model, unit, torch.arange(k, device=cpu) % unit.count) for unit, k in zip(units, counts, strict=True)
        ]
    for twin in text_configs(model):  # some models give their parts copies of the config
        vars(twin).update({field: list(values) for field, values in lists.items()})
    if getattr(config, OUTPUT_BIAS, False) is True:
        add_output_biases(model, units)


def add_output_biases(model: "nn.Module", units: Sequence[Unit]) -> bool:
    """Give the output projection of every unit a bias of zeros, where it has none; return whether there was such a one."""
    import torch
    from torch import nn

    outputs = [model.get_submodule(unit.output.module) for unit in units]
    without = [output for output in outputs if getattr(output, "bias", None) is None]
    for output in without:
        weight: Any = output.weight
        bias = torch.zeros(weight.shape[1 - units[0].output.axis], dtype=weight.dtype, device=weight.device)
        output.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)
    return bool(without)


def _wrap_constructor(model_cls: Any) -> None:
    """Let one model class be built from a config with lists in it.

    What an older version of this file wrapped is wrapped again: while this runs, the older code sees plain numbers.
    """
    original = model_cls.__init__
    if getattr(original, "_lop_format", -1) >= FORMAT:
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        config: Any = kwargs.get("config", args[0] if args else None)
        if config is None or not any(lists_within(config)):
            original(self, *args, **kwargs)
            return
        # The parts of a model keep the very object that they are built from: it must show plain numbers meanwhile, and the
        # caller's must not, from which another thread may be building.
        config = copy.deepcopy(config)
        args, kwargs = (args, {**kwargs, "config": config}) if "config" in kwargs else ((config, *args[1:]), kwargs)
        found = list(lists_within(config))
        encodes = [getattr(own, "is_encoder_decoder", False) for own, _ in found]  # a constructor may change it
        with scalars(found):
            original(self, *args, **kwargs)
            held = [holds_decoder(self, own, encodes=second) for (own, _), second in zip(found, encodes, strict=True)]
        for (own, lists), here in zip(found, held, strict=True):
            if here:
                _build(self, own, lists)
            else:  # a class with another part of the model only, such as its encoder
                forget_lists(config, own)

    __init__._lop = True  # type: ignore[attr-defined]  # older versions of this file leave it alone
    __init__._lop_format = FORMAT  # type: ignore[attr-defined]
    model_cls.__init__ = __init__


def _model_classes(config_cls: type) -> list[type]:
    """All model classes in the modules that implement this config's models."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

    modules = []
    for cls in config_cls.__mro__:
        if cls is PreTrainedConfig:  # beyond it lies what every model is made of, and no layer
            break
        sibling = cls.__module__.replace(".configuration_", ".modeling_")
        if sibling != cls.__module__ and importlib.util.find_spec(sibling):
            modules.append(importlib.import_module(sibling))
        for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
            with contextlib.suppress(ValueError):  # some mappings name a class that transformers has not
                entry = mapping.get(cls, ())
                modules += [sys.modules[c.__module__] for c in (entry if isinstance(entry, tuple) else (entry,))]
    return [
        cls
        for module in dict.fromkeys(modules)
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__
    ]


def enable(config_cls: type, fields: Sequence[str]) -> None:
    """Let one text config class hold lists in some fields, and its models be built from it."""
    known = vars(config_cls).get("_lop_fields")
    if enable_fields(config_cls, fields) and vars(config_cls).get("_lop_fields") != known:
        enable_models(config_cls)


def enable_models(config_cls: type) -> None:
    """Let all models of one config class be built from a config with lists in it."""
    from transformers import PreTrainedModel

    if getattr(PreTrainedModel.__init__, "_lop", False):  # by a version before 0.2, for every model there is
        PreTrainedModel.__init__ = PreTrainedModel.__init__.__wrapped__  # type: ignore[method-assign, attr-defined]
    for model_cls in _model_classes(config_cls):
        if "__init__" in vars(model_cls):
            _wrap_constructor(model_cls)


def enable_for(config_cls: type, config_dict: dict[str, Any]) -> bool:
    """Enable every (sub-)config class for which `config_dict` carries lists; return whether there was one.

    Raises:
        CheckpointMismatchError: if the config is damaged, or of a format that this code does not know.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    check_format(config_dict.get("pruning_config"))
    read_per_layer_config(config_dict)
    found = _enable_own(config_cls, config_dict)
    for key, sub in getattr(config_cls, "sub_configs", {}).items():
        if isinstance(value := config_dict.get(key), dict):
            if not (inspect.isclass(sub) and issubclass(sub, PreTrainedConfig)):  # AutoConfig: the dict says which
                kind = value.get("model_type")
                sub = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None
            if sub is not None and enable_for(sub, value):
                enable_models(config_cls)
                found = True
    return found


def _enable_own(config_cls: type, config_dict: dict[str, Any]) -> bool:
    """Enable one config class for the lists at the top of `config_dict`; return whether there was one."""
    marks = config_dict.get(UNITS)
    marks = {} if marks is None else marks
    check_marks(marks, KINDS)
    own = stored_field(config_cls)
    values = {**{field: config_dict.get(field) for field in marks}, own: config_dict.get(own, config_dict.get(WIDTH))}
    lists = {field: value for field, value in values.items() if isinstance(value, list)}
    if lists:
        enable(config_cls, list(lists))
    for field, counts in lists.items():  # their number is checked with the model: not every config tells it
        if field != own:
            check_counts(counts, _stored_depth(config_cls, config_dict, len(counts)), field)
        elif vars(config_cls).get("_lop_enabled"):
            check_counts(counts, _stored_depth(config_cls, config_dict, len(counts)), WIDTH)
            check_unpruned(config_dict)
    return bool(lists)


def _stored_depth(config_cls: type, config_dict: dict[str, Any], listed: int) -> int | None:
    """Return how many layers the file itself names; None where these may be an encoder's, or those of one of several stacks."""
    if config_dict.get("is_encoder_decoder", getattr(config_cls, "is_encoder_decoder", False)):
        return None
    depth = config_dict.get(getattr(config_cls, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers"))
    stacks = type(depth) is int and depth > 0 and listed > depth and listed % depth == 0
    return depth if type(depth) is int and not stacks else None


def set_counts(model: Any, units: Sequence[Unit], counts: Sequence[int]) -> None:
    """Write how many pieces every unit keeps into the model's text config, so that the model can be built from it."""
    for config in text_configs(model):
        write_counts(config, units, counts)
        enable_models(type(config))
    enable_models(type(model.config))


# -- Entry points ------------------------------------------------------------------------------------------------------


def install() -> None:
    """Hook the reading and making of configs: one that carries lists enables its own architecture first. Idempotent."""
    from transformers.configuration_utils import PreTrainedConfig

    original = PreTrainedConfig.from_dict.__func__  # type: ignore[attr-defined]
    if getattr(original, "_lop_format", -1) >= FORMAT:
        return

    @functools.wraps(original)
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        enable_for(cls, config_dict)
        return original(cls, config_dict, **kwargs)

    from_dict._lop = True  # type: ignore[attr-defined]
    from_dict._lop_format = FORMAT  # type: ignore[attr-defined]
    PreTrainedConfig.from_dict = classmethod(from_dict)  # type: ignore[method-assign, arg-type, assignment]

    def __new__(cls: Any, *_args: Any, **kwargs: Any) -> Any:
        enable_for(cls, kwargs)
        return object.__new__(cls)

    PreTrainedConfig.__new__ = __new__  # type: ignore[method-assign]


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
    namespace |= {"config_class": config_cls, "is_custom_code": own_code}

    def from_pretrained(cls: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        return base.from_pretrained.__func__(cls, *args, config=part_config(config, base.config_class), **kwargs)

    def _from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        return base._from_config.__func__(cls, part_config(config, base.config_class), **kwargs)

    for method in (from_pretrained, _from_config):
        namespace[method.__name__] = classmethod(method)  # type: ignore[arg-type]
    return type(base.__name__, (base,), namespace)


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
