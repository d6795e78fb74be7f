"""The training set of the predictor: the best layer ratios for every target of a grid, and the pairs made of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from hf_lop.errors import InvalidInputError
from hf_lop.planning.budget import Floats
from hf_lop.planning.search.run import Reward, Search, evaluate, run_search
from hf_lop.planning.search.space import SearchSpace

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
    round_to: int | tuple[int, ...] = 1,
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
        round_to (`int` or `tuple[int, ...]`): block of neurons; see `SearchSpace`.
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


def training_pairs(table: Sequence[Mapping[str, Any]], layers: int) -> tuple[Floats, Floats]:
    """Turn a table into the predictor's training set: its rows, and 256 targets interpolated between them.

    A search gives some 25 rows, too few for the paper's 64 epochs of 40 pairs; neighbouring rows differ little, so the
    line between them is what the predictor should learn there. Removing nothing, ratio 0, is known without a row.

    Args:
        table (`Sequence[Mapping]`): rows `{"ratio": R, "ratios": [L floats]}`; further keys are ignored.
        layers (`int`): L.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: targets `[N] float64` and layer ratios `[N, L] float64`.

    Raises:
        InvalidInputError: if there is no row, or one does not fit the model.
    """
    if not isinstance(table, list | tuple) or not table:
        raise InvalidInputError("There is no table of (R, layer ratios) to train on. Pass one, or fit a pruner anew.")
    for index, row in enumerate(table):
        try:
            numbers = [row["ratio"], *row["ratios"]]
            fits = len(numbers) == 1 + layers and all(_is_fraction(n) for n in numbers)
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise InvalidInputError(
                f'Row {index} of the table is {str(row)[:500]}; it must be {{"ratio": R, "ratios": [{layers} numbers]}}, '
                "all of them fractions from 0 to 1."
            )
    rows = {0.0: [0.0] * layers} | {float(row["ratio"]): list(row["ratios"]) for row in table}
    known = np.array(sorted(rows))
    values = np.array([rows[target] for target in known.tolist()])
    targets = np.unique(np.concatenate([known, np.linspace(0.0, known[-1], 256)]))
    ratios = np.stack([np.interp(targets, known, column) for column in values.T], axis=1)
    return targets, ratios


def _is_fraction(value: Any) -> bool:
    return isinstance(value, Real) and bool(0 <= value <= 1)  # type: ignore[operator]


def look_up(table: Sequence[Mapping[str, Any]], ratio: float, layers: int) -> Floats:
    """Return the layer ratios `[L] float64` of a table for one target ratio, interpolated between its rows.

    Raises:
        InvalidInputError: see [`training_pairs`].
    """
    targets, ratios = (values.astype(np.float32) for values in training_pairs(table, layers))
    return np.array([np.interp(ratio, targets, column) for column in ratios.T])


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON list of `{"ratio": R, "ratios": [L floats]}` for [`~LOPPruner.train_predictor`].

    Raises:
        InvalidInputError: if the file cannot be read, or holds something else.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as JSON ({error}). Pass a JSON list of rows.") from error
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        raise InvalidInputError(f'{path} must hold a list of rows {{"ratio": R, "ratios": [one number per layer]}}.')
    return table
