"""What users get wrong is refused before any work, with the value, the rule and the next step."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig
from typer.testing import CliRunner

from hf_lop import inspect_model
from hf_lop.cli import app
from hf_lop.errors import CheckpointMismatchError, InfeasibleBudgetError, InvalidInputError, UnsupportedModelError
from hf_lop.hub.read.load import load_model
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.units.kinds import find_units


@pytest.fixture
def dense(llama, tmp_path):
    llama.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.slow
def test_saving_over_another_layout_leaves_no_old_weights(pruner, dense, tmp_path):
    small, large = pruner.prune(dense, 0.5), pruner.prune(dense, 0.3)
    for first, options, second, others in ((small, {}, large, {"max_shard_size": "20KB"}),) * 2 + (
        (large, {"max_shard_size": "20KB"}, small, {}),
    ):
        first.save_pretrained(tmp_path / "out", **options)
        second.save_pretrained(tmp_path / "out", **others)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert loaded.config.intermediate_size == second.config.intermediate_size
        for name, weight in second.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight)
        whole, index = ((tmp_path / "out" / f).exists() for f in ("model.safetensors", "model.safetensors.index.json"))
        assert whole != index


@pytest.mark.parametrize("wrap", [get_peft_model, lambda model, config: model.add_adapter(config) or model])
def test_adapters_in_the_ffns_are_refused_and_nothing_changes(pruner, llama, wrap):
    wrapped = wrap(llama, LoraConfig(target_modules=["up_proj", "down_proj"], r=2))
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        pruner.prune(wrapped, 0.3)
    assert llama.config.intermediate_size == 48
    assert all(unit.count == 48 for unit in find_units(llama))


@pytest.mark.parametrize("round_to", [0, -8, 1.5, "8", None])
@pytest.mark.parametrize("budget", [{"ratio": 0.3}, {"params": 20_000}])
def test_round_to(pruner, round_to, budget):
    with pytest.raises(InvalidInputError, match=r"round_to is .* positive integer"):
        pruner.plan(**budget, round_to=round_to)


def test_a_budget_out_of_reach_names_what_was_asked_for_and_what_is_possible(pruner):
    with pytest.raises(InfeasibleBudgetError, match=r"ratio is 0\.99, which keeps 1 of 192 .* at most 0\.9791"):
        pruner.plan(0.99)
    assert pruner.plan(0.9791).widths == (1,) * 4
    with pytest.raises(InfeasibleBudgetError, match=r"memory: A budget of 1 "):
        pruner.plan(memory="1B")


@pytest.mark.parametrize(
    "options",
    [{"ratio": 1.2}, {"ratio": 0.999}, {"ratio": 0.3, "method": "x"}, {"ratio": 0.3, "recover": "lstsq"}, {}],
)
def test_refused_before_the_model_is_loaded(pruner, dense, monkeypatch, options):
    monkeypatch.setattr("hf_lop.pruner.prune.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises((InvalidInputError, InfeasibleBudgetError)):
        pruner.prune(dense, **options)


def test_memory_on_the_command_line_counts_in_the_dtype_of_the_model(pruner, saved_pruner, llama, tmp_path):
    llama.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    budget = 0.9 * sum(p.nbytes for p in llama.parameters())  # out of reach in the float32 that the pruner was made in
    with pytest.raises(InfeasibleBudgetError):
        pruner.plan(memory=budget)
    options = {"--pruner": saved_pruner, "--memory": budget, "--out": tmp_path / "o"}
    arguments = ["prune", tmp_path / "dense", *(word for option in options.items() for word in option)]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(tmp_path / "o").parameters()) <= budget


def test_things_that_are_no_model(pruner, saved_pruner, tmp_path):
    with pytest.raises(InvalidInputError, match="model is a int"):
        pruner.prune(5, 0.3)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="cannot be read as a model"):
        LOPPruner.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="is a pruner"):
        inspect_model(saved_pruner)


@pytest.mark.parametrize("nested", [False, True])
def test_a_depth_out_of_reach_is_refused_before_a_config_is_built(tmp_path, nested):
    part = {"model_type": "qwen2", "num_hidden_layers": 10**9}
    config = {"model_type": "qwen2_5_vl", "text_config": part} if nested else part
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatchError, match="1,000,000,000 layers"):
        PreTrainedConfig.get_config_dict(tmp_path)


def test_widths_that_are_not_those_of_the_weights(pruner, saved_pruner, dense, tmp_path):
    pruner.prune(dense, 0.3).save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["intermediate_size"] = [3] * 4
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatchError, match="mismatched"):
        load_model(tmp_path / "out")
    config = json.loads((saved_pruner / "config.json").read_text())
    for name in ("widths", "neuron_parameters", "neuron_bytes"):
        config["base_size"][name] = config["base_size"][name][:3]
    (saved_pruner / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatchError, match="mismatched"):
        LOPPruner.from_pretrained(saved_pruner)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("widths", widths) for widths in ([], ["a"], 7, None, [1.5], [0], [48] * 5000)),
        ("dtype", "zzz"),
        ("dtype", "int8"),
    ],
)
def test_a_damaged_description_of_the_base_model(saved_pruner, key, value):
    config = json.loads((saved_pruner / "config.json").read_text())
    if key == "widths":
        config["base_size"]["widths"] = value
    else:
        config["base_dtype"] = value
    (saved_pruner / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatchError, match=f"base_.*{key} is"):
        LOPPruner.from_pretrained(saved_pruner)


@pytest.mark.parametrize(
    "row",
    [{"ratio": "x", "ratios": [0.5] * 4}, {"ratio": float("nan"), "ratios": [0.5] * 4}, {"ratio": 0.5, "ratios": 0.5}]
    + [{"ratio": 0.5, "ratios": ratios} for ratios in ([2] * 4, ["a"] * 4, [0.5] * 3)],
)
def test_table_rows(saved_pruner, row):
    loaded = LOPPruner.from_pretrained(saved_pruner)
    with pytest.raises(InvalidInputError, match="Row 0 of the table"):
        loaded.train_predictor("mlp", table=[row])


def test_a_pruner_in_a_pickle(pruner, saved_pruner):
    torch.save(pruner.state_dict(), saved_pruner / "pytorch_model.bin")
    (saved_pruner / "model.safetensors").unlink()
    with pytest.raises(CheckpointMismatchError, match=r"no model\.safetensors"):
        LOPPruner.from_pretrained(saved_pruner)


def test_a_commit_is_recorded_with_its_own_repository_only(pruner, llama):
    llama.name_or_path, llama.config._commit_hash = "me/fine-tuned", "1" * 40
    facts = pruner.prune(llama, 0.3).config.pruning_config
    assert (facts["base_model"], facts["base_revision"]) == ("me/fine-tuned", "1" * 40)


def test_a_name_without_a_commit_may_be_a_folder_that_is_gone(pruner, llama):
    llama.name_or_path, llama.config._commit_hash = "out/checkpoint", None
    facts = pruner.prune(llama, 0.3).config.pruning_config
    assert (facts["base_model"], facts["base_revision"]) == ("org/base", None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "x") for name in ("criterion", "search", "reward", "predictor")),
        ("evaluations", 0),
        ("targets", (0.3, 1.5)),
        ("targets", ()),
    ],
)
def test_fit_refuses_before_it_measures(llama, batches, monkeypatch, name, value):
    monkeypatch.setattr("hf_lop.pruner.fit.collect_statistics", lambda *_: pytest.fail("measured"))
    with pytest.raises(InvalidInputError, match=name):
        LOPPruner.fit(llama, batches[:1], batches[1:], **{name: value})
