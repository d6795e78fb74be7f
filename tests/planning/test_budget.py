import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lop.errors import InfeasibleBudgetError, InvalidInputError
from hf_lop.planning.budget import bisect_budget, parse_bytes, project


@st.composite
def problems(draw, equal=False):
    """Ratios, dense widths, block size and the least possible number of kept neurons."""
    num_layers = draw(st.integers(1, 8))
    if equal:
        dense = [draw(st.integers(1, 300))] * num_layers
    else:
        dense = draw(st.lists(st.integers(1, 300), min_size=num_layers, max_size=num_layers))
    # Rounded: a difference that floats cannot carry through the projection is a tie.
    ratios = [round(draw(st.floats(0, 1)), 4) for _ in range(num_layers)]
    round_to = draw(st.integers(1, 70))
    return np.array(ratios), np.array(dense), round_to, int(np.minimum(dense, round_to).sum())


@given(problems(), st.data())
def test_a_plan_meets_its_budget_up_to_one_block_within_all_bounds(problem, data):
    ratios, dense, round_to, least = problem
    kept = data.draw(st.integers(least, int(dense.sum())))
    widths = project(ratios, dense, kept, round_to=round_to)
    assert widths.dtype == np.int64
    assert kept - round_to < widths.sum() <= kept
    assert (np.minimum(round_to, dense) <= widths).all()
    assert (widths <= dense).all()
    assert ((widths % round_to == 0) | (widths == dense)).all()


@given(problems(), st.data())
def test_single_neurons_meet_the_budget_exactly(problem, data):
    ratios, dense, _, _ = problem
    kept = data.draw(st.integers(dense.size, int(dense.sum())))
    assert project(ratios, dense, kept).sum() == kept


@given(problems(equal=True), st.data())
def test_a_layer_with_a_higher_ratio_never_keeps_more(problem, data):
    ratios, dense, round_to, least = problem
    kept = data.draw(st.integers(least, int(dense.sum())))
    widths = project(ratios, dense, kept, round_to=round_to)
    assert (np.diff(widths[np.argsort(ratios, kind="stable")]) <= 0).all()


@given(problems(), st.data())
def test_costs_are_met_up_to_the_dearest_block(problem, data):
    ratios, dense, round_to, _ = problem
    costs = np.array(data.draw(st.lists(st.integers(1, 50), min_size=dense.size, max_size=dense.size)))
    budget = data.draw(st.integers(int(costs @ np.minimum(dense, round_to)), int(costs @ dense)))
    widths = project(ratios, dense, budget, round_to=round_to, costs=costs)
    assert budget - costs.max() * round_to < costs @ widths <= budget


@given(problems())
def test_the_dense_budget_gives_the_dense_model(problem):
    ratios, dense, round_to, _ = problem
    for budget in (dense.sum(), dense.sum() + 5, float("inf")):
        assert (project(ratios, dense, budget, round_to=round_to) == dense).all()


@given(problems())
def test_less_than_a_block_per_layer_is_infeasible(problem):
    ratios, dense, round_to, least = problem
    assert project(ratios, dense, least, round_to=round_to).sum() == least
    with pytest.raises(InfeasibleBudgetError, match=rf"budget of {least - 1} .* plan, {least} "):
        project(ratios, dense, least - 1, round_to=round_to)


def test_ratios_whose_mean_fits_are_kept_as_they_are():
    assert project([0.5, 0.2, 0.8], [100, 200, 50], 220).tolist() == [50, 160, 10]


def test_one_offset_moves_all_layers_and_stops_at_the_bounds():
    assert project([0.5, 0.3, 0.1], [100] * 3, 240).tolist() == [60, 80, 100]
    assert project([0.5, 0.3, 0.0], [100] * 3, 260).tolist() == [70, 90, 100]
    assert project([1.0, 1.0, 0.4], [100] * 3, 12, round_to=4).tolist() == [4, 4, 4]


def test_ties_go_to_the_lower_layer():
    assert project([0.5] * 4, [10] * 4, 22).tolist() == [6, 6, 5, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": [0.5]}, "ratios has shape"),
        ({"ratios": [0.5, np.nan]}, "ratios"),
        ({"ratios": [0.5, 1.5]}, "0.5 to 1.5"),
        ({"dense_widths": [10, 0]}, "dense_widths"),
        ({"dense_widths": [10.5, 3.0]}, "dense_widths"),
        ({"dense_widths": []}, "dense_widths"),
        ({"budget": float("nan")}, "budget"),
        ({"round_to": 0}, "round_to"),
        ({"costs": [1.0]}, "costs has shape"),
        ({"costs": [1.0, 0.0]}, "positive"),
    ],
)
def test_values_outside_the_domain_are_refused(change, message):
    arguments = {"ratios": [0.5, 0.5], "dense_widths": [10, 10], "budget": 10} | change
    with pytest.raises(InvalidInputError, match=message):
        project(**arguments)


def plan_for(kept):
    return project([0.2, 0.6], [1000, 1000], kept)


@given(st.integers(10, 5000))
def test_bisection_finds_the_largest_plan(budget):
    cost = np.array([2, 3])
    widths = bisect_budget(plan_for, lambda widths: float(cost @ widths), budget, 2, 2000)
    assert cost @ widths <= budget
    assert widths.sum() == 2000 or cost @ plan_for(widths.sum() + 1) > budget


@given(st.integers(130, 2000), st.integers(1, 64))
def test_bisection_on_a_grid_ends_one_step_below_the_budget(budget, step):
    widths = bisect_budget(plan_for, lambda widths: float(widths.sum()), budget, 130, 2000, step=step)
    assert budget - step < widths.sum() <= budget


def test_bisection_looks_past_a_wiggle_in_the_cost():
    bump = {100: 101.5}
    widths = bisect_budget(plan_for, lambda widths: bump.get(int(widths.sum()), widths.sum()), 101, 2, 2000)
    assert widths.sum() == 101


def test_bisection_needs_few_plans():
    calls = []
    bisect_budget(lambda kept: calls.append(kept) or np.array([kept]), lambda widths: widths[0], 3e5, 28, 530_432)
    assert len(calls) <= 26


def test_bisection_refuses_impossible_budgets():
    with pytest.raises(InfeasibleBudgetError, match=r"budget of 1 .* plan, 2"):
        bisect_budget(plan_for, np.sum, 1, 2, 2000)
    for arguments in ((9, 20, 2), (float("nan"), 2, 20)):
        with pytest.raises(InvalidInputError):
            bisect_budget(plan_for, np.sum, *arguments)
    with pytest.raises(InvalidInputError, match="step"):
        bisect_budget(plan_for, np.sum, 9, 2, 20, step=0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6_000_000_000),
        ("6 GiB", 6 * 2**30),
        ("1.5mb", 1_500_000),
        (" 2 KiB ", 2048),
        ("0.29GB", 290_000_000),
        (".5TB", 500_000_000_000),
        ("1TiB", 2**40),
        ("12B", 12),
        ("6e9", 6_000_000_000),
        ("1e+3 KB", 1_000_000),
        (7, 7),
        (1.5e9, 1_500_000_000),
        (1e22, 10**22),
        (0, 0),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "junk",
    ["", "GB", "6G", "6 iB", "-6GB", "6GBs", "6,5GB", "nan", "inf", "1e999", -1, float("nan"), float("inf"), True],
)
def test_junk_is_not_a_size(junk):
    with pytest.raises(InvalidInputError, match="6GB"):
        parse_bytes(junk)
