"""A loaded elastic model: sizes by views, in no time, and ordinary pruned models made of them."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_lop import LOPPruner, demo
from hf_lop.cli import app, main
from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from tests.fake_pruner import fake_pruner
from tests.helpers import logits
from tests.small_models import CONFIGS, text_batches


@pytest.fixture(scope="module")
def repositories(built, tmp_path_factory):
    root = tmp_path_factory.mktemp("elastic")
    for kind in ("gated", "fused", "conv1d"):
        fake_pruner(built[kind], sketch_rows=0).make_elastic(copy.deepcopy(built[kind])).save_pretrained(root / kind)
    return root


def storages(model):
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_plan_equals_ordinary_pruning(built, kind):
    pruner = fake_pruner(built[kind], sketch_rows=0)
    elastic = pruner.elastic(built[kind])
    for ratio in (0.3, 0.7, 0.5):
        elastic.set_plan(ratio)
        ordinary = pruner.prune(copy.deepcopy(built[kind]), ratio, recover=None)
        torch.testing.assert_close(logits(elastic.model), logits(ordinary), rtol=1e-5, atol=1e-5)
        made = elastic.materialize()
        assert torch.equal(logits(made), logits(elastic.model))
        assert made.config.to_dict() == ordinary.config.to_dict()
        assert elastic.plan.widths == pruner.plan(ratio).widths
    elastic.set_plan(0)
    assert torch.equal(logits(elastic.model), logits(built[kind]))
    assert elastic.model.config.to_dict() == built[kind].config.to_dict()


@pytest.mark.parametrize("kind", ["gated", "conv1d"])
def test_sorted_weights_are_shared_with_the_loaded_model(repositories, kind):
    model = AutoModelForCausalLM.from_pretrained(repositories / kind)
    pruner = LOPPruner.from_pretrained(repositories / kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    elastic = pruner.elastic(model)
    for ratio in (0, 0.5, 0.2):
        elastic.set_plan(pruner.plan(ratio))
        assert storages(elastic.model) == storages(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_loading_by_name(repositories):
    pruner = LOPPruner.from_pretrained(repositories / "fused")
    elastic = pruner.elastic(repositories / "fused")
    elastic.set_plan(0.5)
    sized = AutoModelForCausalLM.from_pretrained(repositories / "fused", lop_ratio=0.5)
    assert torch.equal(logits(elastic.model), logits(sized))


def test_the_config_lists_the_widths_while_generating(repositories):
    pruner = LOPPruner.from_pretrained(repositories / "gated")
    elastic = pruner.elastic(repositories / "gated")
    prompt = {"max_new_tokens": 8, "do_sample": False, **text_batches(1)[0]}
    answers = []
    for ratio in (0.5, 0.0, 0.5):
        elastic.set_plan(ratio)
        expected = 48 if ratio == 0 else list(pruner.plan(ratio).widths)
        assert elastic.model.config.intermediate_size == expected
        assert [layer.mlp.down_proj.in_features for layer in elastic.model.model.layers] == list(elastic.plan.widths)
        answers.append(elastic.model.generate(**prompt))
    assert torch.equal(answers[0], answers[2])
    sized = AutoModelForCausalLM.from_pretrained(repositories / "gated", lop_ratio=0.5)
    assert torch.equal(answers[0], sized.generate(**prompt))


def test_a_materialized_model_is_its_own_and_ordinary(repositories, tmp_path):
    pruner = LOPPruner.from_pretrained(repositories / "gated")
    model = AutoModelForCausalLM.from_pretrained(repositories / "gated")
    elastic = pruner.elastic(model)
    elastic.set_plan(0.5)
    made = elastic.materialize()
    expected = logits(made)
    assert not storages(made) & storages(model)
    assert all(parameter.requires_grad for parameter in made.parameters())
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in made.parameters())
    elastic.set_plan(0.2)
    assert torch.equal(logits(made), expected)
    same = pruner.prune(model, 0.5, recover=None)
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), same.state_dict().values(), strict=True))
    made.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again), expected)
    logits_with_gradient = made(**text_batches(1)[0]).logits
    logits_with_gradient.sum().backward()


def test_what_does_not_fit_changes_nothing(repositories, built):
    pruner = LOPPruner.from_pretrained(repositories / "gated")
    elastic = pruner.elastic(repositories / "gated")
    elastic.set_plan(0.5)
    before = elastic.plan
    with pytest.raises(InvalidInputError, match="of another model"):
        elastic.set_plan(demo.load_pruner().plan(0.5))
    with pytest.raises(InvalidInputError, match=r"ratio is 1\.5"):
        elastic.set_plan(1.5)
    assert elastic.plan is before
    with pytest.raises(CheckpointMismatchError, match="model type"):
        pruner.elastic(built["fused"])
    with pytest.raises(CheckpointMismatchError, match="belongs to the sorted neurons"):
        pruner.elastic(built["gated"])


@pytest.mark.slow
def test_command_line(tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    elastic, half = tmp_path / "elastic", tmp_path / "half"
    made = run("make-elastic", demo.MODEL_DIR, "--pruner", demo.PRUNER_DIR, "--out", elastic)
    assert made["extra_bytes"] == sum(file.stat().st_size for file in (elastic / "elastic").iterdir())
    assert (elastic / "assets" / "quality.png").is_file()
    pulled = run("pull", elastic, "--ratio", 0.5, "--out", half)
    assert pulled["pruning_config"]["recovery"] == "sketch"
    assert pulled["parameters"] == 553_824
    facts = run("inspect", half)
    assert facts["parameters"]["total"] == 553_824
    assert (half / "modeling_lop.py").is_file()
    assert "553,824" in (half / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"elastic", "half"}
    plain = run("pull", elastic, "--params", 560_000, "--recover", "none", "--out", tmp_path / "plain")
    assert plain["pruning_config"]["recovery"] is None
    assert plain["parameters"] <= 560_000


@pytest.mark.parametrize("recover", ["lstsq", "fold", "no"])
def test_the_command_line_names_the_recoveries_of_a_size(monkeypatch, capsys, tmp_path, recover):
    words = ["hf-lop", "pull", "org/elastic", "--ratio", "0.5", "--recover", recover, "--out", str(tmp_path / "half")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert f"--recover is {recover!r}; choose sketch, none, auto" in said
    assert "data=" not in said
    assert not list(tmp_path.iterdir())
