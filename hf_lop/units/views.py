"""Any plan on a model without cutting it: pieces are sorted once, then every width is a view.

With its pieces sorted by importance, a unit of width k is the first k rows of its input projections and the first k columns
of its output projection. Two things can be sorted: the user's weights, permuted in place and back, or a copy. This takes
the copy. It costs the memory of the units' weights once more (for the FFNs of Qwen2.5-VL-7B in bfloat16 11.4 of 16.6 GB),
and in return the user's model is only ever read: no exception or interrupt, at whatever moment, can leave a trace in it.
Weights that are sorted already, as those of an elastic repository are, need no copy.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.units.checks import DENSE_WIDTH, UNITS
from hf_lop.units.configs import text_configs, write_counts
from hf_lop.units.modeling_lop import set_counts
from hf_lop.units.slice import prunable_units
from hf_lop.units.unit import Slot, Unit, entries, is_prefix, note_size, set_ints


def shadow(model: nn.Module) -> Any:
    """Copy a model's modules but share its parameters, so that the copy can be changed and hooked at no risk.

    Args:
        model (`nn.Module`): any model; only read.

    Returns:
        `nn.Module`: of the same class, in evaluation mode, with the very same `Parameter` objects and its own buffers.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared).eval()


# (layer, width) -> its output projection [d, n], columns from the most important piece on.
OutputWeights = Callable[[int, int], torch.Tensor]


class _SortedTensor:
    """One tensor of a unit in a shadow model, sorted along the axis of the pieces."""

    def __init__(self, module: Any, name: str, slots: Sequence[Slot], order: torch.Tensor) -> None:
        if name not in module._parameters:
            raise UnsupportedModelError(
                f"A projection of type {type(module).__name__} computes its {name}, so no view can stand for it. "
                "Merge adapters and remove parametrizations first."
            )
        self.module, self.name, self.slots, self.axis = module, name, slots, slots[0].axis
        self.dense = module._parameters[name]
        self.order, self.size = order.cpu(), self.dense.shape[self.axis]
        # No prefix of a fused projection holds gate and up rows alike: it is gathered anew for every width instead.
        self.sorted = None
        if is_prefix(slots, self.size, len(order)):
            in_order = torch.equal(self.order, torch.arange(len(order)))
            self.sorted = self.dense.detach() if in_order else self._gather(len(order))

    def _gather(self, width: int) -> torch.Tensor:
        index = entries(self.slots, self.size, len(self.order), self.order[:width])
        gathered: torch.Tensor = self.dense.detach().index_select(self.axis, index.to(self.dense.device))
        return gathered

    def narrow(self, width: int) -> None:
        """Keep the first `width` pieces; all of them in their original order if that is the dense width."""
        if width == len(self.order):
            parameter = self.dense
        else:
            sorted_ = self.sorted
            kept = (
                self._gather(width) if sorted_ is None else sorted_.narrow(self.axis, 0, width * self.slots[0].block)
            )
            parameter = nn.Parameter(kept, requires_grad=False)
        self.module._parameters[self.name] = parameter
        note_size(self.module, self.name, self.axis, parameter.shape[self.axis])

    def replace(self, weight: torch.Tensor) -> None:
        """Take another output projection `[d, n]` of the current width."""
        stored = weight if self.axis == 1 else weight.T
        self.module._parameters[self.name] = nn.Parameter(stored, requires_grad=False)


class ElasticModel:
    """A model whose widths can be set at any time, in microseconds; the model it was made from is only read.

    Attributes:
        model: the model to run, in evaluation mode. It shares all parameters but the sorted ones with the original, so
            it must not be trained. Its own text config lists the current widths, as that of a pruned model does.
        units (`list[Unit]`): its L units with their dense counts.
        widths (`tuple[int, ...]`): `[L]` current widths, the dense ones at first. At its dense width a layer computes
            with the original weights, bit by bit.

    Example:
        ```python
        elastic = ElasticModel(model, order)
        elastic.set_widths([64, 48, 80, 96])
        logits = elastic.model(**batch).logits
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        order: Sequence[torch.Tensor],
        outputs: OutputWeights | None = None,
        units: Sequence[Unit] | None = None,
    ) -> None:
        """Sort the pieces of a dense model.

        The sorted weights take the memory of the units' weights once more, unless `order` says that they are sorted already:
        then every width is a view of the original. A fused gate-up projection is not sorted beforehand: `set_widths`
        gathers the rows it keeps, at most the same memory.

        Args:
            model (`nn.Module`): a dense model with the weights of its units in memory; its weights must not change while
                this is in use.
            order (`Sequence[torch.Tensor]`): pieces of each unit from most to least important, `[n] int64`.
            outputs (`Callable`, *optional*): given a layer and a width k below its dense one, its output projection
                `[d, k]` there; by default the dense one's columns. A recovery that depends on the width, and is computed
                whenever that is set.
            units (`Sequence[Unit]`, *optional*): what `prunable_units` returned for the model, where that was called already.

        Raises:
            UnsupportedModelError: if the model cannot be pruned (see [`prunable_units`]), or a weight is computed.
            InvalidInputError: if `order` is not one permutation per unit.
        """
        self.units: list[Unit] = prunable_units(model) if units is None else list(units)
        _check_order(self.units, order)
        self.model: Any = shadow(model)
        self._outputs = outputs
        self.widths = tuple(unit.count for unit in self.units)
        self._tensors: list[list[_SortedTensor]] = []
        for unit, indices in zip(self.units, order, strict=True):
            tensors = [
                _SortedTensor(self.model.get_submodule(path), name, slots, indices)
                for (path, name), slots in unit.tensors.items()
            ]
            self._tensors.append(tensors)
        self._fields = {DENSE_WIDTH, UNITS, *(field for unit in self.units for field, _ in unit.fields)}
        self._configs = [(config, dict(vars(config))) for config in text_configs(self.model)]

    def set_widths(self, widths: Sequence[int]) -> None:
        """Give every unit a width: its most important pieces stay.

        Args:
            widths (`Sequence[int]`): `[L]` widths.

        Raises:
            InvalidInputError: if there is not one per layer, each in [1, dense width]; then nothing changes.
        """
        chosen = tuple(int(width) for width in widths)
        if len(chosen) != len(self.units):
            raise InvalidInputError(
                f"{len(chosen)} widths were given for {len(self.units)} layers; give one per layer."
            )
        for layer, (unit, width) in enumerate(zip(self.units, chosen, strict=True)):
            if not 1 <= width <= unit.count:
                raise InvalidInputError(f"Layer {layer} cannot have width {width}; choose one in [1, {unit.count}].")
        previous, self.widths = self.widths, ()  # after an interrupt below, no layer counts as set
        for layer, (unit, width) in enumerate(zip(self.units, chosen, strict=True)):
            if not previous or previous[layer] != width:
                for tensor in self._tensors[layer]:
                    tensor.narrow(width)
                if self._outputs is not None and width < unit.count:
                    output = next(t for t in self._tensors[layer] if t.slots[0].output)
                    output.replace(self._outputs(layer, width))
                set_ints(self.model, unit, width)
        self._write_configs(chosen)
        self.widths = chosen

    def _write_configs(self, widths: Sequence[int]) -> None:
        """Let the text config list the widths, or be as it was where they are the dense ones."""
        cut = any(width != unit.count for width, unit in zip(widths, self.units, strict=True))
        for config, dense in self._configs:
            for name in self._fields:
                vars(config).pop(name, None)
                if name in dense:
                    vars(config)[name] = dense[name]
            if cut:
                write_counts(config, self.units, widths)

    def materialize(self) -> Any:
        """Copy the model at its current widths, cut for good.

        Returns:
            `nn.Module`: of the same class, device and dtype, in evaluation mode, with weights of its own.
        """
        self._write_configs([unit.count for unit in self.units])
        cut = copy.deepcopy(self.model)  # copies what a view shows, not what it is a view of
        self._write_configs(self.widths)
        for unit, tensors in zip(self.units, self._tensors, strict=True):
            for (path, name), tensor in zip(unit.tensors, tensors, strict=True):
                cut.get_submodule(path)._parameters[name].requires_grad_(tensor.dense.requires_grad)
        set_counts(cut, self.units, self.widths)
        return cut


def _check_order(units: Sequence[Unit], order: Sequence[torch.Tensor]) -> None:
    if len(order) != len(units):
        raise InvalidInputError(
            f"Neuron orders for {len(order)} layers were given; the model has {len(units)} layers."
        )
    for layer, (unit, indices) in enumerate(zip(units, order, strict=True)):
        if not torch.equal(torch.as_tensor(indices).cpu().long().sort().values, torch.arange(unit.count)):
            raise InvalidInputError(
                f"The neuron order of layer {layer} is no permutation of its {unit.count} neurons. "
                "Use neuron_order(...) on this model's importance scores."
            )
