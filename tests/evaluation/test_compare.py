"""A comparison against what one gets by pruning and scoring by hand, without the recorded decoder inputs."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.evaluation.comparison import compare as module
from hf_lop.evaluation.comparison.compare import compare
from hf_lop.evaluation.comparison.fit import fit_pruners
from hf_lop.evaluation.comparison.table import Comparison, Row
from hf_lop.learning.data import fingerprint
from hf_lop.learning.importance import neuron_order, unit_importance
from hf_lop.learning.statistics import Statistics, collect_statistics
from hf_lop.planning.journal import Journal, merge_journals
from hf_lop.pruner.methods import usable_methods
from hf_lop.units.kinds import find_units
from tests.learning.test_rewards import answered, by_hand
from tests.small_models import text_batches

METHODS = ("lop", "additive", "uniform", "magnitude", "wanda", "flap")  # all of a pruner with additive plans
RATIOS, KINDS = (0.25, 0.5), ("perplexity", "divergence", "accuracy", "log_likelihood")


@pytest.fixture(scope="module")
def pruners(built, pruner):
    """A second seed without another fit: other statistics, order and predictions."""
    other, drawn = copy.deepcopy(pruner), text_batches(2, seed=31)
    statistics = collect_statistics(built["gated"], drawn)
    for name in Statistics.__slots__:
        getattr(other, name).copy_(torch.cat([getattr(layer, name) for layer in statistics]))
    order = neuron_order(unit_importance(built["gated"], find_units(built["gated"]), "l2", statistics))
    other.neuron_order.copy_(torch.cat(order).to(torch.uint16))
    other.predictor.head.bias.data.add_(torch.linspace(-0.3, 0.3, 4))
    prints = {"calibration_sha256": fingerprint(drawn), "search_sha256": fingerprint(text_batches(1, seed=32))}
    other.config.calibration = {**other.config.calibration, **prints}
    return [pruner, other]


@pytest.fixture(scope="module")
def report():
    return answered(text_batches(3, seed=77))


@pytest.fixture(scope="module")
def options():
    return {
        "ratios": RATIOS,
        "recover": (None, "fold", "lstsq", "sequential"),
        "data": text_batches(6, seed=78),
        "rewards": KINDS,
        "progress": False,
    }


@pytest.fixture(scope="module")
def compared(built, pruners, report, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    before = copy.deepcopy(built["gated"].state_dict())
    result = compare(pruners, built["gated"], report, folder=folder, **options)
    assert built["gated"].config.intermediate_size == 48
    assert all(torch.equal(value, before[key]) for key, value in built["gated"].state_dict().items())
    return result, folder


def test_rows_are_complete_and_meet_their_ratio(compared, pruners):
    assert usable_methods(pruners[0].config) == list(METHODS)
    rows = compared[0].rows
    expected = [
        (method, ratio, recover, seed)
        for seed in (0, 1)
        for method in METHODS
        for ratio in RATIOS
        for recover in (None, "fold", "lstsq", "sequential")
    ]
    assert [row.key for row in rows] == [("dense", 0.0, None, None), *expected]
    dense = rows[0].parameters
    for row in rows[1:]:
        assert tuple(row.scores) == KINDS
        assert row.neurons_removed == pytest.approx(row.ratio)
        assert sum(row.widths) == round(192 * (1 - row.ratio))
        assert row.parameters == dense - 3 * 32 * (192 - sum(row.widths))  # gate, up, down
        assert row.parameters_removed == pytest.approx(1 - row.parameters / dense)
        np.testing.assert_allclose(row.ratios, 1 - np.array(row.widths) / 48)
        assert 0 < row.seconds < 5
        assert (row.cold_seconds == 0) if row.method == "magnitude" else row.cold_seconds > 0


def test_dense_row_equals_an_independent_computation(compared, built, report):
    dense = compared[0].rows[0]
    assert (dense.widths, dense.neurons_removed, dense.parameters_removed) == ((48,) * 4, 0, 0)
    assert dense.parameters == built["gated"].num_parameters()
    for kind, score in dense.scores.items():
        assert (score.value, score.standard_error) == pytest.approx(
            by_hand(kind, built["gated"], built["gated"], report), abs=1e-6
        )
        assert score.samples == 6


@pytest.mark.parametrize("recover", [None, "fold", "lstsq", "sequential"])
@pytest.mark.parametrize(("method", "seed"), [("lop", 0), ("lop", 1), ("flap", 1)])
def test_rows_equal_pruning_by_hand(compared, built, pruners, report, options, method, seed, recover):
    row = next(row for row in compared[0].rows if row.key == (method, 0.5, recover, seed))
    data = options["data"] if recover in ("lstsq", "sequential") else None
    model = copy.deepcopy(built["gated"])
    pruned = pruners[seed].prune(model, 0.5, method=method, recover=recover, data=data)
    assert list(row.widths) == pruned.config.intermediate_size
    for kind, score in row.scores.items():
        expected = by_hand(kind, built["gated"], pruned, report)
        assert (score.value, score.standard_error) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_perplexity_without_labels_leaves_out_unknown_targets(built, pruners):
    report = text_batches(2, seed=5, padded=True)
    rows = compare(pruners[:1], built["gated"], report, ratios=[0.5], methods=["lop"], progress=False).rows
    pruned = pruners[0].prune(copy.deepcopy(built["gated"]), 0.5)
    for row, model in zip(rows, (built["gated"], pruned), strict=True):
        value, error = by_hand("perplexity", built["gated"], model, report)
        assert row.scores["perplexity"].value == pytest.approx(value, rel=1e-5)
        assert row.scores["perplexity"].standard_error == pytest.approx(error, rel=1e-4)


@pytest.mark.slow
def test_resumed_comparison_is_identical(compared, built, pruners, report, options, tmp_path, monkeypatch):
    result, folder = compared
    lines = (folder / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(result.rows)
    # Killed after 20 rows: those come from the file, and all others are computed anew.
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:21]) + "\n")
    resumed = compare(pruners, built["gated"], report, folder=tmp_path, **options)
    assert without_times(resumed) == without_times(result)
    assert resumed.rows[:20] == result.rows[:20]
    # A finished comparison runs no model at all.
    monkeypatch.setattr(module, "record_batches", None)
    again = compare(pruners, built["gated"], report, folder=folder, **options)
    assert (again.to_json(), again.to_markdown()) == (result.to_json(), result.to_markdown())


def without_times(comparison):
    return [{**row.to_dict(), "seconds": None} for row in comparison.rows]


def test_more_ratios_are_added_to_a_folder_and_other_data_refused(built, pruners, report, tmp_path):
    options = {"methods": ["uniform"], "folder": tmp_path, "progress": False}
    first = compare(pruners, built["gated"], report, ratios=[0.5], **options)
    more = compare(pruners, built["gated"], report, ratios=[0.25, 0.5], **options)
    assert [row for row in more.rows if row.ratio != 0.25] == list(first.rows)
    with pytest.raises(InvalidInputError, match=r'report_sha256 was "[0-9a-f]{16}" and is now "'):
        compare(pruners, built["gated"], text_batches(1, seed=40), ratios=[0.5], **options)
    with pytest.raises(InvalidInputError, match=r"pruners was .* and is now "):
        compare(pruners[::-1], built["gated"], report, ratios=[0.5], **options)
    (tmp_path / "rows.jsonl").write_text("{\n")
    with pytest.raises(InvalidInputError, match=r"Line 1 of .*rows\.jsonl is no entry"):
        compare(pruners, built["gated"], report, ratios=[0.5], **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"report": text_batches(2)}, "calibration data of pruner 0"),
        ({"report": text_batches(1, seed=32)}, "search data of pruner 1"),
        ({"recover": ["lstsq"], "data": text_batches(3, seed=77)[1:]}, "among the batches for recovery"),
        ({"recover": ["lstsq"]}, "needs data"),
        ({"recover": ["lora"]}, "'lora'; choose from None, sequential, lstsq, sketch, fold, bias"),
        ({"methods": ["taylor"]}, "'taylor'; choose from lop"),
        ({"methods": ["cmaes"]}, "no plans of cmaes"),
        ({"rewards": ["bleu"]}, "'bleu'; choose from"),
        ({"rewards": ["accuracy"]}, "no labels"),
        ({"report": [{"input_ids": torch.ones(2, 1, dtype=torch.long)}]}, "known target"),
        ({"report": []}, "No batch"),
        ({"ratios": [0.0]}, r"must be in \(0, 1\)"),
        ({"ratios": []}, "ratios is empty"),
        ({"pruners": []}, "pruners is empty"),
    ],
)
def test_mistakes_are_refused(built, pruners, changes, words):
    arguments = {"pruners": pruners, "model": built["gated"], "report": text_batches(3, seed=77), "progress": False}
    with pytest.raises(InvalidInputError, match=words):
        compare(**{**arguments, **changes})


def test_a_pruner_of_another_model_is_refused(built, pruners, report):
    with pytest.raises(CheckpointMismatchError):
        compare(pruners, built["fused"], report, progress=False)


def test_points_are_means_and_deviations_over_seeds(compared):
    point = next(p for p in compared[0].points if (p.method, p.recover, p.ratio) == ("lop", "fold", 0.5))
    rows = [row for row in compared[0].rows if row.key[:3] == ("lop", 0.5, "fold")]
    a, b = (row.scores["divergence"].value for row in rows)
    assert point.mean["divergence"] == pytest.approx((a + b) / 2)
    assert point.spread["divergence"] == pytest.approx(abs(a - b) / math.sqrt(2))
    np.testing.assert_allclose(point.ratios, np.mean([row.ratios for row in rows], axis=0))


def test_markdown_has_dense_and_one_best_value_per_column(compared):
    text = compared[0].to_markdown()
    tables = text.split("### ")[1:]
    assert [table.splitlines()[0] for table in tables] == list(KINDS)
    for kind, table in zip(KINDS, tables, strict=True):
        lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if line[:1] == "|"]
        assert lines[0] == ["method", "recovery", "R = 0.25", "R = 0.5", "cold (s)", "plan (ms)"]
        assert lines[2][2:4] == ["25.0%", "50.0%"]
        assert lines[3][2].endswith("%")
        assert lines[4][:3] == ["dense", "", f"{compared[0].rows[0].scores[kind].value:.3f}"]
        assert len(lines) == 5 + 4 * len(METHODS)
        for column, ratio in ((2, 0.25), (3, 0.5)):
            best = max(point.mean[kind] for point in compared[0].points if point.ratio == ratio)
            bold = [line[column] for line in lines if "**" in line[column]]
            assert bold
            assert all(cell.startswith(f"**{best:.3f}** ± ") for cell in bold)


def test_json_holds_every_row(compared):
    stored = json.loads(compared[0].to_json())
    assert [Row.from_dict(row) for row in stored["rows"]] == list(compared[0].rows)
    assert stored["settings"]["rewards"] == list(KINDS)


def test_a_single_sample_and_seed_give_valid_json_and_no_spread(built, pruners):
    report = [{"input_ids": text_batches(1, seed=90)[0]["input_ids"][:1]}]
    result = compare(pruners[:1], built["gated"], report, ratios=[0.5], methods=["uniform"], progress=False)
    assert json.loads(result.to_json())["rows"][0]["scores"]["perplexity"]["standard_error"] is None
    assert "±" not in result.to_markdown()
    assert "nan" not in result.to_markdown()


@pytest.mark.slow
def test_everything_is_saved_and_plots_are_pictures(compared, tmp_path):
    plain = Comparison(tuple(row for row in compared[0].rows if row.recover is None), compared[0].settings)
    files = plain.save(tmp_path / "new")
    names = ["comparison.md", "comparison.json", "quality_ratio.png", "quality_parameters.png", "layer_ratios.png"]
    assert [file.name for file in files] == names
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(names)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[2:])
    assert files[0].read_text() == str(plain)


@pytest.mark.slow
def test_searches_are_fitted_together_compared_and_drawn(built, tmp_path):
    model, draws = built["gated"], [(text_batches(2, seed=s), text_batches(1, seed=s + 50)) for s in (1, 2)]
    pruners = fit_pruners(model, draws, ["cmaes", "mcts"], tmp_path, evaluations=4)
    assert {path.name for path in tmp_path.iterdir()} == {f"fit-{s}-{e}" for s in (0, 1) for e in ("cmaes", "mcts")}
    for seed, pruner in enumerate(pruners):
        assert pruner.config.calibration["search"] == "cmaes"
        assert {"calibration", "probes", "cmaes", "mcts", "predictor"} == set(pruner.config.calibration["seconds"])
        best = {
            name: max(e.reward for e in merge_journals(tmp_path / f"fit-{seed}-{name}") if e.target == 0.5)
            for name in ("cmaes", "mcts")
        }
        tables = {"cmaes": pruner.config.search_table, **pruner.config.other_tables}
        for name, value in best.items():
            assert next(row["reward"] for row in tables[name] if row["ratio"] == 0.5) == value
    result = compare(pruners, model, text_batches(1, seed=9), ratios=[0.3, 0.5], progress=False)
    assert {"lop", "additive", "cmaes", "mcts"} <= {row.method for row in result.rows}
    journals = {name: [tmp_path / f"fit-{seed}-{name}" for seed in (0, 1)] for name in ("cmaes", "mcts")}
    files = result.save(tmp_path / "out", journals)
    assert files[-1].name == "searches.png"
    assert files[-1].read_bytes().startswith(b"\x89PNG")
    again = fit_pruners(model, draws, ["cmaes", "mcts"], tmp_path, evaluations=4)
    assert [p.config.calibration["seconds"]["mcts"] for p in again] == [
        p.config.calibration["seconds"]["mcts"] for p in pruners
    ]


def test_curves_are_the_best_so_far_at_the_nearest_target(compared, tmp_path, monkeypatch):
    with Journal(tmp_path, {}) as journal:
        for target, width, reward in ((0.3, 1, -3.0), (0.3, 2, -1.0), (0.3, 3, -2.0), (0.5, 4, -4.0)):
            journal.add(target, (width,), reward)
    drawn = []
    monkeypatch.setattr("hf_lop.evaluation.comparison.table.plot_searches", lambda curves, path: drawn.append(curves))
    assert compared[0].plot_searches({"mcts": [tmp_path]}, tmp_path / "x.png")
    assert drawn == [{0.3: {"mcts": [[-3.0, -1.0, -1.0]]}, 0.5: {"mcts": [[-4.0]]}}]
    assert not compared[0].plot_searches({}, tmp_path / "x.png")
