"""One ask/tell interface for every search over layer ratios, and the loop that drives it.

Symbols: L = decoder layers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from hf_lop.errors import InvalidInputError
from hf_lop.planning.budget import Floats
from hf_lop.planning.search.space import SearchSpace

if TYPE_CHECKING:
    from hf_lop.planning.journal import Journal

Reward = Callable[[Floats], float]

_REPEATS = 1000  # a search that proposes this many known candidates in a row has nothing new to offer


class Search(ABC):
    """Proposes candidates of a `SearchSpace` and learns from their rewards (higher is better).

    `ask` and `tell` alternate. The same seed and the same rewards give the same proposals, on the same machine with the
    same versions; so a search is resumed by running it again and answering from a `Journal`.

    Args:
        space (`SearchSpace`): what may be proposed.
        starts (`Sequence[ArrayLike]`): layer ratios `[L]` float that are proposed first, most promising first; each is
            moved to the nearest candidate. The uniform plan when empty.
        seed (`int`): of all randomness, not negative.
    """

    citation: ClassVar[str]

    def __init__(self, space: SearchSpace, starts: Sequence[ArrayLike] = (), *, seed: int) -> None:
        self.space = space
        vectors = starts or [np.full(len(space.dense_widths), space.target)]
        self.starts = [space.ratios(key) for key in dict.fromkeys(space.widths(space.project(v)) for v in vectors)]
        self.settings: dict[str, Any] = {"search": type(self).__name__, "seed": seed}
        self._rng = np.random.default_rng(seed)
        self._asked: Floats | None = None

    @property
    def done(self) -> bool:
        """Whether the search has nothing left to propose."""
        return False

    def ask(self) -> Floats:
        """Propose a candidate, `[L] float64`; the same one again until its reward is told."""
        if self._asked is None:
            self._asked = self._propose()
        return self._asked.copy()

    def tell(self, ratios: Floats, reward: float) -> None:
        """Learn what the proposed candidate is worth.

        Args:
            ratios: What `ask` returned, `[L] float64`.
            reward: Its reward; higher is better.

        Raises:
            InvalidInputError: If nothing or something else was asked, or the reward is not finite.
        """
        if self._asked is None or self.space.widths(ratios) != self.space.widths(self._asked):
            raise InvalidInputError(f"{_name(ratios)} was told, but not asked last; call ask, evaluate, then tell.")
        _check_finite(ratios, reward)
        self._learn(self._asked, reward)
        self._asked = None

    @abstractmethod
    def _propose(self) -> Floats: ...

    @abstractmethod
    def _learn(self, ratios: Floats, reward: float) -> None: ...


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    Attributes:
        ratios (`tuple[float, ...]`): `[L]` layer ratios with the highest reward; the earliest of equals.
        reward (`float`): their reward.
        rewards (`tuple[float, ...]`): reward of every distinct candidate, in the order of evaluation.
    """

    ratios: tuple[float, ...]
    reward: float
    rewards: tuple[float, ...]

    @property
    def evaluations(self) -> int:
        """Number of distinct candidates evaluated, those answered by a journal included."""
        return len(self.rewards)

    @property
    def best_so_far(self) -> tuple[float, ...]:
        """Highest reward after each evaluation."""
        return tuple(np.maximum.accumulate(self.rewards).tolist())


def run_search(
    search: Search, reward: Reward, evaluations: int, *, journal: "Journal | None" = None, progress: bool = False
) -> SearchResult:
    """Run a search until so many distinct candidates are evaluated, or it has nothing left to propose.

    A candidate that is proposed again is told its reward again and costs nothing.

    Args:
        search (`Search`): a fresh search.
        reward (`Callable`): what layer ratios `[L] float64` are worth; higher is better.
        evaluations (`int`): number of distinct candidates.
        journal (`Journal`, *optional*): answers candidates it knows and records all others.
        progress (`bool`): show a progress bar on stderr.

    Returns:
        `SearchResult`: the evaluated candidate with the highest reward.

    Raises:
        InvalidInputError: If `evaluations` is not positive, or a reward is not finite.

    Source: LOP (arXiv 2506.12826), Eq. 6 and 32.
    """
    if evaluations < 1:
        raise InvalidInputError(f"evaluations is {evaluations}; a search needs at least one.")
    known: dict[tuple[int, ...], float] = {}
    repeats = 0
    title = f"searching at {search.space.target:g}"
    with tqdm(total=evaluations, desc=title, unit="candidate", disable=not progress) as bar:
        while len(known) < evaluations and not search.done and repeats < _REPEATS:
            ratios = search.ask()
            widths = search.space.widths(ratios)
            repeats += 1
            if widths not in known:
                known[widths] = evaluate(search.space, ratios, reward, journal)
                repeats = 0
                bar.update()
                bar.set_postfix(best=f"{max(known.values()):.4g}")
            search.tell(ratios, known[widths])
    best = max(known, key=lambda widths: known[widths])
    return SearchResult(tuple(search.space.ratios(best).tolist()), known[best], tuple(known.values()))


def evaluate(space: SearchSpace, ratios: Floats, reward: Reward, journal: "Journal | None" = None) -> float:
    """Return the reward of a candidate `[L] float64`: from the journal if it knows it, else measured and recorded.

    Raises:
        InvalidInputError: If the reward is not finite.

    Source: LOP (arXiv 2506.12826), Eq. 4 and 29.
    """
    widths = space.widths(ratios)
    value = None if journal is None else journal.get(widths)
    if value is None:
        value = float(reward(ratios.copy()))
        _check_finite(ratios, value)
        if journal is not None:
            journal.add(space.target, widths, value)
    return value


def _check_finite(ratios: Floats, reward: float) -> None:
    if not math.isfinite(reward):
        raise InvalidInputError(
            f"The reward of {_name(ratios)} is {reward}; it must be finite. Check the reward function on these ratios."
        )


def _name(ratios: Floats) -> str:
    return f"Candidate [{', '.join(f'{ratio:.4g}' for ratio in ratios)}]"
