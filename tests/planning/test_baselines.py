import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lop.errors import InfeasibleBudgetError, InvalidInputError
from hf_lop.planning.baselines import global_threshold, uniform


def flap_al_am(scores, removed):
    """FLAP's AL-AM over neurons, written from its formulas: every neuron one by one, no clamp."""
    everything = []
    for layer, values in enumerate(scores):
        mean = sum(values) / len(values)
        std = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
        everything += [((value - mean) / std, layer) for value in values]
    everything.sort(key=lambda item: item[0])
    gone = [0] * len(scores)
    for _, layer in everything[:removed]:
        gone[layer] += 1
    return [count / len(values) for count, values in zip(gone, scores, strict=True)]


@given(
    st.lists(st.tuples(st.integers(2, 60), st.floats(0.1, 10), st.floats(-5, 5)), min_size=1, max_size=6),
    st.floats(0, 0.8),
    st.integers(0, 999),
)
def test_global_threshold_equals_the_slow_reference(layers, target, seed):
    rng = np.random.default_rng(seed)
    scores = [shift + scale * rng.lognormal(0, 1, size) for size, scale, shift in layers]
    total = sum(size for size, _, _ in layers)
    removed = total - int(np.floor(round(total * (1 - target), 6)))
    expected = flap_al_am([values.tolist() for values in scores], removed)
    if removed > total - len(layers):
        with pytest.raises(InfeasibleBudgetError):
            global_threshold(scores, target)
        return
    found = global_threshold(scores, target)
    sizes = np.array([len(values) for values in scores])
    assert np.rint(found * sizes).sum() == removed
    assert (np.rint(found * sizes) < sizes).all()
    if max(expected) < 1:
        assert found.tolist() == expected
    else:  # the reference wiped out a layer: one neuron of it stays, and others make up for it
        wiped = np.array(expected) == 1
        assert (np.rint((1 - found[wiped]) * sizes[wiped]) == 1).all()
        assert (found[~wiped] >= np.array(expected)[~wiped]).all()


def test_layers_with_equal_scores_and_single_neurons_have_z_zero():
    ratios = global_threshold([np.full(4, 7.0), np.array([3.0]), np.array([-1.0, -1.0, -1.0, 5.0])], 3 / 9)
    assert ratios.tolist() == [0.0, 0.0, 0.75]  # z is below 0 in the last layer only


def test_scale_and_shift_of_a_layer_do_not_matter():
    rng = np.random.default_rng(0)
    scores = [rng.lognormal(0, 1, 50) for _ in range(4)]
    changed = [scores[0] * 1000, scores[1] + 50, scores[2] / 8, scores[3]]
    assert np.array_equal(global_threshold(scores, 0.4), global_threshold(changed, 0.4))


@pytest.mark.parametrize("scores", [[], [[1.0, 2.0], []], [[1.0, float("nan")]], [[[1.0], [2.0]]]])
def test_bad_scores_are_refused(scores):
    with pytest.raises(InvalidInputError, match=r"[Ss]cores"):
        global_threshold(scores, 0.5)


def test_bad_targets_are_refused():
    with pytest.raises(InvalidInputError, match=r"target is 1\.5"):
        global_threshold([[1.0, 2.0]], 1.5)
    with pytest.raises(InfeasibleBudgetError):
        global_threshold([[1.0, 2.0], [1.0, 2.0]], 0.9)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=10), st.floats(0, 0.9))
def test_uniform_is_the_target_to_the_neuron(dense, target):
    removed = sum(dense) - int(np.floor(round(sum(dense) * (1 - target), 6)))
    if removed > sum(dense) - len(dense):
        with pytest.raises(InfeasibleBudgetError):
            uniform(dense, target)
        return
    ratios = uniform(dense, target)
    assert np.rint(ratios * dense).sum() == removed
    if min(dense) >= 100:
        assert np.abs((ratios - target) * dense).max() <= 2


def test_uniform_is_exact_where_it_can_be():
    assert uniform([40, 80, 20], 0.25) == pytest.approx([0.25] * 3)
