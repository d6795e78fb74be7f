"""Configs that hold one value per decoder layer where their class has one for all.

`intermediate_size` becomes a list of FFN widths, and `unpruned_intermediate_size` remembers the number it was. Fields of
other kinds of units become lists as well, and `pruned_units` says of each of them which unit it counts, how many entries
a piece has in it, and the number it was: `{"num_key_value_heads": {"unit": "kv_groups", "per": 1, "unpruned": 8}}`.

Every repository of a pruned model carries a copy of this file beside `modeling_lop.py`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hf_lop.errors import CheckpointMismatchError
from hf_lop.units.checks import DENSE_WIDTH, FORMAT, UNITS, WIDTH, check_counts, check_depth
from hf_lop.units.decoder import BUILT, text_decoder
from hf_lop.units.unit import Unit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def stored_field(config_cls: type) -> str:
    """Name under which this config class stores the FFN width (`attribute_map` may rename it)."""
    return str(getattr(config_cls, "attribute_map", {}).get(WIDTH, WIDTH))


# -- Reading -----------------------------------------------------------------------------------------------------------


def layer_lists(config: Any) -> dict[str, list[Any]]:
    """Return the lists that pruning wrote into a text config, by the field that stores them; empty for ordinary ones."""
    lists = {field: vars(config).get(field) for field in _marks(config)}
    field = stored_field(type(config))
    if getattr(type(config), "_lop_enabled", False) or DENSE_WIDTH in vars(config):  # else a family's own lists
        lists[field] = vars(config).get(field)
    return {field: values for field, values in lists.items() if isinstance(values, list)}


def layer_widths(config: "PreTrainedConfig") -> list[int] | None:
    """Return the FFN width of every layer that a pruned text config holds, or None if it has one for all."""
    return layer_lists(config).get(stored_field(type(config)))


def layer_counts(config: Any) -> dict[str, list[int]]:
    """Return how many pieces every layer keeps by a pruned text config, by the kind of unit; empty for ordinary ones."""
    marks, counts = _marks(config), {}
    for field, values in layer_lists(config).items():
        mark = marks.get(field, {"unit": "neurons", "per": 1})
        check_counts(values, None, field)
        counts[str(mark["unit"])] = [value // mark["per"] for value in values]
    return counts


def _marks(config: Any) -> dict[str, dict[str, Any]]:
    marks = vars(config).get(UNITS)
    return marks if isinstance(marks, dict) else {}


def lists_within(config: Any) -> "Iterator[tuple[PreTrainedConfig, dict[str, list[Any]]]]":
    """This config and all configs inside it that hold lists which the models cannot read by themselves."""
    own = stored_field(type(config))
    readable = not getattr(type(config), "_lop_enabled", False)
    lists = {field: values for field, values in layer_lists(config).items() if not (field == own and readable)}
    if lists:
        yield config, lists
    for key in getattr(type(config), "sub_configs", {}):
        if (sub := getattr(config, key, None)) is not None:
            yield from lists_within(sub)


@contextlib.contextmanager
def scalars(found: "Sequence[tuple[PreTrainedConfig, dict[str, list[Any]]]]") -> Iterator[None]:
    """Show the unpruned numbers on these very config objects: models keep references to them, so copies would not do."""
    for config, lists in found:
        marks = _marks(config)
        for field, values in lists.items():
            dense = marks[field]["unpruned"] if field in marks else getattr(config, DENSE_WIDTH, None) or max(values)
            vars(config)[field] = dense
        vars(config)[BUILT] = True
    try:
        yield
    finally:
        for config, lists in found:
            vars(config).update(lists)
            vars(config).pop(BUILT, None)


def forget_lists(config: Any, own: Any) -> None:
    """Make a config that of a dense model again: the model that is built from it has nothing that was pruned.

    Args:
        config (`PreTrainedConfig`): of the model.
        own (`PreTrainedConfig`): it, or the one inside it that holds lists.
    """
    marks = _marks(own)
    for field in layer_lists(own):
        dense = marks[field]["unpruned"] if field in marks else vars(own).get(DENSE_WIDTH)
        vars(own).pop(field)  # then its class has the number, if it was not told one
        if dense is not None:
            vars(own)[field] = dense
    for name in (DENSE_WIDTH, UNITS):
        vars(own).pop(name, None)
    vars(config).pop("pruning_config", None)


def read_per_layer_config(config_dict: dict[str, Any]) -> None:
    """Accept transformers' other spelling, a sparse `per_layer_config` that varies the FFN width only."""
    overrides, default = config_dict.get("per_layer_config"), config_dict.get(WIDTH)
    if not isinstance(overrides, dict) or not all(isinstance(entry, dict) for entry in overrides.values()):
        return
    if overrides and isinstance(default, int) and all(set(entry) <= {WIDTH} for entry in overrides.values()):
        depth = config_dict.get("num_hidden_layers")
        check_depth(depth)
        if type(depth) is not int or not {str(layer) for layer in overrides} <= {str(layer) for layer in range(depth)}:
            raise CheckpointMismatchError(
                f"per_layer_config names the layers {sorted(map(str, overrides))[:8]} of {depth!r}; they must be numbers of layers, and "
                "num_hidden_layers be there. The config.json is damaged: take it from the repository again."
            )
        own = {int(layer): entry.get(WIDTH, default) for layer, entry in overrides.items()}
        config_dict[WIDTH] = [own.get(layer, default) for layer in range(depth)]
        del config_dict["per_layer_config"]


# -- Config classes ----------------------------------------------------------------------------------------------------


def takes_lists(config_cls: Any, field: str) -> bool:
    """Whether a config class takes a list of widths by itself (then its models read it by themselves too)."""
    validators = getattr(config_cls, "__validators__", {})
    if field not in validators or vars(config_cls).get("_lop_enabled"):
        return False
    try:
        for validator in validators[field]:
            validator([1, 1])
    except (TypeError, ValueError):
        return False
    return True


def enable_fields(config_cls: Any, fields: Sequence[str]) -> bool:
    """Let a text config class hold lists in some fields; return whether its models must be taught to be built from them.

    A version of this file that was here before may have enabled it too: what it set is kept, and `_lop_format` says whose it
    is.
    """
    done: set[str] = set(vars(config_cls).get("_lop_fields", ()))
    fields = [field for field in fields if field not in done and not takes_lists(config_cls, field)]
    if not fields:
        return bool(done)
    validators = dict(getattr(config_cls, "__validators__", {}))
    for field in fields:
        if field in validators:
            validators[field] = [_accepting(field, validators[field])]
    if validators:
        config_cls.__validators__ = validators
    if stored_field(config_cls) in fields:
        config_cls._lop_enabled = True
    if set(fields) - {stored_field(config_cls)}:
        _wrap_config(config_cls)
    config_cls._lop_fields = frozenset(done | {*fields})
    return True


def _accepting(field: str, stock: list[Callable[[Any], None]]) -> Callable[[Any], None]:
    def accept(value: Any) -> None:
        if isinstance(value, list):
            check_counts(value, None, field)
        else:
            for validator in stock:
                validator(value)

    return accept


def _wrap_config(config_cls: Any) -> None:
    """Let the code of a config class see the unpruned numbers only: it divides by them and compares them."""
    original, validate = config_cls.__init__, getattr(config_cls, "validate", None)
    if getattr(original, "_lop_format", -1) >= FORMAT:
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        marks = kwargs.get(UNITS) or {}
        lists = {field: kwargs[field] for field in marks if isinstance(kwargs.get(field), list)}
        original(self, *args, **{**kwargs, **{field: marks[field]["unpruned"] for field in lists}})
        vars(self).update(lists)

    __init__._lop_format = FORMAT  # type: ignore[attr-defined]
    config_cls.__init__ = __init__
    if validate is not None:

        @functools.wraps(validate)
        def validate_scalars(self: Any) -> Any:
            with scalars([(self, layer_lists(self))]):
                return validate(self)

        config_cls.validate = validate_scalars


# -- Writing -----------------------------------------------------------------------------------------------------------


def text_configs(model: Any) -> "list[PreTrainedConfig]":
    """Return the config objects that describe the text decoder: the decoder's own and its twins in `model.config`."""
    own = getattr(text_decoder(model), "config", None) or model.config
    found: list[Any] = [own]

    def traits(config: Any) -> tuple[Any, ...]:  # another tower can have a config of the same class
        width = getattr(config, DENSE_WIDTH, None) or vars(config).get(stored_field(type(config)))
        return type(config), getattr(config, "hidden_size", None), width

    def walk(config: Any) -> None:
        if traits(config) == traits(own) and all(config is not seen for seen in found):
            found.append(config)
        for key in getattr(type(config), "sub_configs", {}):
            if (sub := getattr(config, key, None)) is not None:
                walk(sub)

    walk(model.config)
    return found


def write_counts(config: Any, units: Sequence[Unit], counts: Sequence[int]) -> None:
    """Write how many pieces every unit keeps into a text config: lists in the fields of the units.

    Args:
        config (`PreTrainedConfig`): text config.
        units (`Sequence[Unit]`): one per decoder layer, in their order.
        counts (`Sequence[int]`): pieces that stay, one per unit.
    """
    lists: dict[str, list[int]] = {}
    marks = {field: (unit.kind, per) for unit in units for field, per in unit.fields}
    for unit, count in zip(units, counts, strict=True):
        for field, per in unit.fields:
            lists.setdefault(field, []).append(count * per)
    enable_fields(type(config), list(lists))
    for field, values in lists.items():
        check_counts(values, None, field)
        dense = vars(config).get(field)
        unpruned = dense if isinstance(dense, int) else max(dense) if dense else None
        if field == stored_field(type(config)):
            if isinstance(dense, int) and DENSE_WIDTH not in vars(config):
                setattr(config, DENSE_WIDTH, dense)
            setattr(config, WIDTH, values)
            continue
        kind, per = marks[field]
        known = _marks(config).get(field, {"unit": kind, "per": per, "unpruned": unpruned})
        vars(config)[UNITS] = {**_marks(config), field: known}
        vars(config)[field] = values
