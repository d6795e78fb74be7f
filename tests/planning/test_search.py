from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lop.errors import InfeasibleBudgetError, InvalidInputError
from hf_lop.planning.search.cmaes import CMAES
from hf_lop.planning.search.mcts import MCTS
from hf_lop.planning.search.run import run_search
from hf_lop.planning.search.space import SearchSpace, project_ratios
from tests.landscape import toy_reward

SEARCHES = [MCTS, CMAES]
SPACE = SearchSpace((40, 64, 64, 100), 0.4)


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 20000)), min_size=1, max_size=12),
    st.floats(0, 0.9),
    st.integers(0, 99),
)
def test_projection_is_the_nearest_feasible_point(layers, target, seed):
    wanted, dense = (np.array(values) for values in zip(*layers, strict=True))
    nearest = project_ratios(wanted, dense, target)
    assert nearest.dtype == np.float64
    assert nearest.min() >= -1e-12
    assert nearest.max() <= 0.95 + 1e-12
    assert nearest @ dense / dense.sum() == pytest.approx(target, abs=1e-9)
    # Optimality of a convex problem: no feasible point lies on the far side of the plane through the solution.
    other = project_ratios(np.random.default_rng(seed).normal(target, 0.5, len(dense)), dense, target)
    assert ((other - nearest) * dense) @ (wanted - nearest) <= 1e-6 * dense.sum()


@given(
    st.lists(st.tuples(st.floats(-1, 2), st.integers(1, 20000)), min_size=1, max_size=12),
    st.floats(0, 0.9),
    st.sampled_from([1, 8, 64]),
)
def test_candidates_are_whole_blocks_and_remove_the_target(layers, target, round_to):
    wanted, dense = (list(values) for values in zip(*layers, strict=True))
    try:
        space = SearchSpace(tuple(dense), target, round_to=round_to)
    except InfeasibleBudgetError:
        return  # one block of a tiny layer is more than may stay
    candidate = space.project(wanted)
    widths = space.widths(candidate)
    assert all(width % round_to == 0 or width == full for width, full in zip(widths, dense, strict=True))
    assert all(width >= min(round_to, full) for width, full in zip(widths, dense, strict=True))
    assert max(candidate) <= 0.95 + 1e-9
    assert 0 <= space.kept - sum(widths) < round_to
    assert np.array_equal(space.ratios(widths), candidate)
    if round_to == 1:
        assert candidate @ dense / sum(dense) == pytest.approx(target, abs=1.001 / sum(dense))
        assert space.widths(space.project(candidate)) == widths


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((), 0.5), InvalidInputError, "dense_widths"),
        (((8, 0), 0.5), InvalidInputError, "dense_widths"),
        (((8, 8), 1.0), InvalidInputError, r"target is 1\.0"),
        (((8, 8), float("nan")), InvalidInputError, "target is nan"),
        (((8, 8), 0.5, 0.0), InvalidInputError, r"max_ratio is 0\.0"),
        (((80, 80), 0.6, 0.5), InfeasibleBudgetError, "highest is 0.5"),
        (((8, 8), 0.5, 0.95, 0), InvalidInputError, "round_to is 0"),
    ],
)
def test_impossible_spaces_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SearchSpace(*arguments)


def test_projection_refuses_wrong_shapes():
    with pytest.raises(InvalidInputError, match="pass 4 finite numbers"):
        SPACE.project([0.4, 0.4, float("nan"), 0.4])
    with pytest.raises(InvalidInputError, match="max_ratio is 2"):
        project_ratios([0.5], [8], 0.5, max_ratio=2)


@pytest.mark.parametrize("search", SEARCHES)
def test_same_seed_same_result_other_seed_another(search):
    first, again, other = (run_search(search(SPACE, seed=seed), toy_reward, 40) for seed in (1, 1, 2))
    assert first == again
    assert first.rewards != other.rewards


@pytest.mark.parametrize("search", SEARCHES)
def test_the_global_generator_is_left_alone(search):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    run_search(search(SPACE, seed=0), toy_reward, 20)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("search", SEARCHES)
def test_every_proposal_is_a_candidate_and_starts_come_first(search):
    starts = [[0.5, 0.4, 0.4, 0.3], [0.4] * 4, [0.5, 0.4, 0.4, 0.3]]
    asked = []

    def reward(ratios):
        asked.append(SPACE.widths(ratios))
        return toy_reward(ratios)

    result = run_search(search(SPACE, starts, seed=0), reward, 60)
    assert asked[:2] == [SPACE.widths(SPACE.project(start)) for start in starts[:2]]
    assert len(set(asked)) == len(asked) == result.evaluations == 60
    assert {sum(widths) for widths in asked} == {SPACE.kept}
    assert result.reward == max(result.rewards) == result.best_so_far[-1]
    assert SPACE.widths(np.array(result.ratios)) == asked[result.rewards.index(result.reward)]


@pytest.mark.parametrize("search", [partial(MCTS, perturbation=0.5), partial(CMAES, sigma=0.3)])
def test_an_exhausted_space_ends_the_search(search):
    result = run_search(search(SearchSpace((4, 4), 0.5), seed=0), toy_reward, 100)
    assert result.evaluations == 3  # widths 1+3, 2+2, 3+1: a ratio of 1 is above max_ratio


@pytest.mark.parametrize("search", SEARCHES)
def test_one_layer_has_one_candidate(search):
    result = run_search(search(SearchSpace((50,), 0.3), seed=0), lambda ratios: 1.0, 5)
    assert result.ratios == pytest.approx((0.3,))
    assert result.rewards == (1.0,)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_unit_of_the_reward_does_not_matter(search):
    plain = run_search(search(SPACE, seed=3), toy_reward, 50)
    scaled = run_search(search(SPACE, seed=3), lambda ratios: 1024 * toy_reward(ratios), 50)
    assert scaled.ratios == plain.ratios


@pytest.mark.parametrize("search", SEARCHES)
def test_ask_repeats_until_told_and_tell_wants_what_was_asked(search):
    engine = search(SPACE, seed=0)
    with pytest.raises(InvalidInputError, match="not asked last"):
        engine.tell(SPACE.project([0.4] * 4), 1.0)
    asked = engine.ask()
    assert np.array_equal(engine.ask(), asked)
    with pytest.raises(InvalidInputError, match="not asked last"):
        engine.tell(SPACE.project([0.8, 0.4, 0.4, 0.2]), 1.0)
    with pytest.raises(InvalidInputError, match="nan; it must be finite"):
        engine.tell(asked, float("nan"))
    engine.tell(asked, 1.0)
    assert not np.array_equal(engine.ask(), asked)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rewards_that_are_not_finite_name_the_candidate(value):
    with pytest.raises(InvalidInputError, match=r"The reward of Candidate \[0\.4, .* is -?(nan|inf)"):
        run_search(MCTS(SPACE, seed=0), lambda ratios: value, 5)


def test_a_search_needs_an_evaluation():
    with pytest.raises(InvalidInputError, match="evaluations is 0"):
        run_search(MCTS(SPACE, seed=0), toy_reward, 0)


@pytest.mark.parametrize("search", [*SEARCHES, partial(MCTS, simulations=150)])
def test_searches_beat_their_start(search):
    space = SearchSpace((1000,) * 6, 0.5)
    result = run_search(search(space, seed=0), toy_reward, 150)
    assert result.reward > result.rewards[0] + 0.01
