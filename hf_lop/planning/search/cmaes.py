"""CMA-ES over layer ratios, by the `cmaes` package."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from hf_lop.errors import InvalidInputError
from hf_lop.planning.budget import Floats
from hf_lop.planning.search.run import Search
from hf_lop.planning.search.space import SearchSpace


class CMAES(Search):
    """Covariance matrix adaptation: samples around a mean that moves towards the better half of each generation.

    First the starts are evaluated; the best becomes the initial mean. Samples are unconstrained vectors `[L]`; what is
    evaluated is the nearest candidate of the space, and the distribution learns from the sample that led to it.

    Args:
        space (`SearchSpace`): what may be proposed.
        starts (`Sequence[ArrayLike]`): see `Search`.
        seed (`int`): of the samples.
        sigma (`float`): initial standard deviation of every layer's ratio, above 0.

    Raises:
        InvalidInputError: If `sigma` is not positive.

    Source: Hansen, The CMA Evolution Strategy: A Tutorial (arXiv 1604.00772).
    """

    citation: ClassVar[str] = "Hansen: The CMA Evolution Strategy: A Tutorial (arXiv 1604.00772)"

    def __init__(
        self, space: SearchSpace, starts: Sequence[ArrayLike] = (), *, seed: int, sigma: float = 0.05
    ) -> None:
        super().__init__(space, starts, seed=seed)
        if not sigma > 0:
            raise InvalidInputError(f"sigma is {sigma}; it must be positive.")
        self.settings |= {"sigma": sigma}
        self.sigma = sigma
        self._scores: list[float] = []  # rewards of the starts
        self._generation: list[tuple[Floats, float]] = []

    def _propose(self) -> Floats:
        if len(self._scores) < len(self.starts):
            return self.starts[len(self._scores)]
        self._sample = self._optimizer.ask()
        return self.space.project(self._sample)

    def _learn(self, ratios: Floats, reward: float) -> None:
        if len(self._scores) < len(self.starts):
            self._scores.append(reward)
            if len(self._scores) == len(self.starts):
                self._begin()
            return
        self._generation.append((self._sample, -reward))
        if len(self._generation) == self._optimizer.population_size:
            self._optimizer.tell(self._generation)
            self._generation = []

    def _begin(self) -> None:
        # Imported here, because cmaes imports scipy where it is installed, which takes a second.
        from cmaes import CMA

        mean = self.starts[int(np.argmax(self._scores))]
        self._optimizer = CMA(mean, self.sigma, seed=int(self._rng.integers(2**32)))
