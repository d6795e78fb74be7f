"""A plan: the width of every layer for a budget, and what that saves."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_lop.errors import InfeasibleBudgetError, InvalidInputError
from hf_lop.planning.blocks import AUTO, Blocks, halved, resolve, shown
from hf_lop.planning.budget import Budget, Floats, Widths, bisect_budget, infeasible, project
from hf_lop.planning.show import si
from hf_lop.units.size import ModelSize

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Plan:
    """The widths for a budget. Printing it shows a table; `plot` draws it.

    Attributes:
        widths (`tuple[int, ...]`): `[L]` neurons to keep in each decoder layer.
        dense (`ModelSize`): the model before pruning.
        seconds (`float`, *optional*): predicted time of all FFNs for one token, for latency budgets.
        device (`str`, *optional*): where that was measured.
        round_to (`tuple[int, ...]`): `[L]` what widths are multiples of, unless a layer keeps all that it has; empty where a plan was
            not made for a budget.
        notes (`tuple[str, ...]`): what there is to say about `round_to`.
    """

    widths: tuple[int, ...]
    dense: ModelSize
    seconds: float | None = None
    device: str | None = None
    round_to: Blocks = ()
    notes: tuple[str, ...] = ()

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

    @property
    def kept_whole(self) -> tuple[int, ...]:
        """Layers that keep a width which is no multiple of their block: all that they have."""
        return tuple(
            layer for layer, (k, block) in enumerate(zip(self.widths, self.round_to, strict=False)) if k % block
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "pruning_ratio": self.pruning_ratio,
            "round_to": shown(self.round_to) if self.round_to else None,
            "kept_whole": list(self.kept_whole),
            "notes": list(self.notes),
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
            "measured_on": self.device,
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
            lines.append(f"  FFN time    {self.seconds * 1e3:.2f} ms per token on {self.device or 'this device'}")
        if self.round_to:
            lines.append(f"  widths are multiples of {shown(self.round_to)}")
        if self.kept_whole:
            lines.append(f"  but for layers kept whole: {', '.join(map(str, self.kept_whole))}")
        lines += [f"  {note}" for note in self.notes]
        for layer, (kept, dense) in enumerate(zip(self.widths, self.dense.widths, strict=True)):
            bar = "█" * round(32 * kept / dense)
            lines.append(f"  layer {layer:>3}  {bar:<32} {kept:>6} of {dense} ({1 - kept / dense:.0%} removed)")
        return "\n".join(lines)


# Given a model size, measures seconds `[P]` of one unit for one token at widths `[P]`.
MeasureSeconds = Callable[[ModelSize], tuple[Widths, Floats]]


def plan_budget(
    predict: Callable[[float], Floats],
    size: ModelSize,
    budget: Budget,
    *,
    measure: MeasureSeconds | None = None,
    at_most: Sequence[int] | None = None,
    blocks: Blocks | None = None,
) -> Plan:
    """Plan the widths for a budget.

    A ratio fixes the number of kept neurons. Every other limit is met by bisection over that number: the predictor takes
    milliseconds, and a model with more neurons costs more.

    Args:
        predict: maps a target ratio to layer ratios `[L]`.
        size (`ModelSize`): the dense model.
        budget (`Budget`): limits, which all hold for the plan.
        measure (`Callable`, *optional*): measures latency; needed for a limit of that only.
        at_most (`Sequence[int]`, *optional*): `[L]` widths that are there, of a model that was cut before.
        blocks (`tuple[int, ...]`, *optional*): `[L]` what `round_to="auto"` is; chosen by the widths if not given.

    Returns:
        `Plan`: the largest that the budget allows. Where "auto" makes that impossible, blocks are halved, and a note says so.

    Raises:
        InvalidInputError: if a model that was cut before is within the ratio already.
        InfeasibleBudgetError: if the smallest possible model exceeds a limit; the message names it.
    """
    chosen, notes = resolve(budget.round_to, size.widths, blocks)
    first = chosen
    while True:
        try:
            found = _plan(predict, size, budget, chosen, measure, at_most)
        except InfeasibleBudgetError:
            smaller = halved(chosen) if budget.round_to == AUTO else None
            if smaller is None:
                raise
            chosen = smaller
            notes = (
                f"round_to is {shown(chosen)} instead of {shown(first)}, since the budget allows no larger blocks.",
            )
        else:
            if chosen != first:
                warnings.warn(notes[0], stacklevel=4)
            return replace(found, notes=notes)


def _plan(
    predict: Callable[[float], Floats],
    size: ModelSize,
    budget: Budget,
    blocks: Blocks,
    measure: MeasureSeconds | None,
    at_most: Sequence[int] | None,
) -> Plan:
    """Plan the widths for a budget in these blocks; see [`plan_budget`]."""
    neurons, step = sum(size.widths), min(blocks)
    highest, lowest = check_feasible(size, budget, blocks, at_most)
    seconds = None if budget.latency is None else _seconds(size, measure)
    costs = _costs(size) if seconds is None else {**_costs(size), "latency": seconds}
    limits = {kind: limit for kind, limit in budget.limits.items() if kind != "ratio"}

    def widths_for(kept: float) -> Widths:
        return project(predict(max(0.0, 1 - kept / neurons)), size.widths, kept, round_to=blocks, at_most=at_most)

    def shares(widths: Widths) -> dict[str, float]:
        return {kind: _share(costs[kind](_ints(widths)), limit) for kind, limit in limits.items()}

    if not limits:
        return Plan(_ints(widths_for(highest)), size, round_to=blocks)
    try:
        if len(limits) == 1:  # undivided, so that no rounding decides
            ((only, limit),) = limits.items()
            widths = bisect_budget(
                widths_for, lambda w: float(costs[only](_ints(w))), limit, lowest, highest, step=step
            )
        else:
            widths = bisect_budget(widths_for, lambda w: max(shares(w).values()), 1.0, lowest, highest, step=step)
    except InfeasibleBudgetError as error:
        taken = shares(widths_for(lowest))
        binding = max(taken, key=lambda kind: taken[kind])
        raise _below(size, binding, limits[binding], float(costs[binding](_ints(widths_for(lowest))))) from error
    taken_seconds = None if seconds is None else seconds(_ints(widths))
    return Plan(_ints(widths), size, taken_seconds, round_to=blocks)


def check_feasible(
    size: ModelSize, budget: Budget, blocks: Blocks | None = None, at_most: Sequence[int] | None = None
) -> tuple[int, int]:
    """Check that the smallest possible model is within a budget, but for latency, which is not measured here.

    Args:
        size (`ModelSize`): the dense model.
        budget (`Budget`): what it may cost.
        blocks (`tuple[int, ...]`, *optional*): `[L]` what widths are multiples of; what the budget says if not given, with "auto"
            as small as that may get.
        at_most (`Sequence[int]`, *optional*): see [`plan_budget`].

    Returns:
        `tuple[int, int]`: the most neurons that the ratio lets a plan keep, and the fewest of any plan.

    Raises:
        InfeasibleBudgetError: if it is not; the message names the limit.
    """
    neurons = sum(size.widths)
    if blocks is None:
        blocks = (1 if budget.round_to == AUTO else budget.round_to,) * len(size.widths)
    smallest = tuple(min(block, width) for block, width in zip(blocks, at_most or size.widths, strict=True))
    lowest, ratio = sum(smallest), budget.ratio or 0.0
    # Rounding keeps 1000 * (1 - 0.3) from losing a neuron to floating point.
    kept = math.floor(round(neurons * (1 - ratio), 6))
    if kept < lowest:
        highest = math.floor(1e4 * (1 - lowest / neurons)) / 1e4
        raise InfeasibleBudgetError(
            f"ratio is {ratio:g}, which keeps {kept} of {neurons} neurons; the smallest possible plan keeps {lowest}, "
            f"one block of {shown(blocks)} in every layer. Ask for a ratio of at most {highest:g}, or lower round_to."
        )
    if at_most is not None and sum(at_most) < kept:
        if budget.ratio is not None:
            raise InvalidInputError(
                f"ratio is {ratio:g}; it counts from the dense model, of which this one has lost {1 - sum(at_most) / neurons:.1%} "
                "already. Ask for more than that, or prune the dense model."
            )
        kept = sum(at_most)
    costs = _costs(size)
    exceeded = {
        kind: limit for kind, limit in budget.limits.items() if kind in costs and costs[kind](smallest) > limit
    }
    if exceeded:
        kind = max(exceeded, key=lambda kind: _share(costs[kind](smallest), exceeded[kind]))
        raise _below(size, kind, exceeded[kind], float(costs[kind](smallest)))
    return kept, lowest


def _seconds(size: ModelSize, measure: MeasureSeconds | None) -> Callable[[tuple[int, ...]], float]:
    """Measure the time of a unit per width once, then interpolate: seconds of all units for one token."""
    if measure is None:
        raise InvalidInputError("A latency budget needs a device to measure on. Plan with the pruner itself.")
    measured, each = measure(size)
    return lambda widths: float(np.interp(widths, measured, each).sum())


def _costs(size: ModelSize) -> dict[str, Callable[[tuple[int, ...]], float]]:
    return {"params": size.parameters_at, "memory": size.bytes_at, "flops": size.flops_at}


def _share(cost: float, limit: float) -> float:
    return cost / limit if limit else math.inf if cost else 0.0


def _below(size: ModelSize, kind: str, limit: float, least: float) -> InfeasibleBudgetError:
    counted = f" Counted at {size.num_bytes / size.parameters:.3g} bytes per parameter." if kind == "memory" else ""
    return InfeasibleBudgetError(f"{kind}: {infeasible(limit, least)}{counted}")


def _ints(widths: Widths) -> tuple[int, ...]:
    return tuple(widths.tolist())
