import copy

import numpy as np
import pytest
import torch

from hf_lop import demo
from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.learning.importance import neuron_order, unit_importance
from hf_lop.planning.additive import additive_plans
from hf_lop.planning.baselines import global_threshold
from hf_lop.planning.budget import Budget
from hf_lop.planning.plan import plan_budget
from hf_lop.pruner.fit import PROBE_RATIOS
from hf_lop.pruner.methods import METHODS, choose, cold_seconds, usable_methods
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import masking
from tests.families import build
from tests.helpers import logits
from tests.small_models import text_batches


def rules(method, pruner, model):
    return choose(method, pruner.config, pruner.learned(), pruner.predict, model, find_units(model))


@pytest.fixture(scope="module")
def searched(built):
    """A pruner fitted by tree search, which also holds the plans of CMA-ES."""
    options = {"targets": (0.3, 0.6), "evaluations": 8, "predictor": "mlp"}
    mcts, cmaes = (
        LOPPruner.fit(built["gated"], text_batches(2), text_batches(1, seed=1), search=search, **options)
        for search in ("mcts", "cmaes")
    )
    mcts.config.other_tables = {"cmaes": cmaes.config.search_table}
    return mcts


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("mcts", "cmaes")])
def test_every_method_meets_the_budget_and_says_what_it_is(pruner, llama, method):
    pruned = pruner.prune(llama, 0.5, method=method, recover=None)
    widths = pruned.config.intermediate_size
    assert sum(widths) == 96
    facts = pruned.config.pruning_config
    assert (facts["method"], facts["recovery"]) == (method, None)
    assert facts["criterion"] == (METHODS[method].criterion or "l2")
    if method in ("uniform", "magnitude", "wanda"):
        assert set(widths) == {24}


@pytest.mark.parametrize(("method", "criterion"), [("magnitude", "magnitude"), ("wanda", "wanda"), ("flap", "wifv")])
def test_baselines_equal_the_masked_model_by_the_book(pruner, built, llama, batches, method, criterion):
    model = built["gated"]
    units = find_units(model)
    scores = unit_importance(model, units, criterion, pruner.statistics())
    ratios = global_threshold([s.numpy() for s in scores], 0.5) if method == "flap" else np.full(4, 0.5)
    kept = [o[: round(48 * (1 - r))] for o, r in zip(neuron_order(scores), ratios, strict=True)]
    with masking(model, units, kept):
        expected = logits(model, batches[0])
    pruned = pruner.prune(llama, 0.5, method=method, recover=None)
    torch.testing.assert_close(logits(pruned, batches[0]), expected, rtol=1e-5, atol=1e-5)


def test_table_is_what_the_predictor_learned_from(pruner, llama):
    row = next(row for row in pruner.config.search_table if row["ratio"] == 0.5)
    widths = plan_budget(pruner.look_up, pruner.config.size, Budget.of(0.5)).widths
    np.testing.assert_allclose(widths, 48 * (1 - np.array(row["ratios"])), atol=1)
    with pytest.raises(InvalidInputError, match='method="table" is gone: name the search'):
        pruner.prune(llama, 0.5, method="table")


def test_additive_is_exact_at_any_target_and_survives_a_file(pruner, llama, tmp_path):
    damage, around = (np.array(pruner.config.probes[name]) for name in ("damage", "around"))
    assert damage.shape == around.shape == (4, len(PROBE_RATIOS)) == (4, len(pruner.config.probes["ratios"]))
    pruner.save_pretrained(tmp_path)
    loaded = LOPPruner.from_pretrained(tmp_path)
    for target in (0.0, 0.217, 0.5, 0.93):
        expected = additive_plans(damage, PROBE_RATIOS, [48] * 4, [min(target, 0.925)], around=around, context=0.5)[0]
        ratios, _ = rules("additive", loaded, llama)
        np.testing.assert_array_equal(ratios(target), expected)
        model = loaded.prune(copy.deepcopy(llama), target, method="additive")
        assert sum(48 - f.count for f in find_units(model)) == pytest.approx(192 * target, abs=1)
    row = next(row for row in pruner.config.search_table if row["ratio"] == 0.5)
    np.testing.assert_allclose(rules("additive", pruner, llama)[0](0.5), row["ratios"], atol=1e-5)


@pytest.mark.parametrize("method", ["mcts", "cmaes"])
def test_a_search_s_own_plans(searched, llama, method):
    rows = searched.config.search_table if method == "mcts" else searched.config.other_tables["cmaes"]
    model = searched.prune(llama, 0.3, method=method)
    np.testing.assert_allclose(model.config.intermediate_size, 48 * (1 - np.array(rows[0]["ratios"])), atol=1)
    assert model.config.pruning_config["method"] == method


def test_methods_that_a_pruner_was_not_fitted_for(pruner, searched, llama, monkeypatch):
    monkeypatch.setattr("hf_lop.pruner.prune.load_model", None)  # refused before a model is loaded
    for method in ("mcts", "cmaes"):
        with pytest.raises(
            InvalidInputError, match=f'fitted with additive. Fit one with LOPPruner.fit.*search="{method}"'
        ):
            pruner.prune("org/base", 0.5, method=method)
    others = ["uniform", "magnitude", "wanda", "flap"]
    assert usable_methods(pruner.config) == ["lop", "additive", *others]
    assert usable_methods(searched.config) == ["lop", "additive", "mcts", "cmaes", *others]
    old = copy.deepcopy(pruner.config)
    old.probes = None  # as repositories made before probes were kept: their table is additive
    assert usable_methods(old) == ["lop", "additive", *others]
    old.calibration = None
    assert usable_methods(old) == ["lop", *others]
    old.search_table = None
    assert usable_methods(old) == ["lop", *others]


def test_the_demo_s_pruner_plans_additively(built):
    pruner = demo.load_pruner()
    model = demo.load_model()[0]
    row = next(row for row in pruner.config.search_table if row["ratio"] == 0.5)
    widths = pruner.prune(model, 0.5, method="additive").config.text_config.intermediate_size
    np.testing.assert_allclose(widths, 64 * (1 - np.array(row["ratios"])), atol=1)


def test_another_table_is_no_search_s(searched):
    changed = copy.deepcopy(searched)
    changed.train_predictor("mlp", table=[{"ratio": 0.5, "ratios": [0.5] * 4}])
    assert changed.config.table_of("mcts") is None
    assert "mcts" not in usable_methods(changed.config)
    assert searched.config.table_of("mcts") is not None


def test_cold_seconds_add_up_what_a_method_needs(searched):
    spent = searched.config.calibration["seconds"]
    assert set(spent) == {"calibration", "probes", "mcts", "predictor"}
    assert all(value > 0 for value in spent.values())
    assert cold_seconds("lop", searched.config) == pytest.approx(sum(spent.values()))
    assert cold_seconds("mcts", searched.config) == pytest.approx(sum(spent.values()) - spent["predictor"])
    assert cold_seconds("additive", searched.config) == pytest.approx(spent["calibration"] + spent["probes"])
    assert cold_seconds("flap", searched.config) == spent["calibration"]
    assert cold_seconds("magnitude", searched.config) == 0
    old = copy.deepcopy(searched.config)
    del old.calibration["seconds"]
    assert cold_seconds("lop", old) is None


def test_least_squares_brings_the_outputs_back(pruner, built):
    held_out, data = text_batches(2, seed=9), text_batches(40, seed=5)
    distance = {}
    for recover in (None, "lstsq", "auto"):
        options = {"data": iter(data)} if recover else {}
        pruned = pruner.prune(copy.deepcopy(built["gated"]), 0.3, method="uniform", recover=recover, **options)
        assert pruned.config.pruning_config["recovery"] == (recover if recover != "auto" else "sequential")
        differences = [logits(pruned, batch) - logits(built["gated"], batch) for batch in held_out]
        distance[recover] = float(torch.cat(differences).square().mean())
    assert distance["lstsq"] < 0.9 * distance[None]
    assert distance["auto"] < 0.9 * distance[None]


def test_layers_that_cannot_be_fitted_in_turn_are_fitted_by_themselves():
    model, data = build("gemma2"), text_batches(60)  # a norm behind every FFN
    pruner = LOPPruner.fit(model, data[:8], text_batches(1, seed=1), predictor="mlp", sketch_rows=0)
    with pytest.raises(UnsupportedModelError, match="do not simply add"):
        pruner.prune(model, 0.3, recover="sequential", data=iter(data))
    assert model.config.intermediate_size == build("gemma2").config.intermediate_size  # nothing was changed
    assert pruner.prune(model, 0.3, data=iter(data)).config.pruning_config["recovery"] == "lstsq"


def test_fold_needs_no_data_and_keeps_the_architecture(pruner, llama, built):
    pruned = pruner.prune(llama, 0.5, recover="fold")
    plain = pruner.prune(copy.deepcopy(built["gated"]), 0.5, recover=None)
    assert pruned.config.intermediate_size == plain.config.intermediate_size
    assert set(pruned.state_dict()) == set(plain.state_dict())
    down = pruned.model.layers[3].mlp.down_proj.weight
    assert not torch.equal(down, plain.model.layers[3].mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "taylor"}, "choose one of lop"),
        ({"recover": "lora"}, 'choose "auto"'),
        ({"recover": None, "data": []}, "reads no data"),
        ({"recover": "lstsq"}, "needs data"),
        ({"data": []}, "batch"),
        ({"recover": "fold", "data": []}, "reads no data"),
    ],
)
def test_mistakes_change_nothing(pruner, llama, built, options, words):
    with pytest.raises(InvalidInputError, match=words):
        pruner.prune(llama, 0.5, **options)
    assert llama.config.intermediate_size == 48
    assert all(torch.equal(v, built["gated"].state_dict()[k]) for k, v in llama.state_dict().items())
