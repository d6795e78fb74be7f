import copy
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from hf_lop.errors import InvalidInputError
from hf_lop.fitting import fingerprint, training_pairs
from hf_lop.pruner import LOPPruner
from tests.conftest import build, text_batches

SEARCH = {"search": "mcts", "targets": (0.3, 0.5), "evaluations": 6, "predictor": "mlp"}


def fit(model, journal=None, **changes):
    return LOPPruner.fit(model, text_batches(2), text_batches(1, seed=1), journal=journal, **{**SEARCH, **changes})


@pytest.mark.parametrize("search", ["mcts", "cmaes"])
def test_a_search_is_at_least_as_good_as_its_start(built, search):
    model = built["gated"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fit(model, search=search, targets=(0.5,), evaluations=20)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    start = fit(model, search=search, targets=(0.5,), evaluations=1)
    assert found.config.search_table[0]["reward"] >= start.config.search_table[0]["reward"]
    assert found.config.calibration["search"] == search
    assert np.mean(found.config.search_table[0]["ratios"]) == pytest.approx(0.5, abs=1 / 192)


def test_same_seed_same_pruner(built):
    first, second = fit(built["gated"]), fit(built["gated"])
    assert first.config.search_table == second.config.search_table
    assert first.plan(0.4) == second.plan(0.4)


def test_journal_answers_instead_of_the_model(built, tmp_path, monkeypatch):
    first = fit(built["gated"], tmp_path)
    lines = (tmp_path / "evaluations-00000.jsonl").read_text().splitlines()
    monkeypatch.setattr("hf_lop.fitting.probe_layers", None)  # calling it would fail
    again = fit(built["gated"], tmp_path)
    assert again.config.search_table == first.config.search_table
    assert (tmp_path / "evaluations-00000.jsonl").read_text().splitlines() == lines
    assert json.loads((tmp_path / "probes.json").read_text())["settings"]["criterion"] == "l2"


def test_journal_of_another_fit_is_refused(built, tmp_path):
    fit(built["gated"], tmp_path)
    with pytest.raises(InvalidInputError, match="another order_sha256, criterion"):
        fit(built["gated"], tmp_path, criterion="magnitude")
    with pytest.raises(InvalidInputError, match="reward"):
        fit(built["gated"], tmp_path, reward="perplexity")


def test_mistakes_are_refused_before_any_work(built):
    with pytest.raises(InvalidInputError, match="search is 'annealing'"):
        fit(built["gated"], search="annealing")
    with pytest.raises(InvalidInputError, match="divergence"):
        fit(built["gated"], reward="beauty")


def test_same_data_for_calibration_and_search_warns(built):
    batches = text_batches(1)
    with pytest.warns(UserWarning, match="same data"):
        LOPPruner.fit(built["gated"], batches, copy.deepcopy(batches), predictor="mlp")


def test_fingerprint_sees_every_value():
    batches = text_batches(2)
    other = copy.deepcopy(batches)
    assert fingerprint(batches) == fingerprint(other)
    other[1]["input_ids"][1, 9] += 1
    assert fingerprint(batches) != fingerprint(other)


def test_training_pairs_pass_through_the_rows():
    table = [{"ratio": 0.4, "ratios": [0.2, 0.6], "reward": 1.0}, {"ratio": 0.2, "ratios": [0.1, 0.3], "reward": 2.0}]
    targets, ratios = training_pairs(table, 2)
    assert targets[0] == 0
    assert not ratios[0].any()
    for row in table:
        torch.testing.assert_close(ratios[(targets - row["ratio"]).abs().argmin()], torch.tensor(row["ratios"]))
    torch.testing.assert_close(ratios.mean(1), targets)
    assert len(targets) >= 256


CHILD = """
import sys
from tests.conftest import build, text_batches
from hf_lop.pruner import LOPPruner
from tests.test_fitting import fit
print("ready", flush=True)
pruner = fit(build("gated"), sys.argv[1], evaluations=60)
pruner.save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_fit_resumes_to_the_same_pruner(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "journal"), str(tmp_path / "pruner")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    for delay in (0.3, 0.8, 1.5):
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    expected = fit(build("gated"), evaluations=60)
    resumed = LOPPruner.from_pretrained(tmp_path / "pruner")
    assert resumed.config.search_table == expected.config.search_table
    assert resumed.plan(0.4) == expected.plan(0.4)
