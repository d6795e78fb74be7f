"""Rewriting a pruned model's config.json to another spelling of one FFN width per layer; the weights stay as they are."""

import copy
from collections.abc import Sequence
from typing import Any

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.units.checks import WIDTH


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


def per_layer_config(config: dict[str, Any], widths: Sequence[int], dense: int) -> dict[str, Any]:
    """Write the widths as transformers' sparse `per_layer_config`: entries where a layer differs from the dense width.

    Args:
        config (`dict`): parsed config.json of a pruned model of L decoder layers; it is not changed.
        widths (`Sequence[int]`): `[L]` its widths.
        dense (`int`): what `intermediate_size` was before pruning.

    Returns:
        `dict`: the new config; `auto_map` stays, because `modeling_lop.py` reads this spelling too.

    Raises:
        InvalidInputError: if the config does not hold the widths.

    Source: transformers, integrations/heterogeneity/configuration_utils.py.
    """
    result = copy.deepcopy(config)
    stack = [result]
    while stack:
        holder = stack.pop()
        if holder.get(WIDTH) == list(widths):
            holder[WIDTH] = dense
            holder["per_layer_config"] = {str(i): {WIDTH: width} for i, width in enumerate(widths) if width != dense}
            return result
        stack += [value for value in holder.values() if isinstance(value, dict)]
    raise InvalidInputError(
        f"The config has no {WIDTH} {list(widths)}. Pass the config.json of the pruned model itself."
    )
