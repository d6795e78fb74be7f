"""What older versions saved still loads and gives the same; `stored/make.py` says how the samples were made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_lop import LOPPruner
from hf_lop.errors import CheckpointMismatchError
from hf_lop.evaluation.comparison.compare import compare
from hf_lop.units.checks import FORMAT
from hf_lop.units.configs import layer_widths
from tests.helpers import logits
from tests.small_models import build, text_batches

STORED = Path(__file__).parent / "stored" / "0.1.0"
MODELS = ("gated", "gated-bias", "fused", "conv1d", "plain_bias")


def expected(name):
    tensors = load_file(STORED / f"{name}.safetensors")
    return {key: tensors.pop(key) for key in ("input_ids", "attention_mask")}, tensors


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_models_load_and_are_saved_anew(name, tmp_path):
    inputs, tensors = expected(name)
    for folder in (STORED / name, tmp_path):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert len(set(layer_widths(model.config))) > 1
        close(logits(model, inputs), tensors["logits"])
        model.save_pretrained(tmp_path)


@pytest.mark.slow
def test_models_load_by_their_own_remote_code(tmp_path):
    for name in MODELS:
        inputs, tensors = expected(name)
        shutil.copytree(STORED / name, tmp_path / name)
        auto = {"auto": "AutoModelForCausalLM", "inputs": inputs, "logits": tensors["logits"], "close": 1e-5}
        torch.save(auto, tmp_path / name / "expected.pt")
    script = Path(__file__).parent / "remote_loading.py"
    assert run(script, tmp_path, home=tmp_path / "home") == {}


@pytest.mark.slow
def test_versions_in_one_process_in_all_orders(tmp_path):
    AutoModelForCausalLM.from_pretrained(STORED / "gated").save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "lop_unit.py").is_file()
    script = Path(__file__).parent / "stored" / "orders.py"
    assert run(script, STORED / "gated", tmp_path / "new", STORED / "gated.safetensors", home=tmp_path / "home") == []


def run(*command, home):
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | {"HF_HOME": str(home), "PYTHONPATH": str(root)},
        cwd=home.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class TestPruner:
    def test_plans(self):
        pruner, stored = LOPPruner.from_pretrained(STORED / "pruner"), json.loads((STORED / "plans.json").read_text())
        for budget in stored["plans"]:
            widths = budget.pop("widths")
            assert list(pruner.plan(**budget).widths) == widths, budget
        assert pruner.config.search_table == stored["table"]

    def test_a_fit_that_was_killed_goes_on_to_the_same_table(self, tmp_path, monkeypatch):
        shutil.copytree(STORED / "journal", tmp_path / "journal")
        table = json.loads((STORED / "plans.json").read_text())["table"]
        pruner = LOPPruner.fit(
            build("gated"),
            text_batches(2),
            text_batches(1, seed=1),
            search="mcts",
            targets=(0.2, 0.4),
            evaluations=3,
            predictor="mlp",
            sketch_rows=4,
            journal=tmp_path / "journal",
        )
        assert [row["ratios"] for row in pruner.config.search_table] == [row["ratios"] for row in table]
        seconds = json.loads((STORED / "journal" / "seconds.json").read_text())
        assert {phase: pruner.config.calibration["seconds"][phase] for phase in seconds} == seconds

    def test_rows_of_a_comparison_are_not_measured_again(self, tmp_path, monkeypatch):
        shutil.copytree(STORED / "rows", tmp_path / "rows")
        pruner = LOPPruner.from_pretrained(STORED / "pruner")
        options = {
            "ratios": (0.3,),
            "methods": ("lop", "uniform"),
            "rewards": ("divergence",),
            "folder": tmp_path / "rows",
        }
        found = compare([pruner], build("gated"), text_batches(1, seed=7), **options)
        lines = (STORED / "rows" / "rows.jsonl").read_text().splitlines()
        assert json.loads(found.to_json())["rows"] == [json.loads(line) for line in lines[1:]]


class TestFormats:
    """Repositories of a later version say so; those of 0.1 have no format, which is 0."""

    @pytest.mark.parametrize("number", [2, 17, -1, "1", None])
    def test_a_model_of_a_later_format(self, tmp_path, number):
        shutil.copytree(STORED / "gated", tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        assert "format" not in config["pruning_config"]
        config["pruning_config"] |= {"format": number, "hf_lop_version": "9.1"}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointMismatchError, match=r"format .* It needs hf_lop >= 9\.1"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    def test_a_pruner_of_a_later_format(self, tmp_path):
        shutil.copytree(STORED / "pruner", tmp_path / "pruner")
        config = json.loads((tmp_path / "pruner" / "config.json").read_text())
        assert "format" not in config
        config["format"] = 5
        (tmp_path / "pruner" / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            CheckpointMismatchError, match=r"format 5; this code knows formats 0 to 1\. It needs hf_lop >= 0\.1\.0"
        ):
            LOPPruner.from_pretrained(tmp_path / "pruner")

    def test_what_is_made_now_names_its_format(self, pruner, llama, tmp_path):
        assert pruner.config.format == FORMAT
        pruned = pruner.prune(llama, 0.3)
        assert pruned.config.pruning_config["format"] == FORMAT
        pruned.save_pretrained(tmp_path)
        source = (tmp_path / "lop_checks.py").read_text()
        assert f"FORMAT = {FORMAT}" in source  # the shipped files check it as well


class TestElastic:
    @pytest.mark.parametrize("ratio", [0.2, 0.6])
    def test_sizes(self, ratio):
        inputs, tensors = expected("elastic")
        model = AutoModelForCausalLM.from_pretrained(STORED / "elastic", lop_ratio=ratio)
        close(logits(model, inputs), tensors[f"at {ratio}"])

    def test_the_whole(self):
        inputs, tensors = expected("elastic")
        close(logits(AutoModelForCausalLM.from_pretrained(STORED / "elastic"), inputs), tensors["logits"])
