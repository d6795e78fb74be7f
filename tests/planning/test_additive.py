import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lop import demo
from hf_lop.errors import InfeasibleBudgetError, InvalidInputError
from hf_lop.learning.rewards import Reward
from hf_lop.planning.additive import additive_damage, additive_plans

PROBES = [0.25, 0.5, 0.75]


def curves(damage):
    """The regularised damage of every layer as a function of its ratio, written independently of the package."""
    rising = [[0.0, *itertools.accumulate(np.maximum(row, 0.0), max)] for row in damage]
    return [lambda ratio, row=row: np.interp(ratio, [0.0, *PROBES], np.sqrt(row)) ** 2 for row in rising]


@given(
    st.lists(st.lists(st.floats(-0.5, 3), min_size=3, max_size=3), min_size=1, max_size=4),
    st.floats(0, 0.75),
)
def test_equals_brute_force(damage, target):
    (plan,) = additive_plans(damage, PROBES, [80] * len(damage), [target], step=0.125)
    layers = curves(damage)
    steps = round(target * len(damage) / 0.125)
    least = min(
        sum(layer(0.125 * count) for layer, count in zip(layers, counts, strict=True))
        for counts in itertools.product(range(7), repeat=len(damage))
        if sum(counts) == steps
    )
    assert sum(layer(ratio) for layer, ratio in zip(layers, plan, strict=True)) == pytest.approx(least)


@given(st.lists(st.integers(1, 200), min_size=2, max_size=3), st.floats(0, 0.5), st.integers(0, 99))
def test_equals_brute_force_with_unequal_widths(dense, target, seed):
    damage = np.random.default_rng(seed).normal(1, 1, (len(dense), 3))
    (plan,) = additive_plans(damage, PROBES, dense, [target], step=0.2)
    quantum = 0.2 * max(min(dense), np.mean(dense) / 8)
    counts = [range(int(0.75 * width / quantum + 1e-9) + 1) for width in dense]
    layers, total = curves(damage), np.rint(target * sum(dense) / quantum)
    least = min(
        sum(layer(quantum * n / width) for layer, n, width in zip(layers, chosen, dense, strict=True))
        for chosen in itertools.product(*counts)
        if sum(chosen) == total
    )
    assert sum(layer(ratio) for layer, ratio in zip(layers, plan, strict=True)) == pytest.approx(least)


@given(
    st.lists(st.integers(1, 5000), min_size=2, max_size=12),
    st.lists(st.floats(0, 0.6), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_every_target_is_met_up_to_half_a_step_from_one_table(dense, targets, seed):
    damage = np.random.default_rng(seed).uniform(0, 1, (len(dense), 3))
    plans = additive_plans(damage, PROBES, dense, targets)
    assert plans.shape == (len(targets), len(dense))
    assert ((plans >= 0) & (plans <= 0.75)).all()
    quantum = 0.025 * max(min(dense), np.mean(dense) / 8)
    np.testing.assert_allclose(plans @ dense, np.array(targets) * sum(dense), atol=quantum / 2 + 1e-6)
    for target, plan in zip(targets, plans, strict=True):
        np.testing.assert_array_equal(additive_plans(damage, PROBES, dense, [target])[0], plan)


def test_sensitive_layers_are_spared():
    (plan,) = additive_plans([[0.1, 0.2, 0.3], [1, 2, 3], [0.1, 0.2, 0.3]], PROBES, [64] * 3, [0.5])
    assert min(plan[0], plan[2]) > 0.7 > 0.05 > plan[1]  # the square of a small cut hurts next to nothing


def test_damage_counts_in_context_as_far_as_the_others_are_cut():
    alone, among = [[1, 2, 3], [2, 4, 6]], [[2, 4, 6], [1, 2, 3]]  # which layer is the more sensitive one turns round
    targets = [0.1, 0.3, 0.5, 0.7]
    plans = additive_plans(alone, PROBES, [64] * 2, targets, around=among, context=0.25)
    np.testing.assert_array_equal(plans[2:], additive_plans(among, PROBES, [64] * 2, targets[2:]))
    for share, target, plan in zip(
        (0.2, 0.6), targets, plans, strict=False
    ):  # between probes the square root is linear
        curve = [lambda r, row=row: np.interp(r, [0, *PROBES], np.sqrt([0, *row])) ** 2 for row in (*alone, *among)]
        cost = lambda a, s=share, c=curve, t=target: (  # noqa: E731
            (1 - s) * (c[0](a) + c[1](2 * t - a)) + s * (c[2](a) + c[3](2 * t - a))
        )
        options = [a for a in 0.025 * np.arange(31) if 0 <= 2 * target - a <= 0.75 + 1e-9]
        assert cost(plan[0]) == pytest.approx(min(map(cost, options)))


def test_a_probe_that_seems_to_help_counts_as_harmless_not_as_gain():
    noisy, clean = [[0.5, 0.2, 0.9], [0.4, 0.5, 0.6]], [[0.5, 0.5, 0.9], [0.4, 0.5, 0.6]]
    targets = np.arange(0, 0.75, 0.05)
    np.testing.assert_array_equal(
        additive_plans(noisy, PROBES, [64] * 2, targets), additive_plans(clean, PROBES, [64] * 2, targets)
    )


def test_the_cap_follows_the_probes_and_leaves_something():
    damage = [[1.0, 2.0], [1.0, 2.0]]
    assert additive_plans(damage, [0.5, 1.0], [100] * 2, [0.95]).max() == pytest.approx(0.95)
    damage = [[1.0, 1.1], [1.0, 9.0]]
    assert additive_plans(damage, [0.5, 1.0], [100] * 2, [0.6], step=0.01, max_ratio=1.0)[0].tolist() == [1.0, 0.2]
    for arguments, highest in (({}, 0.95), ({"max_ratio": 0.6}, 0.6)):
        with pytest.raises(InfeasibleBudgetError, match=f"target is {highest}"):
            additive_plans(damage, [0.5, 1.0], [100] * 2, [0.97], **arguments)
    with pytest.raises(InvalidInputError, match="max_ratio"):
        additive_plans(damage, [0.4, 0.5], [100] * 2, [0.3], max_ratio=0.6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damage": [[1.0, 2.0]]}, "damage"),
        ({"damage": [[1.0, np.nan, 2.0]]}, "damage"),
        ({"probe_ratios": [0.5, 0.25, 0.75]}, "probe_ratios"),
        ({"probe_ratios": [0.0, 0.25, 0.75]}, "probe_ratios"),
        ({"probe_ratios": [0.5, 0.75, 1.25]}, "probe_ratios"),
        ({"probe_ratios": []}, "probe_ratios"),
        ({"dense_widths": [0]}, "dense_widths"),
        ({"dense_widths": []}, "dense_widths"),
        ({"targets": []}, "targets"),
        ({"targets": [1.0]}, "targets"),
        ({"targets": [-0.1]}, "targets"),
        ({"targets": [np.nan]}, "targets"),
        ({"step": 0.0}, "step"),
        ({"step": 1.0}, "step"),
        ({"around": [[1.0, 2.0]]}, "around"),
        ({"context": 0.0}, "context"),
    ],
)
def test_values_outside_the_domain_are_refused(change, message):
    arguments = {"damage": [[1.0, 2.0, 3.0]], "probe_ratios": PROBES, "dense_widths": [8], "targets": [0.5]} | change
    with pytest.raises(InvalidInputError, match=message):
        additive_plans(**arguments)


@given(
    st.lists(st.lists(st.floats(-0.5, 3), min_size=3, max_size=3), min_size=2, max_size=4),
    st.lists(st.floats(0, 0.75), min_size=4, max_size=4),
)
def test_damage_of_a_plan_is_what_plans_minimise(damage, ratios):
    layers = len(damage)
    plan = ratios[:layers]
    expected = sum(layer(ratio) for layer, ratio in zip(curves(damage), plan, strict=True))
    assert additive_damage(damage, PROBES, [80] * layers, plan) == pytest.approx(expected)
    both = additive_damage(damage, PROBES, [80] * layers, plan, around=np.add(damage, 1.0), context=0.5)
    assert both >= additive_damage(damage, PROBES, [80] * layers, plan) - 1e-12
    (best,) = additive_plans(damage, PROBES, [80] * layers, [0.375], step=0.125)
    uniform = additive_damage(damage, PROBES, [80] * layers, [0.375] * layers)
    assert additive_damage(damage, PROBES, [80] * layers, best) <= uniform + 1e-9


def test_damage_refuses_another_model():
    with pytest.raises(InvalidInputError, match=r"layer_ratios has shape \(3,\)"):
        additive_damage([[1.0]] * 2, [0.5], [8, 8], [0.5] * 3)


@pytest.mark.slow
def test_estimate_is_near_what_the_demo_measures():
    """The number on cards, for plans that were predicted, on the data of the probes and on others."""
    model, processor = demo.load_model()
    pruner = demo.load_pruner()
    for split in ("search", "report"):
        batches = demo.batches(processor, demo.load_data(split, 400), 50, with_answer=True)
        reward = Reward.on(model, pruner.order(), batches, "divergence")
        for ratio in (0.2, 0.3, 0.5, 0.7):
            widths = pruner.plan(ratio).widths
            assert pruner.config.estimate(widths) == pytest.approx(-reward(widths).value, rel=0.5), (split, ratio)
