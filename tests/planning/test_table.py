from functools import partial

import numpy as np
import pytest

from hf_lop.errors import InfeasibleBudgetError, InvalidInputError
from hf_lop.planning.journal import Journal
from hf_lop.planning.search.cmaes import CMAES
from hf_lop.planning.search.mcts import MCTS
from hf_lop.planning.search.run import run_search
from hf_lop.planning.search.space import SearchSpace
from hf_lop.planning.table import learn_table, target_grid
from tests.landscape import toy_reward

DENSE = (40, 64, 64, 100)


def test_the_grid_of_the_paper():
    assert target_grid(0.2, 0.3) == (0.2, 0.225, 0.25, 0.275, 0.3)
    grid = target_grid()
    assert (grid[0], grid[-1], len(grid)) == (0.1, 0.7, 25)
    assert target_grid(0.1, 0.5, 0.2) == (0.1, 0.3, 0.5)
    with pytest.raises(InvalidInputError, match=r"from 0\.5 to 0\.3 by 0\.025"):
        target_grid(0.5, 0.3)


@pytest.mark.parametrize("engine", [MCTS, CMAES])
def test_rows_are_exact_and_no_worse_than_a_search_alone_for_the_first_target(engine):
    rows = learn_table(partial(engine, seed=0), toy_reward, DENSE, [0.5, 0.3, 0.4], evaluations=30)
    assert [row["ratio"] for row in rows] == [0.3, 0.4, 0.5]
    for row in rows:
        space = SearchSpace(DENSE, row["ratio"])
        assert set(row) == {"ratio", "ratios", "reward"}
        assert sum(space.widths(np.array(row["ratios"]))) == space.kept
        assert row["reward"] == toy_reward(np.array(row["ratios"]))
    alone = run_search(engine(SearchSpace(DENSE, 0.3), seed=0), toy_reward, 30)
    assert rows[0]["reward"] >= alone.reward


def test_neighbours_seed_each_other_in_both_directions():
    asked = []

    def reward(ratios):
        asked.append(ratios)
        return toy_reward(ratios)

    best = [0.1, 0.3, 0.6, 0.5]
    rows = learn_table(partial(MCTS, seed=0), reward, DENSE, [0.4, 0.45], starts=lambda target: [best], evaluations=10)
    low, high = (SearchSpace(DENSE, target) for target in (0.4, 0.45))
    assert low.widths(asked[0]) == low.widths(low.project(best))
    assert low.widths(asked[1]) == low.widths(low.project([0.4] * 4))
    found = asked[:10][int(np.argmax([toy_reward(ratios) for ratios in asked[:10]]))]
    assert high.widths(asked[10]) == high.widths(high.project(found))
    assert high.widths(asked[11]) == high.widths(high.project(best))
    assert len(asked) <= 21
    back = low.project(rows[1]["ratios"])
    assert rows[0]["reward"] == max(toy_reward(found), toy_reward(back))


def test_a_stopped_table_resumes_to_the_same_rows(tmp_path):
    make = partial(CMAES, seed=1)
    whole = learn_table(make, toy_reward, DENSE, [0.3, 0.4], evaluations=30)
    calls = []

    def failing(ratios):
        calls.append(ratios)
        if len(calls) == 45:
            raise KeyboardInterrupt
        return toy_reward(ratios)

    with Journal(tmp_path, {}) as journal, pytest.raises(KeyboardInterrupt):
        learn_table(make, failing, DENSE, [0.3, 0.4], evaluations=30, journal=journal)
    calls.clear()

    def counting(ratios):
        calls.append(ratios)
        return toy_reward(ratios)

    with Journal(tmp_path, {}) as journal:
        assert learn_table(make, counting, DENSE, [0.3, 0.4], evaluations=30, journal=journal) == whole
    assert len(calls) <= 17


def test_targets_out_of_reach_are_refused_before_any_evaluation():
    with pytest.raises(InfeasibleBudgetError, match="highest is"):
        learn_table(partial(MCTS, seed=0), pytest.fail, DENSE, [0.3, 0.6], max_ratio=0.5)
    with pytest.raises(InvalidInputError, match="targets is empty"):
        learn_table(partial(MCTS, seed=0), pytest.fail, DENSE, [])
