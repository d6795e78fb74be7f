"""Which stored tensors of a checkpoint are those of a model's FFNs, and along which of their dimensions neurons lie."""

from collections.abc import Sequence
from typing import NamedTuple

from hf_lop.errors import UnsupportedModelError
from hf_lop.hub.read.skeleton import Skeleton
from hf_lop.units.modeling_lop import FFN


class StoredFFN(NamedTuple):
    """A stored tensor with entries for every neuron of one layer.

    Attributes:
        layer (`int`): index of the decoder layer.
        width (`int`): its neurons.
        dim (`int`): dimension along which they lie, 0 or 1; a prefix of neurons is a prefix of the bytes where it is 0.
        parts (`int`): 2 for a fused projection, which has all gate entries, then all up entries along `dim`; else 1.
        output (`bool`): whether it is the output projection.
    """

    layer: int
    width: int
    dim: int
    parts: int
    output: bool


def stored_ffns(skeleton: Skeleton, ffns: Sequence[FFN]) -> dict[str, StoredFFN]:
    """Find the tensors of a model's FFNs in its checkpoint.

    Args:
        skeleton (`Skeleton`): of the dense model.
        ffns (`Sequence[FFN]`): its L FFNs.

    Returns:
        `dict`: by name of the stored tensor.

    Raises:
        UnsupportedModelError: if a tensor is not stored as the model has it.
    """
    found: dict[str, StoredFFN] = {}
    for layer, ffn in enumerate(ffns):
        inputs, output = ffn.modules(skeleton.model)
        sides = [(name, module, True) for name, module in zip(ffn.inputs, inputs, strict=True)]
        for child, module, rows in [*sides, (ffn.output, output, False)]:
            conv1d = not hasattr(module, "in_features")  # stores [in, out], Linear [out, in]
            dims = {"weight": int(rows == conv1d)} | ({"bias": 0} if rows else {})
            for own, dim in dims.items():
                parameter = getattr(module, own, None)
                if parameter is None:
                    continue
                name = skeleton.source(parameter)
                if name is None:
                    raise UnsupportedModelError(
                        f"{ffn.path}.{child}.{own} is stored in another form than the model has it, so that it cannot be read "
                        "by prefixes. Load the whole model, and prune it."
                    )
                found[name] = StoredFFN(layer, ffn.width, dim, 2 if rows and ffn.fused else 1, not rows)
    return found
