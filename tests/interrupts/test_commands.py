"""Commands stopped at counted moments, in children of one warm process; more moments: examples/benchmarks/interrupts.py."""

import pytest
from interrupts_cases import CASES
from interrupts_runs import SIGNALS, Bench, between, choose, hurried

NEEDS = {"evaluate": "lm_eval", "export --to gguf": "gguf"}  # packages of extras
MOMENTS = 3


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with hurried():
        yield Bench(tmp_path_factory.mktemp("interrupts"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_wrong_and_nothing_left(bench, case):
    if case.name in NEEDS:
        pytest.importorskip(NEEDS[case.name], reason="an extra is not installed")
    _, counted = bench.undisturbed(case)
    chosen = choose(counted.moments, counted.place, MOMENTS)
    assert len(chosen) == MOMENTS
    assert 2 * len({*chosen} & {*between(counted.moments, counted.place)}) >= MOMENTS
    for number in SIGNALS.values():
        for at in chosen:
            stopped = bench.stop(case, number, at)
            assert stopped.right, stopped


def test_moments_are_spread():
    moments = ["", "/a/tmp", *["/a/place/out"] * 8, "", "/a/tmp"]
    assert choose(moments, "/a/place", 3) == [4, 8, 10]
    assert choose(moments, "/a/place", 100) == list(range(12))
