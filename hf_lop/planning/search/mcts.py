"""The paper's Monte Carlo tree search over layer ratios.

Symbols: s = a state (complete layer ratios `[L]`), a = an edge to a child, N(s, a) = its visits, W(s, a) = the sum of the
rewards backed up through it, Q = W / N, d = depth of a state below the root, delta_d = size of the perturbation there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from hf_lop.errors import InvalidInputError
from hf_lop.planning.budget import Floats
from hf_lop.planning.search.run import Search
from hf_lop.planning.search.space import SearchSpace


@dataclass(slots=True)
class Node:
    """A state of the tree, with the statistics of the edge that leads to it.

    Attributes:
        ratios (`Floats`): the state, `[L] float64`: a candidate of the search space.
        depth (`int`): edges between it and the root.
        visits (`int`): N(s, a) of its edge, and so N(s) of the state; for the root the number of simulations.
        total (`float`): W(s, a) of its edge.
        children (`list[Node]`): in the order of their expansion.
    """

    ratios: Floats
    depth: int = 0
    visits: int = 0
    total: float = 0.0
    children: list["Node"] = field(default_factory=list)


class MCTS(Search):
    """Tree search whose states are complete layer ratios and whose edges are random perturbations of all layers.

    A simulation walks down by UCB until a state may have another child, adds that child, evaluates it and backs its
    reward up. What the paper leaves open is chosen here, the numbers by examples/benchmarks/search_engines.py:

    - a perturbed vector meets the target because it is moved to the nearest candidate of the space (Eq. 28's clip first);
    - the root is the first start; the starts are its first children, and random ones follow;
    - c is `exploration` times the range of all rewards so far, so that the unit of the reward does not matter;
    - delta_d = `perturbation` * `decay`^d for a child at depth d + 1;
    - a state may have ceil(`widening` * sqrt(N(s))) children;
    - a simulation that arrives at a known vector counts as a simulation, but not as an evaluation.

    Args:
        space (`SearchSpace`): what may be proposed.
        starts (`Sequence[ArrayLike]`): see `Search`.
        seed (`int`): of the perturbations.
        simulations (`int`): most simulations; the paper takes 300, of which 200 are evaluated.
        exploration (`float`): see above; 0 or more.
        perturbation (`float`): delta_0, in (0, 1].
        decay (`float`): in (0, 1].
        widening (`float`): above 0.

    Raises:
        InvalidInputError: If a setting is outside its domain.

    Source: LOP (arXiv 2506.12826), section 4.2 and appendix A.3.
    """

    citation: ClassVar[str] = "LOP: Learning Optimal Pruning for Efficient On-Demand MLLMs Scaling (arXiv 2506.12826)"

    def __init__(
        self,
        space: SearchSpace,
        starts: Sequence[ArrayLike] = (),
        *,
        seed: int,
        simulations: int = 300,
        exploration: float = 0.03,
        perturbation: float = 0.08,
        decay: float = 0.95,
        widening: float = 1.0,
    ) -> None:
        super().__init__(space, starts, seed=seed)
        numbers = {"exploration": exploration, "perturbation": perturbation, "decay": decay, "widening": widening}
        if simulations < 1 or exploration < 0 or not (0 < perturbation <= 1 and 0 < decay <= 1 and widening > 0):
            raise InvalidInputError(
                f"simulations is {simulations} and {numbers}; simulations must be at least 1, exploration at least 0, "
                "perturbation and decay in (0, 1], widening above 0."
            )
        self.settings |= {"simulations": simulations, **numbers}
        self.simulations, self.exploration, self.widening = simulations, exploration, widening
        self.perturbation, self.decay = perturbation, decay
        self.root = Node(self.starts[0])
        self._path: list[Node] = []
        self._lowest, self._highest = math.inf, -math.inf

    @property
    def done(self) -> bool:
        """Whether all simulations are used."""
        return self.root.visits >= self.simulations

    def _propose(self) -> Floats:
        self._path = self.simulate()
        return self._path[-1].ratios

    def _learn(self, ratios: Floats, reward: float) -> None:
        self._lowest, self._highest = min(self._lowest, reward), max(self._highest, reward)
        backward(self._path, reward)

    def simulate(self) -> list[Node]:
        """Walk from the root to a state that may grow, and grow it: the path to the new child, which awaits a reward."""
        c = self.exploration * max(0.0, self._highest - self._lowest)
        path = [self.root]
        while len(path[-1].children) >= self._capacity(path[-1]):
            path.append(select(path[-1], c))
        path.append(self._expand(path[-1]))
        return path

    def _capacity(self, node: Node) -> int:
        width = math.ceil(self.widening * math.sqrt(max(1, node.visits)))
        return max(width, len(self.starts)) if node is self.root else width

    def _expand(self, node: Node) -> Node:
        if node is self.root and len(node.children) < len(self.starts):
            child = Node(self.starts[len(node.children)], depth=1)
        else:
            child = expand(node, self.space, self.perturbation * self.decay**node.depth, self._rng)
        node.children.append(child)
        return child


def select(node: Node, c: float) -> Node:
    """Choose the child with the highest upper confidence bound; the earliest of equals.

    argmax_a Q(s, a) + c sqrt(ln N(s) / N(s, a)), Q = W / N.

    Source: LOP (arXiv 2506.12826), Eq. 3 and 26.
    """
    log_visits = math.log(node.visits)
    return max(node.children, key=lambda a: a.total / a.visits + c * math.sqrt(log_visits / a.visits))


def expand(node: Node, space: SearchSpace, delta: float, rng: np.random.Generator) -> Node:
    """Make a child: r'_l = clip(r_l + e_l, 0, 1), e_l ~ Uniform(-delta, delta), moved to the nearest candidate.

    Source: LOP (arXiv 2506.12826), Eq. 27 and 28.
    """
    noise = rng.uniform(-delta, delta, node.ratios.size)
    return Node(space.project(np.clip(node.ratios + noise, 0, 1)), node.depth + 1)


def backward(path: Sequence[Node], reward: float) -> None:
    """Add the reward to every edge of a path: N += 1, W += reward.

    Source: LOP (arXiv 2506.12826), Eq. 5, 30 and 31.
    """
    for node in path:
        node.visits += 1
        node.total += reward
