"""Which stored tensors of a checkpoint are those of a model's FFNs, and along which of their dimensions neurons lie."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hf_lop.errors import CheckpointMismatchError
from hf_lop.ffn.stored import Place
from hf_lop.modeling_lop import FFN


class StoredFFN(NamedTuple):
    """A stored tensor with entries for every neuron of one layer.

    Attributes:
        layer (`int`): index of the decoder layer.
        width (`int`): its neurons.
        dim (`int`): dimension along which they lie, 0 or 1; a prefix of neurons is a prefix of the bytes where it is 0.
        parts (`int`): 2 for a fused projection, which has all gate entries, then all up entries along `dim`; else 1.
    """

    layer: int
    width: int
    dim: int
    parts: int


def stored_ffns(model: Any, ffns: Sequence[FFN], places: Mapping[str, Place]) -> dict[str, StoredFFN]:
    """Find the tensors of a model's FFNs among those of its checkpoint.

    Checkpoints may have other prefixes than the model: names are matched from the end, as far as they agree.

    Args:
        model: the dense model, on any device.
        ffns (`Sequence[FFN]`): its L FFNs.
        places (`Mapping[str, Place]`): of all stored tensors, by name.

    Returns:
        `dict`: by name of the stored tensor.

    Raises:
        CheckpointMismatchError: if a tensor is not there, might be one of several, or has another shape.
    """
    by_suffix: dict[str, list[str]] = {}
    for name in places:
        parts = name.split(".")
        for start in range(len(parts)):
            by_suffix.setdefault(".".join(parts[start:]), []).append(name)
    found: dict[str, StoredFFN] = {}
    for path, shape, entry in _tensors(model, ffns):
        stored = _match(path, by_suffix)
        if stored is None or stored in found:
            raise CheckpointMismatchError(
                f"The checkpoint has no tensor that is clearly {path}. Take it from its author again."
            )
        if places[stored].shape != shape:
            raise CheckpointMismatchError(
                f"{stored} is stored with shape {list(places[stored].shape)}; the config asks for {list(shape)}. Take weights and "
                "config from the same commit."
            )
        found[stored] = entry
    return found


def _tensors(model: Any, ffns: Sequence[FFN]) -> list[tuple[str, tuple[int, ...], StoredFFN]]:
    """Path, shape and description of all parameters of FFNs with entries for every neuron."""
    found = []
    for layer, ffn in enumerate(ffns):
        inputs, output = ffn.modules(model)
        sides = [(name, module, True) for name, module in zip(ffn.inputs, inputs, strict=True)]
        for child, module, rows in [*sides, (ffn.output, output, False)]:
            conv1d = not hasattr(module, "in_features")  # stores [in, out], Linear [out, in]
            parts = 2 if rows and ffn.fused else 1
            dims = {"weight": int(rows == conv1d)} | ({"bias": 0} if rows else {})
            for name, dim in dims.items():
                parameter = getattr(module, name, None)
                if parameter is not None:
                    path = ".".join(filter(None, (ffn.path, child, name)))
                    found.append((path, tuple(parameter.shape), StoredFFN(layer, ffn.width, dim, parts)))
    return found


def _match(path: str, by_suffix: Mapping[str, list[str]]) -> str | None:
    parts = path.split(".")
    for start in range(len(parts)):
        suffix = parts[start:]
        if not any(part.isdigit() for part in suffix):
            return None  # a match must tell the layer
        names = by_suffix.get(".".join(suffix))
        if names:
            return names[0] if len(names) == 1 else None
    return None
