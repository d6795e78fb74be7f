"""Budgets: limits that hold at once; from layer ratios to exact widths, and from any limit to a number of kept neurons.

Symbols: L = decoder layers, n_l = dense width of layer l (neurons), k_l = its kept neurons, r_l = its pruning ratio.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_lop.errors import InfeasibleBudgetError, InvalidInputError
from hf_lop.planning.blocks import AUTO, read_round_to

Widths = NDArray[np.int64]
Floats = NDArray[np.float64]

_UNITS = {"": 1, "B": 1} | {
    unit: base**power
    for power, letter in enumerate("KMGT", start=1)
    for unit, base in ((f"{letter}B", 1000), (f"{letter}IB", 1024))
}


@dataclass(frozen=True, slots=True)
class Budget:
    """What a pruned model may cost: upper limits that all hold, and the conditions under which they are counted.

    Attributes:
        ratio (`float`, *optional*): fraction of all pieces to remove, in [0, 1).
        params (`float`, *optional*): parameters the whole model may have.
        memory (`float`, *optional*): bytes its parameters may take.
        flops (`float`, *optional*): FLOPs its text decoder may need per token.
        latency (`float`, *optional*): seconds all its units may take for one token.
        round_to (`int` or `str`): widths are multiples of this; "auto" is chosen for every layer, see `hf_lop.planning.blocks`.
    """

    ratio: float | None = None
    params: float | None = None
    memory: float | None = None
    flops: float | None = None
    latency: float | None = None
    round_to: int | Literal["auto"] = AUTO

    @classmethod
    def of(
        cls,
        ratio: float | None = None,
        *,
        params: float | None = None,
        memory: float | str | None = None,
        flops: float | None = None,
        latency: float | None = None,
        round_to: int | Literal["auto"] = AUTO,
    ) -> "Budget":
        """Read and check a budget; memory may be a string such as "6GB".

        Raises:
            InvalidInputError: if no limit is given, or a value is out of its range.
        """
        given = {"ratio": ratio, "params": params, "memory": memory, "flops": flops, "latency": latency}
        limits = {kind: _limit(kind, value) for kind, value in given.items() if value is not None}
        if not limits:
            raise InvalidInputError(
                f"No budget was given; give at least one of {', '.join(LIMITS)}. Of several, all hold at once."
            )
        return cls(**limits, round_to=read_round_to(round_to))

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are given, by name."""
        return {kind: value for kind in LIMITS if (value := getattr(self, kind)) is not None}


LIMITS = ("ratio", "params", "memory", "flops", "latency")


def _limit(kind: str, value: float | str) -> float:
    """Read one limit and check its range."""
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


def project(
    ratios: ArrayLike,
    dense_widths: Sequence[int] | Widths,
    budget: float,
    *,
    round_to: int | Sequence[int] = 1,
    costs: ArrayLike | None = None,
    at_most: Sequence[int] | Widths | None = None,
) -> Widths:
    """Turn layer ratios into widths that meet a budget.

    All keep-fractions 1 - r_l are shifted by one common offset, each clipped to [one block, what is there], until the plan
    costs exactly `budget`; then widths are rounded down to blocks and the remainder is handed out, largest rounding
    loss first (ties: lower layer first). The result never exceeds the budget and falls short of it by less than the
    dearest block of any layer (so by nothing when neurons are single and cost the same). Among layers of equal dense
    width and cost, a higher ratio never keeps more neurons.

    Args:
        ratios: Layer ratios `[L]` float, each in [0, 1]; their mean need not match the budget.
        dense_widths: Dense widths `[L]` int, in neurons.
        budget: What the widths may cost, sum(costs_l * k_l); without `costs`, the number of kept neurons. The cost of
            the dense model or more gives the dense widths.
        round_to: Widths are multiples of it, except that a layer may keep its full dense width; one integer, or `[L]`.
        costs: Cost of one neuron per layer, `[L]` float, positive (parameters, bytes, FLOPs ...); 1 when omitted.
        at_most: Widths that are there, `[L]` int, of a model that was cut before; the dense ones when omitted. A layer may
            keep all that it has, whatever `round_to`.

    Returns:
        Widths `[L]` int64, each between min(round_to, m_l) and m_l, the width that is there.

    Raises:
        InvalidInputError: If shapes differ, or a value is outside its domain.
        InfeasibleBudgetError: If one block per layer costs more than `budget`.
    """
    dense = _dense(dense_widths)
    keep = 1 - _vector("ratios", ratios, dense.size)
    price = np.ones(dense.size) if costs is None else _vector("costs", costs, dense.size)
    if keep.min() < 0 or keep.max() > 1:
        raise InvalidInputError(f"ratios span {1 - keep.max():g} to {1 - keep.min():g}; each must lie in [0, 1].")
    if price.min() <= 0:
        raise InvalidInputError(f"costs contain {price.min():g}; the cost of a neuron must be positive.")
    given = list(round_to) if isinstance(round_to, Sequence | np.ndarray) else [round_to] * dense.size
    block = _dense([positive_integer("round_to", own) for own in given])
    if block.shape != dense.shape:
        raise InvalidInputError(
            f"round_to has {block.size} entries; pass one integer, or {dense.size}, one per layer."
        )
    if math.isnan(budget):
        raise InvalidInputError("budget is NaN; pass the number of neurons (or the cost) to keep.")
    most = dense if at_most is None else np.minimum(_dense(at_most), dense)
    lowest = np.minimum(block, most)
    if budget >= price @ most:
        return most
    if budget < price @ lowest:
        raise infeasible(budget, float(price @ lowest))
    # Real widths n_l clip(1 - r_l + t, floor, m_l / n_l) that cost the budget exactly, then rounded down to blocks.
    wanted = water_fill(keep, lowest / dense, price * dense, float(budget), most / dense) * dense
    widths = np.maximum(wanted.astype(np.int64) // block * block, lowest)
    widths = np.where(wanted >= most, most, widths)
    remaining = float(budget - price @ widths)
    steps = np.minimum(block, most - widths)
    # Rounded, because the last bits of `wanted` differ between machines and must not decide between equal losses.
    for layer in np.argsort(np.round(widths - wanted, 9), kind="stable").tolist():
        if price[layer] * steps[layer] <= remaining:
            widths[layer] += steps[layer]
            remaining -= float(price[layer] * steps[layer])
    return widths


def bisect_budget(
    plan_for: Callable[[int], Widths],
    cost: Callable[[Widths], float],
    budget: float,
    lowest: int,
    highest: int,
    *,
    step: int = 1,
) -> Widths:
    """Find the largest plan that a budget allows, for any cost that grows with the number of kept neurons.

    Bisects the number of kept neurons; because a plan for more neurons may cost a little less (layers differ,
    latencies come in tiles), it then looks at a few larger numbers and keeps the dearest plan within the budget.

    Args:
        plan_for: Widths `[L]` int64 for a number of kept neurons, e.g. predictor and `project`.
        cost: What widths cost, in the unit of `budget` (parameters, bytes, FLOPs, seconds ...).
        budget: The largest allowed cost.
        lowest: Fewest kept neurons to consider (one block per layer).
        highest: Most kept neurons to consider (the dense model).
        step: Distance of the numbers tried, in neurons; `round_to` is fine enough.

    Returns:
        Widths `[L]` int64 whose cost is at most `budget`.

    Raises:
        InvalidInputError: If `lowest` exceeds `highest`, `step` is not positive or `budget` is NaN.
        InfeasibleBudgetError: If even the plan for `lowest` costs more than `budget`.
    """
    if lowest > highest:
        raise InvalidInputError(f"lowest is {lowest} and highest {highest}; lowest must not exceed highest.")
    if math.isnan(budget):
        raise InvalidInputError("budget is NaN; pass a number in the unit of the cost.")
    stride = positive_integer("step", step)
    best = plan_for(highest)
    if cost(best) <= budget:
        return best
    best = plan_for(lowest)
    best_cost = cost(best)
    if not best_cost <= budget:
        raise infeasible(budget, best_cost)
    top = math.ceil((highest - lowest) / stride)
    fits, exceeds = 0, top  # invariant: cost(fits) <= budget < cost(exceeds)
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        widths = plan_for(lowest + middle * stride)
        if (price := cost(widths)) <= budget:
            fits, best, best_cost = middle, widths, price
        else:
            exceeds = middle
    for beyond in range(exceeds + 1, min(exceeds + 5, top)):
        widths = plan_for(lowest + beyond * stride)
        if best_cost < (price := cost(widths)) <= budget:
            best, best_cost = widths, price
    return best


def parse_bytes(size: str | float) -> int:
    """Read a size such as "6GB", "5.5 GiB" or 6e9.

    Args:
        size: A number of bytes, or text: a number and B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers
            of 1024); case does not matter.

    Returns:
        Whole bytes, rounded to the nearest.

    Raises:
        InvalidInputError: If `size` is not a size, or is negative or not finite.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:e\+?\d+)?|\.\d+)\s*((?:[KMGT]i?)?B)?\s*", str(size), re.IGNORECASE)
    value = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else math.nan
    if not math.isfinite(value):
        raise InvalidInputError(f"{size!r} is not a size in bytes; write for example 6GB, 5.5GiB or 6000000000.")
    return round(value)


def water_fill(keep: Floats, floor: Floats, weights: Floats, budget: float, top: Floats | float = 1.0) -> Floats:
    """Return clip(keep + t, floor, top) for the offset t at which the weighted sum equals `budget`."""
    # S(t) = sum_l w_l clip(k_l + t, f_l, m_l) = budget. S never falls, so there is one level of water.
    # The sum is piecewise linear in t, with kinks where a layer meets a bound: interpolation between kinks is exact.
    kinks = np.sort(np.concatenate([floor - keep, top - keep]))
    sums = np.clip(keep + kinks[:, None], floor, top) @ weights
    shifted: Floats = np.clip(keep + np.interp(budget, sums, kinks), floor, top)
    return shifted


def infeasible(budget: float, least: float) -> InfeasibleBudgetError:
    """Return the error of a budget below the least possible cost."""
    return InfeasibleBudgetError(
        f"A budget of {budget:.10g} is below the smallest possible plan, {least:.10g} (one block of round_to neurons "
        "in every layer). Ask for at least that, or lower round_to."
    )


def _dense(dense_widths: Sequence[int] | Widths) -> Widths:
    dense = np.asarray(dense_widths)
    if dense.ndim != 1 or not dense.size or dense.dtype.kind not in "iu" or dense.min() < 1:
        raise InvalidInputError(f"dense_widths is {dense_widths!r}; pass one positive integer per layer.")
    return dense.astype(np.int64)


def _vector(name: str, values: ArrayLike, size: int) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise InvalidInputError(f"{name} has shape {vector.shape}; pass {size} finite numbers, one per layer.")
    return vector


def positive_integer(name: str, value: int) -> int:
    """Return an integer argument, or refuse what is none or below 1.

    Raises:
        InvalidInputError: If it is no positive integer.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise InvalidInputError(f"{name} is {value!r}; it must be a positive integer.")
    return number
