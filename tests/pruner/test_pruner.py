import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lop.errors import CheckpointMismatchError, InfeasibleBudgetError, InvalidInputError
from hf_lop.planning.table import read_table
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import masking
from tests.small_models import SMALL

COSTS = {"params": "parameters", "memory": "memory_after", "flops": "flops"}


class TestSeveralLimits:
    def test_all_hold_and_one_binds(self, pruner):
        alone = {kind: getattr(pruner.plan(0.4), attribute) for kind, attribute in COSTS.items()}
        for binding in alone:
            limits = {kind: value * (1 if kind == binding else 1.2) for kind, value in alone.items()}
            plan = pruner.plan(**limits)
            assert all(getattr(plan, COSTS[kind]) <= limit for kind, limit in limits.items())
            assert plan.widths == pruner.plan(**{binding: alone[binding]}).widths

    def test_a_ratio_is_a_limit_like_the_others(self, pruner):
        loose = pruner.plan(0).parameters
        assert pruner.plan(0.5, params=loose).widths == pruner.plan(0.5).widths
        tight = pruner.plan(0.7).parameters
        assert pruner.plan(0.2, params=tight).widths == pruner.plan(params=tight).widths

    def test_the_binding_one_is_named(self, pruner):
        dense = pruner.plan(0)
        with pytest.raises(InfeasibleBudgetError, match="flops: A budget of 10 is below"):
            pruner.plan(params=dense.parameters, flops=10)
        with pytest.raises(InfeasibleBudgetError, match=r"ratio is 0\.99, which keeps"):
            pruner.plan(0.99, params=dense.parameters)
        with pytest.raises(InvalidInputError, match="No budget was given; give at least one"):
            pruner.plan(round_to=8)

    def test_latency_is_measured_where_it_is_a_limit(self, pruner, monkeypatch):
        def seconds(size, **_):
            return np.array([1, 48]), np.array([1.0, 48.0])

        monkeypatch.setattr("hf_lop.pruner.prune.ffn_seconds", seconds)
        plan = pruner.plan(0.1, latency=100.0)
        assert plan.seconds == sum(plan.widths) == 100
        assert pruner.plan(0.6, latency=100.0).widths == pruner.plan(0.6).widths


class TestPlan:
    @pytest.mark.parametrize("ratio", [0, 0.1, 0.3, 0.5, 0.77, 0.8])
    @pytest.mark.parametrize("round_to", [1, 8])
    def test_ratio_is_met_within_one_step_from_below(self, pruner, ratio, round_to):
        plan = pruner.plan(ratio, round_to=round_to)
        allowed = 192 * (1 - ratio)
        assert allowed - round_to < sum(plan.widths) <= allowed + 1e-6
        assert all(width % round_to == 0 and 1 <= width <= 48 for width in plan.widths)

    def test_zero_keeps_everything(self, pruner):
        assert pruner.plan(0).widths == (48,) * 4
        assert pruner.plan(0.0).neurons_removed == 0

    @pytest.mark.parametrize(
        ("kind", "attribute"), [("params", "parameters"), ("memory", "memory_after"), ("flops", "flops")]
    )
    def test_other_budgets_are_met_within_one_neuron(self, pruner, kind, attribute):
        dense = getattr(pruner.plan(0), attribute)
        least = getattr(pruner.plan(0.97), attribute)
        step = (dense - least) // pruner.plan(0.97).neurons_removed
        for share in (0.2, 0.5, 0.9):
            budget = least + share * (dense - least)
            plan = pruner.plan(**{kind: budget})
            assert budget - step < getattr(plan, attribute) <= budget

    def test_memory_as_text(self, pruner):
        assert pruner.plan(memory="100KB").memory_after <= 100_000
        assert pruner.plan(memory="1GB") == pruner.plan(0)

    def test_latency_is_met_by_its_own_measure(self, pruner):
        plan = pruner.plan(latency=1.0)
        assert plan.widths == (48,) * 4
        assert 0 < plan.seconds < 1

    def test_same_plan_every_time_and_after_the_global_seed_changed(self, pruner):
        torch.manual_seed(1)
        first = pruner.plan(0.4)
        torch.manual_seed(2)
        assert pruner.plan(0.4) == first

    @pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan, math.inf, "0.3", True, None])
    def test_bad_ratio(self, pruner, ratio):
        with pytest.raises(InvalidInputError, match=r"ratio|budgets"):
            pruner.plan(ratio)

    @pytest.mark.parametrize(
        "budget", [{"params": 10}, {"memory": "1B"}, {"flops": 1}, {"latency": 0.0}, {"ratio": 0.999}]
    )
    def test_budget_below_the_smallest_model(self, pruner, budget):
        with pytest.raises(InfeasibleBudgetError, match="smallest possible"):
            pruner.plan(**budget)

    def test_too_little_memory_says_how_it_is_counted(self, pruner):
        with pytest.raises(InfeasibleBudgetError, match="Counted at 4 bytes per parameter"):
            pruner.plan(memory="1B")

    @pytest.mark.parametrize(
        "budget",
        [{"params": math.nan}, {"memory": "six"}, {"flops": -1}, {"latency": math.inf}, {"ratio": 0.1, "params": -1}],
    )
    def test_budget_that_is_none(self, pruner, budget):
        with pytest.raises(InvalidInputError):
            pruner.plan(**budget)

    def test_it_prints_and_draws(self, pruner, tmp_path):
        plan = pruner.plan(0.3)
        assert "of 192 FFN neurons removed" in str(plan)
        assert str(plan).count("layer ") == 4
        plan.plot(tmp_path / "plan.png")
        assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads(json.dumps(plan.to_dict()))["widths"] == list(plan.widths)


class TestPrune:
    def test_in_place_and_equal_to_the_masked_dense_model(self, pruner, llama, batches):
        plan = pruner.plan(0.4)
        units = find_units(llama)
        kept = [order[:width] for order, width in zip(pruner.order(), plan.widths, strict=True)]
        with masking(llama, units, kept), torch.inference_mode():
            masked = llama(**batches[0]).logits
        pruned = pruner.prune(llama, 0.4, recover=None)
        assert pruned is llama
        assert type(pruned) is LlamaForCausalLM
        with torch.inference_mode():
            torch.testing.assert_close(pruned(**batches[0]).logits, masked)
        assert pruned.config.intermediate_size == list(plan.widths)
        facts = pruned.config.pruning_config
        assert facts["base_model"] == "org/base"
        assert facts["ratio"] == round(plan.pruning_ratio, 6)
        assert facts["dense_widths"] == [48] * 4
        assert pruned.num_parameters() == plan.parameters

    def test_memory_counts_in_the_dtype_of_the_model(self, pruner, llama):
        model = llama.to(torch.bfloat16)
        budget = sum(p.nbytes for p in model.parameters()) * 0.9
        pruner.prune(model, memory=budget)
        assert budget - 2 * 3 * 32 < sum(p.nbytes for p in model.parameters()) <= budget

    def test_a_folder_is_loaded_first(self, pruner, llama, tmp_path):
        llama.to(torch.bfloat16).save_pretrained(tmp_path)
        pruned = pruner.prune(str(tmp_path), 0.3)
        assert isinstance(pruned, LlamaForCausalLM)
        assert pruned.dtype is torch.bfloat16
        assert not pruned.training

    def test_another_model_is_refused_unchanged(self, pruner):
        for change, words in (
            ({"intermediate_size": 40}, "FFN widths is"),
            ({"num_hidden_layers": 3}, "number of decoder layers is 4, this model's 3"),
            ({"hidden_size": 64}, "hidden size is 32, this model's 64"),
        ):
            model = LlamaForCausalLM(
                LlamaConfig(**{"intermediate_size": 48, "num_key_value_heads": 2, **SMALL, **change})
            )
            widths = [f.count for f in find_units(model)]
            with pytest.raises(CheckpointMismatchError, match=words):
                pruner.prune(model, 0.3)
            assert [f.count for f in find_units(model)] == widths

    def test_another_type_is_refused(self, pruner, built):
        with pytest.raises(CheckpointMismatchError, match="model type is llama, this model's phi3"):
            pruner.prune(copy.deepcopy(built["fused"]), 0.3)

    def test_another_commit_warns_or_is_refused(self, pruner, built):
        known = copy.deepcopy(pruner)
        known.config.base_revision, known.config.identity = "a" * 40, 0  # as of before there were fingerprints
        model = copy.deepcopy(built["gated"])
        model.config._commit_hash = "b" * 40
        with pytest.raises(CheckpointMismatchError, match="at commit aaaa"):
            known.prune(model, 0.3, strict=True)
        with pytest.warns(UserWarning, match="this model is at bbbb"):
            known.prune(model, 0.3)

    def test_twice_is_refused(self, pruner, llama):
        pruner.prune(llama, 0.3)
        widths = list(llama.config.intermediate_size)
        with pytest.raises(
            InvalidInputError,
            match="within the budget already: it keeps 134 of 192 pieces",
        ):
            pruner.prune(llama, 0.3)
        assert llama.config.intermediate_size == widths

    def test_bad_ratio_changes_nothing(self, pruner, llama, built):
        with pytest.raises(InvalidInputError):
            pruner.prune(llama, 1.0)
        for ours, dense in zip(llama.state_dict().values(), built["gated"].state_dict().values(), strict=True):
            assert torch.equal(ours, dense)
        assert not hasattr(llama.config, "pruning_config")


class TestFiles:
    def test_round_trip(self, pruner, tmp_path):
        pruner.save_pretrained(tmp_path)
        reloaded = LOPPruner.from_pretrained(tmp_path)
        assert reloaded.plan(0.37) == pruner.plan(0.37)
        assert all(
            torch.equal(a, b)
            for a, b in zip(reloaded.state_dict().values(), pruner.state_dict().values(), strict=True)
        )
        assert reloaded.neuron_order.dtype is torch.uint16
        assert reloaded.config.calibration["samples"] == 4
        assert isinstance(AutoModel.from_pretrained(tmp_path), LOPPruner)

    def test_half_precision_keeps_the_order(self, pruner, saved_pruner):
        half = LOPPruner.from_pretrained(saved_pruner, dtype=torch.bfloat16)
        assert torch.equal(half.neuron_order, pruner.neuron_order)
        assert sum(half.plan(0.5).widths) == 96

    def test_truncated_file(self, saved_pruner):
        path = saved_pruner / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointMismatchError, match="truncated or damaged"):
            LOPPruner.from_pretrained(saved_pruner)

    def test_missing_weight(self, saved_pruner):
        weights = load_file(saved_pruner / "model.safetensors")
        del weights["neuron_order"]
        save_file(weights, saved_pruner / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointMismatchError, match="neuron_order"):
            LOPPruner.from_pretrained(saved_pruner)

    def test_tampered_order(self, saved_pruner, llama):
        weights = load_file(saved_pruner / "model.safetensors")
        weights["neuron_order"][50] = weights["neuron_order"][51]
        save_file(weights, saved_pruner / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointMismatchError, match="layer 1 is no permutation"):
            LOPPruner.from_pretrained(saved_pruner).prune(llama, 0.3)
        assert llama.config.intermediate_size == 48

    def test_not_a_pruner(self, llama, tmp_path):
        llama.save_pretrained(tmp_path)
        with pytest.raises(CheckpointMismatchError, match="'llama', not a pruner"):
            LOPPruner.from_pretrained(tmp_path)


class TestTampered:
    """Pruned checkpoints whose config or weights were changed are refused when they are loaded."""

    @pytest.fixture
    def folder(self, pruner, llama, tmp_path):
        pruner.prune(llama, 0.3).save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda w: w[:-1], "3 entries for 4 decoder layers"),
            (lambda w: [*w, 5], "5 entries for 4 decoder layers"),
            (lambda w: [0, *w[1:]], r"intermediate_size\[0\] is 0"),
            (lambda w: [*w[:-1], -3], r"intermediate_size\[3\] is -3"),
            (lambda w: [10**9, *w[1:]], r"is 1000000000; each width"),
            (lambda w: [1.5, *w[1:]], r"is 1.5; each width"),
            (lambda w: [True, *w[1:]], r"is True; each width"),
        ],
    )
    def test_widths(self, folder, change, words):
        config = json.loads((folder / "config.json").read_text())
        config["intermediate_size"] = change(config["intermediate_size"])
        (folder / "config.json").write_text(json.dumps(config))
        for load in (LlamaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(CheckpointMismatchError, match=words):
                load(folder)

    def test_widths_of_other_weights(self, folder, pruner):
        config = json.loads((folder / "config.json").read_text())
        config["intermediate_size"][0] -= 1
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises((RuntimeError, ValueError), match=r"mismatch|shape"):
            LlamaForCausalLM.from_pretrained(folder)

    def test_truncated_weights(self, folder, pruner):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        from hf_lop.hub.read.load import load_model

        with pytest.raises(CheckpointMismatchError, match="truncated or damaged"):
            load_model(folder)


class TestPredictorTable:
    @pytest.mark.slow
    def test_retraining_on_another_table(self, pruner, tmp_path):
        table = [{"ratio": r, "ratios": [r] * 4} for r in np.linspace(0, 0.8, 81).tolist()]
        path = tmp_path / "table.json"
        path.write_text(json.dumps(table))
        uniform = copy.deepcopy(pruner)
        losses = uniform.train_predictor("mlp", table=read_table(path), seed=1)
        assert losses[-1] < losses[0]
        assert (uniform.config.predictor, uniform.config.search_table) == ("mlp", table)
        assert max(uniform.plan(0.5).ratios) - min(uniform.plan(0.5).ratios) < 0.2
        uniform.save_pretrained(tmp_path / "pruner")
        assert LOPPruner.from_pretrained(tmp_path / "pruner").plan(0.5) == uniform.plan(0.5)

    @pytest.mark.parametrize("table", [[], [{"ratio": 0.1}], [{"ratio": 0.1, "ratios": [0.1]}]])
    def test_bad_table(self, pruner, table):
        with pytest.raises(InvalidInputError):
            copy.deepcopy(pruner).train_predictor(table=table)

    @pytest.mark.parametrize("text", ["", "{}", "[1]", "[{]"])
    def test_bad_file(self, tmp_path, text):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(InvalidInputError):
            read_table(tmp_path / "table.json")


def test_estimates_are_kept_only_where_the_probes_speak_of_this_model(pruner, llama):
    """Another order of neurons, or candidates that were judged recovered, make the number one of something else."""

    def made(calibration, **options):
        other = copy.deepcopy(pruner)
        other.config.calibration = {**other.config.calibration, **calibration}
        return other.prune(copy.deepcopy(llama), 0.5, **options).config.pruning_config["estimated_divergence"]

    expected = pruner.config.estimate(pruner.plan(0.5).widths)
    assert made({}, recover=None) == pytest.approx(expected, rel=1e-3)
    assert made({}, recover=None, method="wanda") is None
    assert made({"recovery": "sketch"}, recover=None) is None
