"""Several processes give what one gives, bit by bit: in threads that exchange by pickle, and in real processes."""

import copy
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lop import demo
from hf_lop.errors import InvalidInputError, ProcessError
from hf_lop.learning.bench import Bench
from hf_lop.learning.decoder.replay import record_batches
from hf_lop.learning.probes import probe_layers
from hf_lop.learning.processes import Processes, launched
from hf_lop.learning.rewards import REWARDS, Reward, _ratio
from hf_lop.learning.statistics import Statistics, _Accumulator, collect_statistics
from hf_lop.pruner.fit import calibrate
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.units.slice import prunable_units
from tests.conftest import slow
from tests.learning.test_rewards import WIDTHS, answered, orders
from tests.small_models import text_batches
from tests.tiny_models import tiny_inputs, tiny_model


def in_threads(count, work):
    """Run `work(processes)` in threads; return its results or errors, by index."""
    barrier, sent, results = threading.Barrier(count, timeout=60), [None] * count, [None] * count

    def run(index):
        def exchange(value):
            sent[index] = pickle.dumps(value)
            barrier.wait()
            found = [pickle.loads(entry) for entry in sent]
            barrier.wait()
            return found

        try:
            results[index] = work(Processes(index, count, exchange))
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_an_ordinary_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = launched()
    assert (alone.index, alone.count, alone.main) == (0, 1, True)
    assert alone.gather(lambda: 3) == [3]
    assert alone.from_main(lambda: alone.together(lambda x: x + 1, 3)) == 4
    alone.agree("data", 1)


def test_a_launcher_that_started_one_process_only_is_reported(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.warns(UserWarning, match="--multi_gpu"):
        assert launched().count == 1


def test_the_main_process_leads():
    def work(processes):
        served = []
        double = lambda x: sum(processes.gather(lambda: x))  # noqa: E731
        lead = lambda: [processes.together(double, x) for x in (1, 2)]  # noqa: E731
        return processes.from_main(lead, serve=lambda x: served.append(double(x))), served

    assert in_threads(3, work) == [([3, 6], []), ([3, 6], [3, 6]), ([3, 6], [3, 6])]


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_an_error_of_one_ends_all(guilty):
    def fail(processes, x):
        if processes.index == guilty:
            raise ZeroDivisionError("by nought")
        return x

    def gathering(processes):
        return processes.gather(lambda: fail(processes, 1))

    def sharing(processes):
        def share(x):
            return processes.gather(lambda: fail(processes, x))

        return processes.from_main(lambda: processes.together(share, 1), serve=share)

    def serving(processes):  # the guilty one fails where the main process does not look yet
        def alone(x):
            return fail(processes, x)

        return processes.from_main(lambda: processes.together(alone, 1), serve=alone)

    for work in (gathering, sharing, serving):
        for index, error in enumerate(in_threads(3, work)):
            assert isinstance(error, ZeroDivisionError if index == guilty else ProcessError)
            assert "by nought" in str(error)


def test_different_data_are_refused():
    for error in in_threads(2, lambda processes: processes.agree("Data", processes.index)):
        assert isinstance(error, InvalidInputError)
        assert "Data differ between the processes: [0, 1]" in str(error)


def equal(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in Statistics.__slots__)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_statistics_are_those_of_one_process(llama, count, padded):
    batches, ran = text_batches(4, padded=padded), []

    def work(processes):
        model = copy.deepcopy(llama)
        model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(processes.index))
        return collect_statistics(model, batches, processes=processes)

    expected = collect_statistics(llama, batches)
    for found in in_threads(count, work):
        assert all(equal(one, other) for one, other in zip(found, expected, strict=True))
    assert sorted(ran) == sorted(index % count for index in range(4))


def test_statistics_are_added_up_in_the_order_of_the_batches(llama, monkeypatch):
    """Rounding differs with the order, by less than most tests of the result would see."""
    add, added = _Accumulator.add, {}

    def note(accumulator, sums):
        added.setdefault(id(accumulator), []).append(sums.tokens)
        add(accumulator, sums)

    monkeypatch.setattr(_Accumulator, "add", note)
    batches = [{"input_ids": torch.arange(3, 3 + length).unsqueeze(0)} for length in (5, 9, 4, 7, 6)]
    in_threads(2, lambda processes: collect_statistics(copy.deepcopy(llama), batches, processes=processes) and None)
    assert list(added.values()) == [[5, 9, 4, 7, 6]] * 2 * 4  # two processes, four layers


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 9)), min_size=2, max_size=30), st.randoms())
def test_a_score_does_not_depend_on_the_order_of_samples(samples, random):
    scores = []
    for _ in range(3):
        sums, weights = (np.array(column) for column in zip(*samples, strict=True))
        scores.append(_ratio(sums, weights))
        random.shuffle(samples)
    assert scores == [scores[0]] * 3


def test_probes_do_not_depend_on_the_order_of_batches(llama, monkeypatch):
    lengths = (5, 9, 4, 7, 6)
    batches = [{"input_ids": torch.arange(3, 3 + length).unsqueeze(0)} for length in lengths]
    sums = dict(zip(lengths, (0.1, 1e16, 0.7, -1e16, 0.3), strict=True))
    monkeypatch.setattr("hf_lop.learning.probes._probe", lambda *a: (np.full((2, 4, 2), sums[len(a[2].target)]), 1))

    def work(processes):
        model = copy.deepcopy(llama)
        return probe_layers(Bench(model, orders(model), batches, processes), [0.3, 0.7], (0.0, 0.5))

    for found in [work(Processes()), *in_threads(2, work), *in_threads(3, work)]:
        np.testing.assert_array_equal(found, np.full((2, 4, 2), math.fsum(sums.values()) / 5))


@pytest.mark.parametrize("count", [2, *slow(3, 5)])
def test_probes_and_rewards_are_those_of_one_process(llama, count):
    batches = [*answered(text_batches(3)), {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[-100]])}]
    batches += answered(text_batches(1, seed=3))  # four that count, and one without a prediction
    order, ratios, recorded = orders(llama), [0.3, 0.7], [None] * count

    def work(processes):
        model = copy.deepcopy(llama)
        rewards = {kind: Reward.on(model, order, batches, kind, processes) for kind in REWARDS}
        recorded[processes.index] = len(rewards["divergence"].recorded)
        scores = {kind: [reward(WIDTHS), reward([20] * 4)] for kind, reward in rewards.items()}
        return scores, probe_layers(Bench(model, order, batches, processes), ratios, (0.0, 0.5))

    expected, probes = work(Processes())
    for scores, found in in_threads(count, work):
        assert scores == expected
        np.testing.assert_array_equal(found, probes)
    assert recorded == [sum(index % count == p for index in range(4)) for p in range(count)]


def test_sketches_add_up(llama):
    """Up to the last digits of float32 sums: B^T B is what a sketch says."""

    def work(processes):
        model = copy.deepcopy(llama)
        units = prunable_units(model)
        statistics, sketches = calibrate(
            model,
            units,
            text_batches(6),
            SimpleNamespace(sketch_rows=16, seed=0),
            SimpleNamespace(processes=processes),
        )
        return [sketch.directions().T @ sketch.directions() for sketch in sketches], statistics

    (alone, _), *several = [work(Processes()), *in_threads(2, work), *in_threads(3, work)]
    for products, statistics in several:
        for expected, found, measured in zip(alone, products, statistics, strict=True):
            unit = measured.square.sqrt()
            assert ((expected - found).abs() / torch.outer(unit, unit)).mean() < 0.01


def test_processes_with_nothing_to_do_are_reported(llama):
    with pytest.warns(UserWarning, match="5 processes share 2 batches .* 3 have nothing to do"):
        assert len(record_batches(llama, text_batches(2), Processes(0, 5))) == 1
    assert record_batches(llama, text_batches(2), Processes(4, 5)) == []


@pytest.mark.parametrize(("kind", "message"), [("perplexity", "two tokens"), ("accuracy", "no labels")])
def test_useless_data_are_refused_by_all(llama, kind, message):
    def work(processes):
        return Reward.on(
            copy.deepcopy(llama), orders(llama), [{"input_ids": torch.tensor([[5]])}] * 3, kind, processes
        )

    for error in in_threads(2, work):
        assert message in str(error)


# -- Real processes ----------------------------------------------------------------------------------------------------

SEARCHES = {"additive": 1, "cmaes": 8, "mcts": 8}
CHILD = """
import json, os, sys
from pathlib import Path
from tests.learning.test_processes import fit
folder, search, name = Path(sys.argv[1]), *sys.argv[2:]
calls = []
for search in search.split():
    pruner = fit(search, folder / f"{search}.journal", calls)
    pruner.save_pretrained(folder / f"{search}-{name}")
(folder / f"calls-{name}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(calls))
"""


def data(seed):
    return [tiny_inputs("qwen2_5_vl", seed + index) for index in range(4)]


def fit(search, journal=None, calls=None):
    """Fit a pruner; note the number of pictures seen and of decoder runs in `calls`."""
    model, counts = tiny_model("qwen2_5_vl"), {"pictures": 0, "runs": 0}
    for module, key in ((model.model.visual, "pictures"), (model.model.language_model.layers[3], "runs")):
        module.register_forward_pre_hook(lambda *_, key=key: counts.update({key: counts[key] + 1}))
    options = {"targets": (0.3, 0.5), "evaluations": SEARCHES[search], "predictor": "mlp"}
    fitted = LOPPruner.fit(model, data(1), data(50), search=search, journal=journal, base_model="org/base", **options)
    if calls is not None:
        calls.append(counts)
    return fitted


def start(command, count):
    """Start processes as a launcher does, but without one that watches over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    if count > 1:
        common |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"ACCELERATE_USE_CPU": "true"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
    return [
        subprocess.Popen(command, env={**common, **rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in ranks
    ]


def finish(children):
    return [(child.communicate(timeout=200), child.returncode) for child in children]


def child(folder, searches, name):
    return [sys.executable, "-c", CHILD, str(folder), " ".join(searches), name]


@pytest.mark.usefixtures("full_training")
@pytest.mark.slow
def test_two_processes_make_the_pruner_of_one(tmp_path):
    for (_, err), code in finish(start(child(tmp_path, SEARCHES, "two"), 2)):
        assert code == 0, err
    calls = [json.loads((tmp_path / f"calls-two-{rank}.json").read_text()) for rank in range(2)]
    alone = []
    for index, search in enumerate(SEARCHES):
        expected = fit(search, calls=alone)
        found = LOPPruner.from_pretrained(tmp_path / f"{search}-two")
        assert found.config.search_table == expected.config.search_table
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
        # Each has half of the pictures, and one more to see how its recordings can be replayed.
        shares = [calls[rank][index]["pictures"] for rank in range(2)]
        assert alone[index]["pictures"] == 4 * 2  # calibration, and one recording for the probes and the search
        assert shares == [2 * 2, 2 * 2 + 1]
        assert all(calls[rank][index]["runs"] <= 0.6 * alone[index]["runs"] for rank in range(2))
    files = sorted(path.name for path in (tmp_path / "mcts.journal").iterdir())
    assert files == ["evaluations-00000.jsonl", "probes.json", "seconds.json"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other_and_any_number_resumes(tmp_path, victim):
    journal = tmp_path / "mcts.journal" / "evaluations-00000.jsonl"
    children = start(child(tmp_path, ["mcts"], "killed"), 2)
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_bytes().count(b"\n") >= 4) and time.monotonic() < deadline:
        time.sleep(0.005)
    children[victim].kill()
    started = time.monotonic()
    (_, err), code = finish(children)[1 - victim]
    assert time.monotonic() - started < 60
    assert code != 0
    assert "cannot reach the others any more" in err
    assert not (tmp_path / "mcts-killed").exists()
    kept = journal.read_bytes()
    for (_, err), code in finish(start(child(tmp_path, ["mcts"], "resumed"), 1 + victim)):
        assert code == 0, err
    assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    found = LOPPruner.from_pretrained(tmp_path / "mcts-resumed")
    assert found.config.search_table == fit("mcts").config.search_table


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    ],
)
def test_the_command_line_under_a_launcher(tmp_path, launcher):
    rows = [
        {"text": " ".join(("red", "green", "circle", "square")[i * k % 4] for k in range(1, 6))} for i in range(40)
    ]
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", tmp_path / "prose.jsonl", "--samples", "20", "--search-samples", "20", "--predictor", "mlp"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def run(name, *start):
        command = [sys.executable, *start, "-m", "hf_lop", "fit", demo.MODEL_DIR, *options, "--json"]
        command = [str(part) for part in [*command, "--out", tmp_path / name]]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)["loss"], LOPPruner.from_pretrained(tmp_path / name)

    (loss, one), (loss_of_two, two) = run("one"), run("two", "-m", *launcher)
    assert loss == loss_of_two
    assert one.config.search_table == two.config.search_table
    assert one.config.sketch_rows == two.config.sketch_rows > 0
    exact = {name: value for name, value in one.state_dict().items() if not name.startswith("sketch")}
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in exact.items())
    for first, second in zip(one.directions(), two.directions(), strict=True):  # sums in another order
        torch.testing.assert_close(
            first.T @ first, second.T @ second, atol=0.05 * float((first**2).sum(0).max()), rtol=0
        )
