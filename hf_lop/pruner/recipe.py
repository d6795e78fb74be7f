"""What a fit is asked for, checked before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hf_lop.errors import InvalidInputError
from hf_lop.learning.importance import CRITERIA
from hf_lop.learning.predictors import check_predictor
from hf_lop.learning.rewards import Judge, reward_name
from hf_lop.learning.sketch import check_rows
from hf_lop.planning.blocks import AUTO, read_round_to
from hf_lop.planning.budget import positive_integer
from hf_lop.planning.search.cmaes import CMAES
from hf_lop.planning.search.mcts import MCTS
from hf_lop.planning.table import target_grid

ENGINES = {"mcts": MCTS, "cmaes": CMAES}
SEARCHES = ("additive", *ENGINES)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make a pruner; see [`~LOPPruner.fit`] for all of these.

    Raises:
        InvalidInputError: if one is unknown or out of its range.
    """

    criterion: str
    search: str
    reward: str | Judge
    targets: Sequence[float]
    evaluations: int
    predictor: str
    sketch_rows: int
    recover: str | None
    seed: int
    round_to: int | Literal["auto"] = AUTO

    def __post_init__(self) -> None:
        check_predictor(self.predictor)
        check_rows(self.sketch_rows)
        for name, value, known in (("search", self.search, SEARCHES), ("criterion", self.criterion, CRITERIA)):
            if value not in known:
                raise InvalidInputError(f"{name} is {value!r}; choose one of {', '.join(known)}.")
        reward = reward_name(self.reward)
        if reward != "divergence" and self.search == "additive":
            raise InvalidInputError(
                f'reward is {reward}, which search="additive" never looks at: its plans come from the divergence of '
                'single-layer probes. Use search="mcts" or "cmaes", or leave the reward out.'
            )
        if self.recover not in (None, "sketch"):
            raise InvalidInputError(f'recover is {self.recover!r}; candidates can be judged after "sketch" or None.')
        if self.recover and not self.sketch_rows:
            raise InvalidInputError('recover="sketch" needs a sketch, and sketch_rows is 0. Leave one of the two out.')
        positive_integer("evaluations", self.evaluations)
        read_round_to(self.round_to)
        if not len(self.targets) or not all(0 <= target < 1 for target in self.targets):
            raise InvalidInputError(f"targets is {list(self.targets)}; pass at least one target ratio in [0, 1).")


def usual_targets(search: str) -> tuple[float, ...]:
    """Return the targets of a search; additive plans cost nothing, so they are finer."""
    return target_grid(0.0, 0.9, 0.0125) if search == "additive" else target_grid()
