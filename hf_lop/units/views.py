"""Any plan on a model without cutting it: neurons are sorted once, then every width is a view.

With its neurons sorted by importance, an FFN of width k is the first k rows of its input projections and the first k
columns of its output projection. Two things can be sorted: the user's weights, permuted in place and back, or a copy.
This takes the copy. It costs the memory of the FFN weights once more (for Qwen2.5-VL-7B in bfloat16 11.4 of 16.6 GB),
and in return the user's model is only ever read: no exception or interrupt, at whatever moment, can leave a trace in it.
Weights that are sorted already, as those of an elastic repository are, need no copy.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.units.find import prunable_ffns
from hf_lop.units.modeling_lop import DENSE_WIDTH, FFN, WIDTH, set_widths, text_configs, write_widths


def shadow(model: nn.Module) -> Any:
    """Copy a model's modules but share its parameters, so that the copy can be changed and hooked at no risk.

    Args:
        model (`nn.Module`): any model; only read.

    Returns:
        `nn.Module`: of the same class, in evaluation mode, with the very same `Parameter` objects and its own buffers.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared).eval()


# (layer, width) -> its output projection [d, width], columns from the most important neuron on.
Outputs = Callable[[int, int], torch.Tensor]


class _Projection:
    """One projection of a shadow model, with sorted copies of the tensors that have one entry per neuron."""

    def __init__(self, module: Any, order: torch.Tensor, *, rows: bool, fused: bool) -> None:
        self.module, self.fused, self.neurons = module, fused, len(order)
        conv1d = not hasattr(module, "in_features")
        self.attribute = ("nf" if rows else "nx") if conv1d else ("out_features" if rows else "in_features")
        dims = {"weight": 0 if rows != conv1d else 1}  # Conv1D stores [in, out], Linear [out, in]
        if rows and getattr(module, "bias", None) is not None:
            dims["bias"] = 0
        if not set(dims) <= set(module._parameters):
            raise UnsupportedModelError(
                f"A projection of type {type(module).__name__} computes its weight, so no view can stand for it. "
                "Merge adapters and remove parametrizations first."
            )
        self.dims = dims
        self.dense = {name: module._parameters[name] for name in dims}
        index = order.to(module.weight.device)
        # No prefix of a fused projection holds gate and up rows alike: it is gathered anew for every width instead.
        self.index = torch.stack([index, index + self.neurons]) if fused else index
        in_order = torch.equal(order.cpu(), torch.arange(len(order)))
        self.sorted = {
            name: self.dense[name].detach() if in_order else self.dense[name].detach().index_select(dim, index)
            for name, dim in dims.items()
            if not fused
        }

    def narrow(self, width: int) -> None:
        """Keep the first `width` neurons; all of them in their original order if that is the dense width."""
        for name, dim in self.dims.items():
            if width == self.neurons:
                tensor = self.dense[name]
            elif self.fused:
                tensor = self.dense[name].detach().index_select(dim, self.index[:, :width].flatten())
            else:
                tensor = self.sorted[name].narrow(dim, 0, width)
            self.module._parameters[name] = (
                tensor if tensor is self.dense[name] else nn.Parameter(tensor, requires_grad=False)
            )
        setattr(self.module, self.attribute, 2 * width if self.fused else width)

    def replace(self, weight: torch.Tensor) -> None:
        """Take another output projection `[d, k]` of the current width."""
        stored = weight if self.dims["weight"] else weight.T  # Conv1D
        self.module._parameters["weight"] = nn.Parameter(stored, requires_grad=False)


class ElasticModel:
    """A model whose FFN widths can be set at any time, in microseconds; the model it was made from is only read.

    Attributes:
        model: the model to run, in evaluation mode. It shares all parameters but the sorted ones with the original, so
            it must not be trained. Its own text config lists the current widths, as that of a pruned model does.
        ffns (`list[FFN]`): its L FFNs with their dense widths.
        widths (`tuple[int, ...]`): `[L]` current widths, the dense ones at first. At its dense width a layer computes
            with the original weights, bit by bit.

    Example:
        ```python
        elastic = ElasticModel(model, order)
        elastic.set_widths([64, 48, 80, 96])
        logits = elastic.model(**batch).logits
        ```
    """

    def __init__(self, model: nn.Module, order: Sequence[torch.Tensor], outputs: Outputs | None = None) -> None:
        """Sort the neurons of a dense model.

        The sorted weights take the memory of the FFN weights once more, unless `order` says that they are sorted already:
        then every width is a view of the original. A fused gate-up projection is not sorted beforehand: `set_widths`
        gathers the rows it keeps, at most the same memory.

        Args:
            model (`nn.Module`): a dense model with its FFN weights in memory; its weights must not change while this is
                in use.
            order (`Sequence[torch.Tensor]`): neurons of each layer from most to least important, `[n] int64`.
            outputs (`Callable`, *optional*): given a layer and a width k below its dense one, its output projection
                `[d, k]` there; by default the dense one's columns. A recovery that depends on the width, and is computed
                whenever that is set.

        Raises:
            UnsupportedModelError: if the model cannot be pruned (see [`prunable_ffns`]), or a weight is computed.
            InvalidInputError: if `order` is not one permutation per layer.
        """
        self.ffns: list[FFN] = prunable_ffns(model)
        _check_order(self.ffns, order)
        self.model: Any = shadow(model)
        self._outputs = outputs
        self.widths = tuple(ffn.width for ffn in self.ffns)
        self._projections: list[list[_Projection]] = []
        self._stored: list[tuple[nn.Module, list[str]]] = []
        for ffn, indices in zip(self.ffns, order, strict=True):
            inputs, output = ffn.modules(self.model)
            projections = [_Projection(module, indices, rows=True, fused=ffn.fused) for module in inputs]
            self._projections.append([*projections, _Projection(output, indices, rows=False, fused=False)])
            self._stored.append(_stored_widths(self.model, ffn))
        self._configs = [(config, dict(vars(config))) for config in text_configs(self.model)]

    def set_widths(self, widths: Sequence[int]) -> None:
        """Give every FFN a width: its most important neurons stay.

        Args:
            widths (`Sequence[int]`): `[L]` widths.

        Raises:
            InvalidInputError: if there is not one per layer, each in [1, dense width]; then nothing changes.
        """
        chosen = tuple(int(width) for width in widths)
        if len(chosen) != len(self.ffns):
            raise InvalidInputError(
                f"{len(chosen)} widths were given for {len(self.ffns)} layers; give one per layer."
            )
        for layer, (ffn, width) in enumerate(zip(self.ffns, chosen, strict=True)):
            if not 1 <= width <= ffn.width:
                raise InvalidInputError(f"Layer {layer} cannot have width {width}; choose one in [1, {ffn.width}].")
        previous, self.widths = self.widths, ()  # after an interrupt below, no layer counts as set
        for layer, width in enumerate(chosen):
            if not previous or previous[layer] != width:
                for projection in self._projections[layer]:
                    projection.narrow(width)
                if self._outputs is not None and width < self.ffns[layer].width:
                    self._projections[layer][-1].replace(self._outputs(layer, width))
                parent, names = self._stored[layer]
                for name in names:
                    setattr(parent, name, width)
        self._write_configs(chosen)
        self.widths = chosen

    def _write_configs(self, widths: Sequence[int]) -> None:
        """Let the text config list the widths, or be as it was where they are the dense ones."""
        cut = any(width != ffn.width for width, ffn in zip(widths, self.ffns, strict=True))
        for config, dense in self._configs:
            for name in (type(config).attribute_map.get(WIDTH, WIDTH), DENSE_WIDTH):
                vars(config).pop(name, None)
                if name in dense:
                    vars(config)[name] = dense[name]
            if cut:
                write_widths(config, list(widths))

    def materialize(self) -> Any:
        """Copy the model at its current widths, cut for good.

        Returns:
            `nn.Module`: of the same class, device and dtype, in evaluation mode, with weights of its own.
        """
        self._write_configs([ffn.width for ffn in self.ffns])
        cut = copy.deepcopy(self.model)  # copies what a view shows, not what it is a view of
        self._write_configs(self.widths)
        for ffn, projections in zip(self.ffns, self._projections, strict=True):
            inputs, output = ffn.modules(cut)
            for module, projection in zip([*inputs, output], projections, strict=True):
                for name, dense in projection.dense.items():
                    module._parameters[name].requires_grad_(dense.requires_grad)
        set_widths(cut, list(self.widths))
        return cut


def _check_order(ffns: Sequence[FFN], order: Sequence[torch.Tensor]) -> None:
    if len(order) != len(ffns):
        raise InvalidInputError(f"Neuron orders for {len(order)} layers were given; the model has {len(ffns)} layers.")
    for layer, (ffn, indices) in enumerate(zip(ffns, order, strict=True)):
        if not torch.equal(torch.as_tensor(indices).cpu().long().sort().values, torch.arange(ffn.width)):
            raise InvalidInputError(
                f"The neuron order of layer {layer} is no permutation of its {ffn.width} neurons. "
                "Use neuron_order(...) on this model's importance scores."
            )


def _stored_widths(model: nn.Module, ffn: FFN) -> tuple[nn.Module, list[str]]:
    """The FFN module and the names of attributes in which it keeps its width: some forward passes split by them."""
    parent = model.get_submodule(ffn.path)
    named = [name for name, value in vars(parent).items() if type(value) is int and value == ffn.width]
    return parent, [name for name in named if any(word in name for word in ("intermediate", "ff", "inner"))]
