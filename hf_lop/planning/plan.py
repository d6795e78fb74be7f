"""A plan: the width of every layer for one budget, and what that saves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_lop.errors import InfeasibleBudgetError, InvalidInputError
from hf_lop.planning.budget import Floats, Widths, bisect_budget, parse_bytes, positive_integer, project
from hf_lop.planning.show import si
from hf_lop.units.measure import ffn_seconds
from hf_lop.units.size import ModelSize

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Plan:
    """The widths for one budget. Printing it shows a table; `plot` draws it.

    Attributes:
        widths (`tuple[int, ...]`): `[L]` neurons to keep in each decoder layer.
        dense (`ModelSize`): the model before pruning.
        seconds (`float`, *optional*): predicted time of all FFNs for one token, for latency budgets.
    """

    widths: tuple[int, ...]
    dense: ModelSize
    seconds: float | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """Fraction of neurons removed in each layer, `[L]`."""
        return tuple(1 - k / n for k, n in zip(self.widths, self.dense.widths, strict=True))

    @property
    def pruning_ratio(self) -> float:
        """Fraction of all FFN neurons removed."""
        return self.neurons_removed / sum(self.dense.widths)

    @property
    def neurons_removed(self) -> int:
        """Number of FFN neurons removed."""
        return sum(self.dense.widths) - sum(self.widths)

    @property
    def parameters(self) -> int:
        """Parameters of the model after pruning."""
        return self.dense.parameters_at(self.widths)

    @property
    def parameters_removed(self) -> int:
        """Parameters removed."""
        return self.dense.parameters - self.parameters

    @property
    def memory_before(self) -> int:
        """Bytes of the dense model's parameters."""
        return self.dense.num_bytes

    @property
    def memory_after(self) -> int:
        """Bytes of the pruned model's parameters."""
        return self.dense.bytes_at(self.widths)

    @property
    def flops(self) -> int:
        """FLOPs of the text decoder for one token after pruning."""
        return self.dense.flops_at(self.widths)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "pruning_ratio": self.pruning_ratio,
            "widths": list(self.widths),
            "dense_widths": list(self.dense.widths),
            "ratios": list(self.ratios),
            "neurons_removed": self.neurons_removed,
            "parameters_before": self.dense.parameters,
            "parameters_after": self.parameters,
            "parameters_removed": self.parameters_removed,
            "memory_before": self.memory_before,
            "memory_after": self.memory_after,
            "flops_before": self.dense.flops,
            "flops_after": self.flops,
            "ffn_seconds_per_token": self.seconds,
        }

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw kept against dense neurons per layer; write a PNG if a path is given."""
        from hf_lop.planning.plots import plot_widths

        return plot_widths(list(self.widths), list(self.dense.widths), path)

    def __str__(self) -> str:
        share = self.parameters_removed / self.dense.parameters
        lines = [
            f"Plan: {self.pruning_ratio:.1%} of {sum(self.dense.widths):,} FFN neurons removed "
            f"({share:.1%} of all parameters)",
            f"  parameters  {si(self.dense.parameters)} -> {si(self.parameters)}",
            f"  memory      {si(self.memory_before, 'B')} -> {si(self.memory_after, 'B')} "
            f"({self.dense.num_bytes / self.dense.parameters:.3g} bytes per parameter)",
            f"  FLOPs/token {si(self.dense.flops)} -> {si(self.flops)}",
        ]
        if self.seconds is not None:
            lines.append(f"  FFN time    {self.seconds * 1e3:.2f} ms per token on this device")
        for layer, (kept, dense) in enumerate(zip(self.widths, self.dense.widths, strict=True)):
            bar = "█" * round(32 * kept / dense)
            lines.append(f"  layer {layer:>3}  {bar:<32} {kept:>6} of {dense} ({1 - kept / dense:.0%} removed)")
        return "\n".join(lines)


def plan_budget(
    predict: Callable[[float], Floats],
    size: ModelSize,
    budgets: dict[str, float | str | None],
    *,
    round_to: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Plan:
    """Plan for one of several kinds of budget.

    A ratio fixes the number of kept neurons. Every other budget is met by bisection over that number: the predictor takes
    milliseconds, and a model with more neurons costs more.

    Args:
        predict: maps a target ratio to layer ratios `[L]`.
        size (`ModelSize`): the dense model.
        budgets (`dict`): exactly one of ratio, params, memory, flops, latency that is not None.
        round_to (`int`): widths are multiples of this.
        device (`torch.device`): where latency is measured.
        dtype (`torch.dtype`): in which latency is measured.

    Returns:
        `Plan`: the largest that the budget allows.

    Raises:
        InvalidInputError: if not exactly one budget is given, or its value is out of range.
        InfeasibleBudgetError: if the smallest possible model exceeds the budget.
    """
    kind, number = read_budget(budgets)
    block = positive_integer("round_to", round_to)
    neurons, lowest = sum(size.widths), sum(min(block, width) for width in size.widths)

    def widths_for(kept: float) -> Widths:
        return project(predict(max(0.0, 1 - kept / neurons)), size.widths, kept, round_to=block)

    if kind == "ratio":
        # Rounding keeps 1000 * (1 - 0.3) from losing a neuron to floating point.
        kept = math.floor(round(neurons * (1 - number), 6))
        if kept < lowest:
            highest = math.floor(1e4 * (1 - lowest / neurons)) / 1e4
            raise InfeasibleBudgetError(
                f"ratio is {number:g}, which keeps {kept} of {neurons} neurons; the smallest possible plan keeps {lowest}, "
                f"one block of {block} in every layer. Ask for a ratio of at most {highest:g}, or lower round_to."
            )
        return Plan(_ints(widths_for(kept)), size)
    seconds = _latency(size, device, dtype) if kind == "latency" else None
    costs = {"params": size.parameters_at, "memory": size.bytes_at, "flops": size.flops_at, "latency": seconds}
    cost = costs[kind]
    if cost is None or not callable(cost):
        raise InvalidInputError(f"{kind!r} is no budget; use one of {', '.join(budgets)}.")
    try:
        widths = bisect_budget(widths_for, lambda w: float(cost(_ints(w))), number, lowest, neurons, step=block)
    except InfeasibleBudgetError as error:
        counted = (
            f" Counted at {size.num_bytes / size.parameters:.3g} bytes per parameter." if kind == "memory" else ""
        )
        raise InfeasibleBudgetError(f"{kind}: {error}{counted}") from error
    return Plan(_ints(widths), size, seconds(_ints(widths)) if seconds else None)


def _ints(widths: Widths) -> tuple[int, ...]:
    return tuple(widths.tolist())


def read_budget(budgets: Mapping[str, float | str | None]) -> tuple[str, float]:
    """Return the one budget that is given, its kind and its number.

    Args:
        budgets (`Mapping`): values of ratio, params, memory, flops, latency; all but one None.

    Raises:
        InvalidInputError: if not exactly one is given, or its value is out of range.
    """
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise InvalidInputError(
            f"{len(given)} budgets were given ({', '.join(given) or 'none'}); give exactly one of {', '.join(budgets)}."
        )
    ((kind, value),) = given.items()
    return kind, _number(kind, value)


def _number(kind: str, value: float | str) -> float:
    """Read one budget and check its range."""
    if kind == "memory":
        return parse_bytes(value)
    if isinstance(value, bool | str) or not isinstance(value, int | float | np.number):
        raise InvalidInputError(f"{kind} is {value!r}; it must be a number.")
    number = float(value)
    if kind == "ratio" and not 0 <= number < 1:
        raise InvalidInputError(f"ratio is {value}; it must be in [0, 1): the fraction of FFN neurons to remove.")
    if not (math.isfinite(number) and number >= 0):
        raise InvalidInputError(f"{kind} is {value}; it must be a finite number, not negative.")
    return number


def _latency(size: ModelSize, device: torch.device, dtype: torch.dtype) -> Callable[[tuple[int, ...]], float]:
    """Measure FFN time per width once, then interpolate: seconds of all FFNs for one token."""
    measured, seconds = ffn_seconds(size, device=device, dtype=dtype)
    return lambda widths: float(np.interp(widths, measured, seconds).sum())
