"""Measuring what a model and the pieces of its units cost: parameters, bytes, FLOPs, and time on this device."""

import statistics
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from hf_lop.units.decoder import text_decoder
from hf_lop.units.size import ModelSize
from hf_lop.units.unit import Unit, linear_shape


def measure_size(model: nn.Module, units: Sequence[Unit]) -> ModelSize:
    """Measure the size of a dense model; works on the meta device too."""
    numbers, sizes, flops = [], [], []
    for unit in units:
        of_piece = [(getattr(model.get_submodule(path), name), slots) for (path, name), slots in unit.tensors.items()]
        counts = [
            tensor.numel() // tensor.shape[slots[0].axis] * sum(slot.block * slot.parts for slot in slots)
            for tensor, slots in of_piece
        ]
        numbers.append(sum(counts))
        sizes.append(sum(count * tensor.element_size() for count, (tensor, _) in zip(counts, of_piece, strict=True)))
        flops.append(sum(2 * count for count, (tensor, _) in zip(counts, of_piece, strict=True) if tensor.dim() > 1))
    parameters = list(model.parameters())  # each shared tensor once
    products: list[Any] = [m for m in text_decoder(model).modules() if linear_shape(m) is not None]
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and all(head is not module for module in products):
        products.append(head)
    first = units[0]
    hidden = getattr(model.get_submodule(first.output.module), first.output.tensor).shape[1 - first.output.axis]
    matrices = [slot for slot in first.slots if slot.tensor == "weight"]
    projections = sum(slot.parts for slot in matrices)
    usual = [2 * projections * hidden] * len(units)
    return ModelSize(
        widths=tuple(unit.count for unit in units),
        hidden_size=int(hidden),
        projections=projections,
        parameters=sum(p.numel() for p in parameters),
        num_bytes=sum(p.numel() * p.element_size() for p in parameters),
        flops=sum(2 * m.weight.numel() for m in products),
        neuron_parameters=tuple(numbers),
        neuron_bytes=tuple(sizes),
        block=first.block,
        piece_flops=None if flops == usual else tuple(flops),
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


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model; those of a projection by its features, as quantisers pack several into a number."""
    counts = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shape = linear_shape(module) if name == "weight" else None
                counts[id(parameter)] = shape[0] * shape[1] if shape else parameter.numel()
    return sum(counts.values())


def device_name(device: torch.device) -> str:
    """Return what a device is called, such as "cuda:0 (NVIDIA H200)"."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"
