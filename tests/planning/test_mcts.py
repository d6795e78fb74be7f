import json
import math
from pathlib import Path

import numpy as np
import pytest

from hf_lop.errors import InvalidInputError
from hf_lop.planning.search.mcts import MCTS, Node, backward, expand, select
from hf_lop.planning.search.run import run_search
from hf_lop.planning.search.space import SearchSpace
from tests.landscape import toy_reward

GOLDEN = Path(__file__).parents[1] / "golden" / "mcts_tree.json"
SPACE = SearchSpace((40, 64, 64, 100), 0.4)
STARTS = [[0.4] * 4, [0.3, 0.4, 0.4, 0.44]]


def as_tree(node):
    return {
        "widths": SPACE.widths(node.ratios),
        "depth": node.depth,
        "visits": node.visits,
        "total": round(node.total, 9),
        "children": [as_tree(child) for child in node.children],
    }


def nodes(node):
    yield node
    for child in node.children:
        yield from nodes(child)


def searched(**settings):
    search = MCTS(SPACE, STARTS, seed=7, **settings)
    return search, run_search(search, toy_reward, 200)


def test_whole_tree_equals_the_golden_file():
    """Regenerate with: python -m tests.planning.test_mcts."""
    search, _ = searched(simulations=30)
    assert json.loads(json.dumps(as_tree(search.root))) == json.loads(GOLDEN.read_text())


def test_tree_equals_a_search_written_from_the_equations():
    """A plain reading of Eq. 3-6 and 26-32 on dictionaries, one simulation after the other."""
    search, result = searched(simulations=60, exploration=0.5)
    rng = np.random.default_rng(7)
    starts = [SPACE.project(start) for start in STARTS]
    state, children, visits, total, rewards = {(): starts[0]}, {}, {}, {}, {}

    def room(path):
        width = math.ceil(math.sqrt(max(1, visits.get(path, 0))))
        return max(width, len(starts)) if path == () else width

    for _ in range(60):
        spread = max(rewards.values()) - min(rewards.values()) if rewards else 0.0
        path = ()
        while children.get(path, 0) == room(path):
            ucb = [
                total[(*path, a)] / visits[(*path, a)]
                + 0.5 * spread * math.sqrt(math.log(visits[path]) / visits[(*path, a)])
                for a in range(children[path])
            ]
            path = (*path, ucb.index(max(ucb)))
        edge = children.get(path, 0)
        children[path] = edge + 1
        if path == () and edge < len(starts):
            new = starts[edge]
        else:
            delta = 0.08 * 0.95 ** len(path)
            noise = np.array([rng.uniform(-delta, delta) for _ in range(4)])
            new = SPACE.project(np.minimum(np.maximum(state[path] + noise, 0), 1))
        path = (*path, edge)
        state[path] = new
        reward = rewards.setdefault(SPACE.widths(new), toy_reward(new))
        for length in range(len(path) + 1):
            visits[path[:length]] = visits.get(path[:length], 0) + 1
            total[path[:length]] = total.get(path[:length], 0.0) + reward

    def compare(node, path):
        assert np.array_equal(node.ratios, state[path])
        assert (node.visits, node.total, node.depth) == (visits[path], pytest.approx(total[path]), len(path))
        assert len(node.children) == children.get(path, 0)
        for a, child in enumerate(node.children):
            compare(child, (*path, a))

    compare(search.root, ())
    assert result.rewards == tuple(rewards.values())
    assert result.reward == max(rewards.values())


def test_selection_is_the_upper_confidence_bound():
    often = Node(SPACE.project([0.4] * 4), 1, visits=9, total=9 * 0.6)
    rarely = Node(SPACE.project([0.4] * 4), 1, visits=1, total=0.5)
    node = Node(SPACE.project([0.4] * 4), 0, visits=10, total=5.9, children=[often, rarely])
    assert select(node, 0.0) is often
    boundary = 0.1 / (math.sqrt(math.log(10)) - math.sqrt(math.log(10) / 9))
    assert select(node, 0.999 * boundary) is often
    assert select(node, 1.001 * boundary) is rarely


def test_perturbation_shrinks_with_depth_and_stays_within_delta():
    wide = SearchSpace((10000,) * 8, 0.5)
    node = Node(wide.project([0.5] * 8), depth=3)
    rng = np.random.default_rng(0)
    steps = np.array([expand(node, wide, 0.1, rng).ratios - 0.5 for _ in range(300)])
    # Uniform on [-0.1, 0.1] minus its own mean over the 8 layers, which keeps the target.
    assert np.abs(steps).max() < 0.2
    assert steps.std() == pytest.approx(0.1 / math.sqrt(3) * math.sqrt(7 / 8), rel=0.05)
    assert np.abs(steps.sum(axis=1)).max() < 1e-9
    assert expand(node, wide, 0.1, rng).depth == 4


def test_backward_adds_to_every_edge_of_the_path():
    path = [Node(np.zeros(1), depth) for depth in range(3)]
    backward(path, 0.25)
    backward(path[:2], -1.0)
    assert [(node.visits, node.total) for node in path] == [(2, -0.75), (2, -0.75), (1, 0.25)]


def test_statistics_of_the_tree_add_up():
    search, result = searched()
    assert result.evaluations == 200
    assert 200 <= search.root.visits <= 300
    for node in nodes(search.root):
        own = 0 if node is search.root else 1
        assert node.visits == own + sum(child.visits for child in node.children)
        assert all(child.depth == node.depth + 1 for child in node.children)
        assert sum(SPACE.widths(node.ratios)) == SPACE.kept
    assert max(toy_reward(node.ratios) for node in nodes(search.root)) == result.reward


def test_starts_are_the_first_children_of_the_root():
    search, _ = searched(widening=0.5)
    assert [SPACE.widths(child.ratios) for child in search.root.children[:2]] == [
        SPACE.widths(SPACE.project(start)) for start in STARTS
    ]


def test_simulations_that_meet_a_known_vector_cost_no_evaluation():
    tiny = SearchSpace((10, 10), 0.5)
    search = MCTS(tiny, seed=0, simulations=50)
    result = run_search(search, toy_reward, 200)
    assert search.root.visits == 50
    assert result.evaluations < 20


@pytest.mark.parametrize(
    "setting",
    [{"simulations": 0}, {"exploration": -0.1}, {"perturbation": 0}, {"decay": 1.1}, {"decay": 0}, {"widening": 0}],
)
def test_settings_outside_their_domain_are_refused(setting):
    with pytest.raises(InvalidInputError, match=next(iter(setting))):
        MCTS(SPACE, seed=0, **setting)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(as_tree(searched(simulations=30)[0].root), indent=1) + "\n")
