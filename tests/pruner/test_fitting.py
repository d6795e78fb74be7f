import copy
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from hf_lop import demo
from hf_lop.errors import InvalidInputError
from hf_lop.learning.data import fingerprint, model_batches, read_rows, rows_fingerprint, split_rows
from hf_lop.planning.table import training_pairs
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.recovery.by_layer import set_output_weights
from hf_lop.recovery.choose import recovered_weights
from hf_lop.units.slice import prunable_units, slice_units
from tests.conftest import slow
from tests.small_models import text_batches

SEARCH = {"search": "mcts", "targets": (0.3, 0.5), "evaluations": 6, "predictor": "mlp"}


def fit(model, journal=None, **changes):
    return LOPPruner.fit(model, text_batches(2), text_batches(1, seed=1), journal=journal, **{**SEARCH, **changes})


@pytest.mark.parametrize("search", ["mcts", *slow("cmaes")])
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
    monkeypatch.setattr("hf_lop.pruner.fit.probe_layers", None)  # calling it would fail
    again = fit(built["gated"], tmp_path)
    assert again.config.search_table == first.config.search_table
    assert (tmp_path / "evaluations-00000.jsonl").read_text().splitlines() == lines
    assert json.loads((tmp_path / "probes.json").read_text())["settings"]["criterion"] == "l2"


def test_a_search_maximises_any_callable_and_its_journal_knows_it_by_name(built, tmp_path):
    calls = []

    def last_layer_wide(candidate):
        calls.append(candidate.model.layers[3].mlp.down_proj.in_features)
        return float(calls[-1])

    found = fit(built["gated"], tmp_path, reward=last_layer_wide, targets=(0.5,), evaluations=10, search="cmaes")
    row = found.config.search_table[0]
    assert row["reward"] == max(calls) == round(48 * (1 - row["ratios"][3]))
    assert len(set(calls)) > 1
    assert found.config.calibration["reward"] == "last_layer_wide"
    again = fit(built["gated"], tmp_path, reward=last_layer_wide, targets=(0.5,), evaluations=10, search="cmaes")
    assert (again.config.search_table, len(calls)) == (found.config.search_table, 10)
    last_layer_wide.name = "another"
    with pytest.raises(InvalidInputError, match='reward was "last_layer_wide" and is now "another"'):
        fit(built["gated"], tmp_path, reward=last_layer_wide, targets=(0.5,), evaluations=10, search="cmaes")


def test_journal_of_another_fit_is_refused(built, tmp_path):
    fit(built["gated"], tmp_path)
    with pytest.raises(InvalidInputError, match='criterion was "l2" and is now "magnitude"; order_sha256 was "'):
        fit(built["gated"], tmp_path, criterion="magnitude")
    with pytest.raises(InvalidInputError, match="reward"):
        fit(built["gated"], tmp_path, reward="perplexity")


def test_mistakes_are_refused_before_any_work(built):
    with pytest.raises(InvalidInputError, match="search is 'annealing'"):
        fit(built["gated"], search="annealing")
    with pytest.raises(InvalidInputError, match="divergence"):
        fit(built["gated"], reward="beauty")
    with pytest.raises(InvalidInputError, match='search="additive" never looks at'):
        fit(built["gated"], reward="accuracy", search="additive")


def test_same_data_for_calibration_and_search_warns(built):
    batches = text_batches(1)
    with pytest.warns(UserWarning, match="same data"):
        LOPPruner.fit(built["gated"], batches, copy.deepcopy(batches), predictor="mlp")


TEXTS = [
    f"what {color} {shape} is at the center" for color in ("red", "green", "blue") for shape in ("circle", "square")
]


@pytest.mark.parametrize("kind", ["chats", *slow("texts", "dataset", "file")])
def test_samples_of_every_kind_are_split_and_recorded(kind, tmp_path):
    model, processor = demo.load_model()
    rows = demo.load_data("search", 12)
    data = {"texts": TEXTS * 2, "chats": [demo.messages(row, True) for row in rows], "dataset": rows}.get(kind)
    if kind == "file":
        rows.to_parquet(data := str(tmp_path / "questions.parquet"))
    options = {"samples": 5, "search_samples": 4, "targets": (0.5,), "predictor": "mlp", "seed": 3}
    found = LOPPruner.fit(model, data, processor=processor, batch_size=4, **options)
    facts = found.config.calibration
    assert facts["samples"] == {"calibration": 5, "search": 4, "report": 3}
    assert facts["seed"] == 3
    parts = split_rows(read_rows(data) if kind == "file" else data, (5, 4, 3), seed=3)
    batches = [list(model_batches(processor, part, batch_size=4)) for part in parts]
    for name, made in zip(("calibration", "search"), batches, strict=False):
        assert facts[f"{name}_sha256"] == fingerprint(made)
    assert facts["report_samples_sha256"] == rows_fingerprint(parts[2]) != rows_fingerprint(parts[1])
    assert facts.get("dataset") == ("questions.parquet" if kind == "file" else None)
    if kind == "chats":  # ready batches give the same
        ready = LOPPruner.fit(model, batches[0], batches[1], targets=(0.5,), predictor="mlp", seed=3)
        assert ready.config.search_table == found.config.search_table


@pytest.mark.slow
def test_a_folder_brings_its_processor_and_no_report_may_be_left():
    found = LOPPruner.fit(demo.MODEL_DIR, TEXTS, samples=4, search_samples=2, targets=(0.5,), predictor="mlp")
    assert found.config.calibration["samples"] == {"calibration": 4, "search": 2}
    assert "report_samples_sha256" not in found.config.calibration


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TEXTS[:3], "3 rows cannot be split"),
        ([], "0 rows cannot be split"),
        (text_batches(3), "as validation"),
        ({"train": TEXTS}, "data is a dict; pass"),
        (iter(TEXTS), "iterator; pass"),
        ("missing.json", "is no file"),
        (TEXTS, "has no processor"),
    ],
)
def test_samples_that_cannot_be_used_are_refused_before_any_work(built, monkeypatch, data, words):
    monkeypatch.setattr("hf_lop.pruner.pruner.fit", None)  # calling it would fail
    with pytest.raises(InvalidInputError, match=words):
        LOPPruner.fit(built["gated"], data, samples=2, search_samples=2)


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
        np.testing.assert_allclose(ratios[np.abs(targets - row["ratio"]).argmin()], row["ratios"])
    np.testing.assert_allclose(ratios.mean(1), targets)
    assert len(targets) >= 256


FIT = """
import os, random, shutil, signal, sys, time
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.recovery.by_layer import set_output_weights
from hf_lop.recovery.choose import recovered_weights
from tests.small_models import build
from tests.pruner.test_fitting import fit

folder, model, moments = sys.argv[1], build("gated"), random.Random()

def start(name):
    if (child := os.fork()) == 0:
        fit(model, folder + "/journal", evaluations=60).save_pretrained(folder + "/" + name)
        os._exit(0)
    return child

begin = time.monotonic()
assert os.waitpid(start("whole"), 0)[1] == 0
whole = time.monotonic() - begin
done = 0
while done < 10:
    shutil.rmtree(folder + "/journal")
    child = start("killed")
    time.sleep(moments.uniform(0, whole))
    os.kill(child, signal.SIGKILL)
    if os.WIFEXITED(os.waitpid(child, 0)[1]):
        continue  # it had finished already
    os.makedirs(folder + "/journal", exist_ok=True)
    assert os.waitpid(start(f"resumed-{done}"), 0)[1] == 0
    done += 1
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fit_killed_at_ten_random_moments_resumes_each_time_to_the_same_pruner(tmp_path):
    """Every kill is a SIGKILL of a whole process, forked with all imports done; every resumed fit runs to its end."""
    command = [sys.executable, "-c", FIT, str(tmp_path)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, check=True, capture_output=True)
    expected = LOPPruner.from_pretrained(tmp_path / "whole")
    for index in range(10):
        resumed = LOPPruner.from_pretrained(tmp_path / f"resumed-{index}")
        assert resumed.config.search_table == expected.config.search_table
        assert resumed.config.probes == expected.config.probes
        for name, value in resumed.state_dict().items():
            assert torch.equal(value, expected.state_dict()[name]), name
        assert resumed.plan(0.4) == expected.plan(0.4)


@pytest.mark.parametrize("kind", ["gated", *slow("conv1d", "fused")])
def test_candidates_are_judged_as_prune_leaves_them(built, kind):
    """The reward that a search saw is the pruned model's own, recovery included."""
    search = text_batches(2, seed=1)
    options = {"search": "cmaes", "targets": (0.5,), "evaluations": 4, "predictor": "mlp", "reward": "perplexity"}
    calibration = text_batches(12)
    found = LOPPruner.fit(built[kind], calibration, search, recover="sketch", **options)
    row = found.config.search_table[0]
    assert found.config.calibration["recovery"] == "sketch"
    widths = [max(1, round(48 * (1 - ratio))) for ratio in row["ratios"]]
    pruned = {}
    for recover in ("sketch", None):
        model = copy.deepcopy(built[kind])
        units = prunable_units(model)
        kept = [order[:width] for order, width in zip(found.order(), widths, strict=True)]
        weights = recovered_weights(recover, model, units, kept, found.statistics(), found.learned().directions)
        cut = slice_units(model, kept)
        if weights is not None:
            set_output_weights(model, cut, weights)
        with torch.no_grad():
            logits = torch.cat([model(**batch).logits[:, :-1].flatten(0, 1) for batch in search])
        ids = torch.cat([batch["input_ids"][:, 1:].flatten() for batch in search])
        pruned[recover] = -float(torch.nn.functional.cross_entropy(logits, ids))
    assert row["reward"] == pytest.approx(pruned["sketch"], abs=1e-5)
    assert row["reward"] != pytest.approx(pruned[None], abs=1e-4)


@pytest.mark.slow
def test_probes_after_recovery_are_kept_apart_in_the_journal(built, tmp_path):
    calibration, options = text_batches(12), {"targets": (0.5,), "predictor": "mlp", "journal": tmp_path}
    first = LOPPruner.fit(built["gated"], calibration, text_batches(1, seed=1), recover="sketch", **options)
    again = LOPPruner.fit(built["gated"], calibration, text_batches(1, seed=1), recover="sketch", **options)
    assert first.config.probes == again.config.probes
    with pytest.raises(InvalidInputError, match='recovery was "sketch" and is now absent'):
        LOPPruner.fit(built["gated"], calibration, text_batches(1, seed=1), **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recover": "lstsq"}, "recover is 'lstsq'"),
        ({"recover": "sketch", "sketch_rows": 0}, "sketch_rows is 0"),
        ({"recover": "sketch"}, "more calibration tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore:Calibration has")
def test_a_recovery_that_cannot_judge_is_refused(built, changes, words):
    with pytest.raises(InvalidInputError, match=words):
        LOPPruner.fit(built["gated"], text_batches(1)[:1], text_batches(1, seed=1), **changes)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"settings": {', b"[]", b"{}", b"null", b'"x"', b"[" * 100_000, b"\xff\xfe"],
)
def test_a_damaged_file_of_a_journal_is_named(llama, tmp_path, content):
    fit = partial(LOPPruner.fit, llama, text_batches(2), text_batches(1, seed=1), predictor="mlp", journal=tmp_path)
    whole = fit().config.probes
    seconds = (tmp_path / "seconds.json").read_bytes()
    (tmp_path / "probes.json").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"probes\.json (is no|was written under other)"):
        fit()
    (tmp_path / "probes.json").unlink()
    (tmp_path / "seconds.json").write_bytes(content)
    if content != b"{}":
        with pytest.raises(InvalidInputError, match=r"seconds\.json is no"):
            fit()
        (tmp_path / "seconds.json").write_bytes(seconds)
    assert fit().config.probes == whole


@pytest.mark.parametrize(
    "change", [lambda rows: rows[:1], lambda rows: [["7"] * 8] * 8, lambda rows: [[None]], lambda _: 7]
)
def test_other_numbers_than_a_fit_writes_are_no_probes(llama, tmp_path, change):
    fit = partial(LOPPruner.fit, llama, text_batches(2), text_batches(1, seed=1), predictor="mlp", journal=tmp_path)
    fit()
    stored = json.loads((tmp_path / "probes.json").read_text())
    changed = {**stored, "damage": change(stored["damage"])}
    for _ in range(2):
        (tmp_path / "probes.json").write_text(json.dumps(changed))
        with pytest.raises(InvalidInputError, match=r"probes\.json is no"):
            fit()
        changed.pop("check", None)  # as version 0.1 wrote it
