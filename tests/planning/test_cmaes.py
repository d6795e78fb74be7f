import numpy as np
import pytest
from cmaes import CMA

from hf_lop.errors import InvalidInputError
from hf_lop.planning.search.cmaes import CMAES
from hf_lop.planning.search.run import run_search
from hf_lop.planning.search.space import SearchSpace
from tests.landscape import toy_reward

SPACE = SearchSpace((400,) * 5, 0.4)


def test_samples_around_the_best_start():
    best = SPACE.project([0.2, 0.3, 0.4, 0.5, 0.6])
    asked = []

    def reward(ratios):
        asked.append(ratios)
        return toy_reward(ratios)

    search = CMAES(SPACE, [[0.4] * 5, best, [0.6, 0.5, 0.4, 0.3, 0.2]], seed=0, sigma=0.001)
    run_search(search, reward, 23)
    assert max(toy_reward(ratios) for ratios in asked[:3]) == toy_reward(best)
    assert np.abs(np.array(asked[3:]) - best).max() < 0.02


def test_is_the_package_on_projected_samples():
    search = CMAES(SPACE, seed=5)
    search.tell(search.ask(), toy_reward(SPACE.project([0.4] * 5)))
    seed = int(np.random.default_rng(5).integers(2**32))
    plain = CMA(SPACE.project([0.4] * 5), 0.05, seed=seed)
    for _ in range(6):
        generation = []
        for _ in range(plain.population_size):
            sample = plain.ask()
            candidate = search.ask()
            assert np.array_equal(candidate, SPACE.project(sample))
            search.tell(candidate, toy_reward(candidate))
            generation.append((sample, -toy_reward(candidate)))
        plain.tell(generation)


def test_finds_the_optimum_of_a_smooth_reward():
    goal = np.array([0.2, 0.3, 0.4, 0.5, 0.6])
    search = CMAES(SPACE, seed=0)
    result = run_search(search, lambda ratios: -float(((ratios - goal) ** 2).sum()), 300)
    assert np.abs(np.array(result.ratios) - goal).max() < 0.02


@pytest.mark.parametrize("sigma", [0, -1, float("nan")])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(InvalidInputError, match="sigma is"):
        CMAES(SPACE, seed=0, sigma=sigma)
