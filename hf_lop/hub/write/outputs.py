"""What the files of a pruned model will hold, known from the files of the dense one before a weight is read."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from hf_lop.errors import UnsupportedModelError
from hf_lop.hub.read.checkpoint import Shards
from hf_lop.hub.read.skeleton import Skeleton
from hf_lop.hub.write.tensors import Output
from hf_lop.recovery.solve import RowFit
from hf_lop.units.modeling_lop import FFN
from hf_lop.units.slice import check_kept, slice_ffns

Fit = Callable[[int, torch.dtype], RowFit]
IN_MEMORY = "Prune it in memory: without --stream, or without output_dir."


def stored_output_weight(skeleton: Skeleton, shards: Shards, ffn: FFN) -> torch.Tensor:
    """Read the output projection of an FFN, `[d, n]` in the dtype of the model; a view where it is stored as `[n, d]`.

    Raises:
        UnsupportedModelError: if it is not stored as the model has it.
    """
    module = ffn.modules(skeleton.model)[1]
    weight = shards.rows(_ffn_source(skeleton, ffn, module.weight)).to(module.weight.dtype)
    return weight if hasattr(module, "in_features") else weight.T


def pruned_outputs(
    skeleton: Skeleton, ffns: Sequence[FFN], kept: Sequence[torch.Tensor], fit: Fit | None
) -> list[Output]:
    """Cut a model without weights, and return the tensors that it is saved as, in the order in which they are.

    Args:
        skeleton (`Skeleton`): of the dense model; its model is cut in place.
        ffns (`Sequence[FFN]`): its L FFNs.
        kept (`Sequence[torch.Tensor]`): the neurons to keep, one `[k] int64` per layer, in any order.
        fit (`Callable`, *optional*): given a layer and a dtype, returns what makes the new rows of its output projection from
            the old ones in that dtype.

    Raises:
        UnsupportedModelError: if a tensor is not stored as the model has it, so that it cannot be made from a file.
        InvalidInputError: if the indices do not fit the model.
    """
    model = skeleton.model
    for ffn in ffns:  # refuses before anything is changed
        inputs, output = ffn.modules(model)
        for module in (*inputs, output):
            for parameter in module.parameters(recurse=False):
                _ffn_source(skeleton, ffn, parameter)
    ordered = check_kept(ffns, kept)
    dense = skeleton.saved()
    sources = _sources(skeleton, dense)
    cut = _Cuts()
    for layer, (ffn, indices, narrow) in enumerate(
        zip(ffns, ordered, slice_ffns(model, ordered, on_meta=True), strict=True)
    ):
        if len(indices) < ffn.width:
            cut.add(model, layer, narrow, indices, ffn.width)
    outputs = []
    for name, tensor in skeleton.saved().items():
        shape, before = tuple(tensor.shape), tuple(dense[name].shape)
        if shape == before:
            outputs.append(Output(name, shape, tensor.dtype, sources[name]))
            continue
        layer, indices, is_output = cut.of(tensor)
        axis = next(axis for axis, size in enumerate(shape) if size != before[axis])
        change = partial(fit, layer, tensor.dtype) if fit is not None and is_output else None
        outputs.append(Output(name, shape, tensor.dtype, sources[name], axis, indices, change))
    return outputs


class _Cuts:
    """Which neurons a cut parameter has, found again by its storage after it was renamed for saving."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[int, torch.Tensor, bool]] = {}

    def add(self, model: nn.Module, layer: int, ffn: FFN, indices: torch.Tensor, width: int) -> None:
        inputs, output = ffn.modules(model)
        rows = torch.cat([indices, indices + width]) if ffn.fused else indices
        for module in inputs:
            for parameter in module.parameters(recurse=False):
                self.found[parameter.untyped_storage()._cdata] = layer, rows, False
        self.found[output.weight.untyped_storage()._cdata] = layer, indices, True

    def of(self, tensor: torch.Tensor) -> tuple[int, torch.Tensor, bool]:
        return self.found[tensor.untyped_storage()._cdata]


def _ffn_source(skeleton: Skeleton, ffn: FFN, parameter: torch.Tensor) -> str:
    source = skeleton.source(parameter)
    if source is None:
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__}: the weights of {ffn.path} are stored otherwise than the model has them, so "
            f"they cannot be cut from file to file. {IN_MEMORY}"
        )
    return source


def _sources(skeleton: Skeleton, saved: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return the stored tensor behind every saved one.

    Where transformers converts a tensor when it loads and back when it saves, both have the same name and shape.
    """
    sources = {}
    for name, tensor in saved.items():
        source = skeleton.source(tensor)
        if source is None and name in skeleton.stored and skeleton.stored[name].shape == tensor.shape:
            source = name
        if source is None:
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__}: {name} would be saved, but is not stored as it is. {IN_MEMORY}"
            )
        sources[name] = source
    return sources
