"""What a model and each of its FFN neurons cost: parameters, bytes, FLOPs, and time on this device."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from hf_lop.units.modeling_lop import FFN, linear_shape, text_decoder


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The size of a dense model, and by how much it shrinks with every neuron.

    L is the number of decoder layers.

    Attributes:
        widths (`tuple[int, ...]`): `[L]` neurons of each FFN.
        hidden_size (`int`): features that enter and leave an FFN.
        projections (`int`): matrices of an FFN, 3 if gated, else 2.
        parameters (`int`): of the whole model, vision tower included; tied ones count once.
        num_bytes (`int`): of all parameters in their dtypes.
        flops (`int`): multiply and add operations of all matrix products of the text decoder and the vocabulary
            projection for one token; attention over earlier tokens is not in it.
        neuron_parameters (`tuple[int, ...]`): `[L]` parameters of one neuron.
        neuron_bytes (`tuple[int, ...]`): `[L]` bytes of one neuron.
    """

    widths: tuple[int, ...]
    hidden_size: int
    projections: int
    parameters: int
    num_bytes: int
    flops: int
    neuron_parameters: tuple[int, ...]
    neuron_bytes: tuple[int, ...]

    def parameters_at(self, widths: Sequence[int]) -> int:
        """Return the number of parameters with the given widths `[L]`."""
        return self.parameters - self._removed(widths, self.neuron_parameters)

    def bytes_at(self, widths: Sequence[int]) -> int:
        """Return the bytes of all parameters with the given widths `[L]`."""
        return self.num_bytes - self._removed(widths, self.neuron_bytes)

    def flops_at(self, widths: Sequence[int]) -> int:
        """Return the FLOPs per token with the given widths `[L]`."""
        return self.flops - self._removed(widths, [2 * self.projections * self.hidden_size] * len(self.widths))

    def _removed(self, widths: Sequence[int], cost: Sequence[int]) -> int:
        return sum((n - int(k)) * c for n, k, c in zip(self.widths, widths, cost, strict=True))


def measure_size(model: nn.Module, ffns: Sequence[FFN]) -> ModelSize:
    """Measure the size of a dense model; works on the meta device too."""
    neuron_parameters, neuron_bytes = [], []
    for ffn in ffns:
        inputs, output = ffn.modules(model)
        numel = sum(p.numel() for m in inputs for p in m.parameters(recurse=False)) + output.weight.numel()
        neuron_parameters.append(numel // ffn.width)
        neuron_bytes.append(numel // ffn.width * output.weight.element_size())
    parameters = list(model.parameters())  # each shared tensor once
    products: list[Any] = [m for m in text_decoder(model).modules() if linear_shape(m) is not None]
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and all(head is not module for module in products):
        products.append(head)
    inputs, output = ffns[0].modules(model)
    shape = linear_shape(output)
    return ModelSize(
        widths=tuple(ffn.width for ffn in ffns),
        hidden_size=shape[1] if shape else 0,
        projections=1 + (2 if ffns[0].fused else len(inputs)),
        parameters=sum(p.numel() for p in parameters),
        num_bytes=sum(p.numel() * p.element_size() for p in parameters),
        flops=sum(2 * m.weight.numel() for m in products),
        neuron_parameters=tuple(neuron_parameters),
        neuron_bytes=tuple(neuron_bytes),
    )


def ffn_seconds(
    size: ModelSize, *, device: torch.device, dtype: torch.dtype, points: int = 9, repeats: int = 7
) -> tuple[np.ndarray, np.ndarray]:
    """Measure how long one FFN takes for one token at several widths on a device.

    Args:
        size (`ModelSize`): shape of the FFNs; the widest is measured.
        device (`torch.device`): where to measure.
        dtype (`torch.dtype`): of weights and activations.
        points (`int`): widths to measure, evenly spaced up to the dense one.
        repeats (`int`): runs per width; the median counts.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: widths `[points] int64` and seconds `[points] float64`, made non-decreasing.
    """
    dense = max(size.widths)
    widths = np.unique(np.linspace(1, dense, points).round().astype(np.int64))
    rows = [torch.zeros(dense, size.hidden_size, device=device, dtype=dtype) for _ in range(size.projections - 1)]
    columns = torch.zeros(size.hidden_size, dense, device=device, dtype=dtype)
    x = torch.zeros(1, size.hidden_size, device=device, dtype=dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    with torch.inference_mode():
        for width in widths:
            gate, *rest = [row[:width] for row in rows]
            down = columns[:, :width].contiguous()
            runs = []
            for _ in range(repeats + 1):
                wait()
                start = time.perf_counter()
                hidden = nn.functional.silu(x @ gate.T)
                for up in rest:
                    hidden = hidden * (x @ up.T)
                _ = hidden @ down.T
                wait()
                runs.append(time.perf_counter() - start)
            seconds.append(statistics.median(runs[1:]))  # the first run warms up
    return widths, np.maximum.accumulate(np.array(seconds))
