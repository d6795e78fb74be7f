"""The training set of the predictor: the best layer ratios for every target of a grid."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from hf_lop.errors import InvalidInputError
from hf_lop.planning.search import Reward, Search, evaluate, run_search
from hf_lop.planning.space import SearchSpace

if TYPE_CHECKING:
    from hf_lop.planning.journal import Journal

MakeSearch = Callable[[SearchSpace, Sequence[ArrayLike]], Search]


def target_grid(low: float = 0.1, high: float = 0.7, step: float = 0.025) -> tuple[float, ...]:
    """Return targets from `low` to `high`, both included where `step` divides their distance.

    Raises:
        InvalidInputError: If the three are not 0 <= low <= high < 1 and step > 0.

    Source: LOP (arXiv 2506.12826), section 4.2: a ratio step of 0.025.
    """
    if not (0 <= low <= high < 1 and step > 0):
        raise InvalidInputError(
            f"A grid from {low} to {high} by {step} is empty; pass 0 <= low <= high < 1, step > 0."
        )
    count = int((high - low) / step + 1e-9) + 1
    return tuple(round(low + step * index, 9) for index in range(count))


def learn_table(
    make_search: MakeSearch,
    reward: Reward,
    dense_widths: Sequence[int] | NDArray[np.int64],
    targets: Sequence[float],
    *,
    starts: Callable[[float], Sequence[ArrayLike]] | None = None,
    evaluations: int = 200,
    max_ratio: float = 0.95,
    round_to: int = 1,
    journal: "Journal | None" = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Search every target, from the lowest to the highest, and let neighbours seed each other.

    The search of a target starts from the best ratios of the target below it, moved to the new target, then from
    `starts`, then from the uniform plan. Afterwards, from the highest target down, each target also tries the best
    ratios of the one above it: one more evaluation each.

    Args:
        make_search (`Callable`): makes a search from a space and its starts, e.g. `partial(MCTS, seed=0)`.
        reward (`Callable`): what layer ratios `[L] float64` are worth; higher is better.
        dense_widths: Dense widths `[L]` int, in neurons.
        targets: Target ratios, each in [0, 1).
        starts (`Callable`, *optional*): layer ratios `[L]` to start from at a target, e.g. its additive plan.
        evaluations (`int`): distinct candidates per target.
        max_ratio (`float`): highest ratio of any layer; see `SearchSpace`.
        round_to (`int`): block of neurons; see `SearchSpace`.
        journal (`Journal`, *optional*): with it, a killed call resumes to the same table when called again.
        progress (`bool`): show progress bars on stderr.

    Returns:
        Rows `{"ratio": target, "ratios": [L floats], "reward": float}` by rising target.

    Raises:
        InvalidInputError: If there is no target, a value is outside its domain, or a reward is not finite.
        InfeasibleBudgetError: If a target cannot be met.

    Source: LOP (arXiv 2506.12826), section 4.2: pairs (R, r*), the training set of the predictor.
    """
    widths = tuple(np.asarray(dense_widths).tolist())
    # All spaces are made first: a target out of reach is refused before hours of search.
    spaces = [SearchSpace(widths, float(target), max_ratio, round_to) for target in sorted(set(targets))]
    if not spaces:
        raise InvalidInputError("targets is empty; pass at least one target ratio in [0, 1).")
    rows: list[dict[str, Any]] = []
    for space in tqdm(spaces, desc="targets", unit="target", disable=not progress):
        first: list[ArrayLike] = [row["ratios"] for row in rows[-1:]]
        given = starts(space.target) if starts else ()
        search = make_search(space, [*first, *given, np.full(len(widths), space.target)])
        found = run_search(search, reward, evaluations, journal=journal, progress=progress)
        rows.append({"ratio": space.target, "ratios": list(found.ratios), "reward": found.reward})
    for index in reversed(range(len(rows) - 1)):
        candidate = spaces[index].project(rows[index + 1]["ratios"])
        value = evaluate(spaces[index], candidate, reward, journal)
        if value > rows[index]["reward"]:
            rows[index] |= {"ratios": candidate.tolist(), "reward": value}
    return rows
