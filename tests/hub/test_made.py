"""Plans and facts of what hf_lop made, from JSON and headers: the same as with torch, and without it."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_lop.errors import InvalidInputError, LOPError
from hf_lop.hub.read.made import KEPT, inspect_made, read_planner
from hf_lop.planning.budget import Budget
from hf_lop.pruner.pruner import LOPPruner
from tests.fake_pruner import fake_pruner

PREDICTORS = ["transformer", "bilstm", "mlp"]


@pytest.fixture(scope="module")
def made(built, tmp_path_factory):
    """Folders of everything that hf_lop makes."""
    root, model = tmp_path_factory.mktemp("made"), built["gated"]
    for name in PREDICTORS:
        pruner = fake_pruner(model, predictor=name)
        if name == "bilstm":
            pruner.predictor.bfloat16()
        pruner.save_pretrained(root / name)
    pruner.make_elastic(copy.deepcopy(model)).save_pretrained(root / "elastic")
    pruner.prune(copy.deepcopy(model), 0.3).save_pretrained(root / "pruned")
    pruner.prune(copy.deepcopy(model), 0.3).half().save_pretrained(root / "sharded", max_shard_size="30KB")
    model.save_pretrained(root / "dense")
    return root


BUDGETS = [
    {"ratio": 0.3},
    {"params": 3e4},
    {"memory": "120KB"},
    {"flops": 4e4, "ratio": 0.2},
    {"ratio": 0.4, "round_to": 8},
]


@pytest.mark.parametrize("name", [*PREDICTORS, "elastic"])
def test_plans_are_those_of_the_pruner(made, name):
    planner, pruner = read_planner(made / name), LOPPruner.from_pretrained(made / name)
    for budget in BUDGETS:
        assert planner.plan(Budget.of(**budget)) == pruner.plan(**budget)


def test_facts(made):
    facts = {name: inspect_made(made / name) for name in (*PREDICTORS, "elastic", "pruned", "sharded")}
    assert [facts[name]["kind"] for name in facts] == ["pruner"] * 3 + ["elastic", "pruned", "pruned"]
    for name in ("pruned", "sharded"):
        config = json.loads((made / name / "config.json").read_text())
        assert facts[name]["widths"] == config["intermediate_size"]
        assert facts[name]["can_be_pruned"] is True
        assert facts[name]["pruned"]["dense_parameters"] - facts[name]["parameters"]["total"] == 3 * 32 * sum(
            48 - width for width in facts[name]["widths"]
        )
    assert facts["mlp"]["pruner"]["widths"] == [48] * 4
    assert facts["elastic"]["parameters"]["total"] == facts["elastic"]["pruner"]["parameters"]
    assert inspect_made(made / "dense") is None


def test_an_older_one_without_kept_pieces(made, tmp_path):
    config = json.loads((made / "pruned" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((made / "pruned" / "model.safetensors").read_bytes())
    facts = inspect_made(tmp_path)
    assert facts["widths"] == config["intermediate_size"]
    assert f"it has no {KEPT}" in facts["reason"]


def damaged(change):
    def write(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return write


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged(lambda c: c.update(base_size=None)), "does not describe a base model"),
        (damaged(lambda c: c.update(format=99)), "format 99"),
        (damaged(lambda c: c.update(model_type="llama")), "not a pruner"),
        (damaged(lambda c: c.update(predictor="oracle")), "no predictor 'oracle'"),
        (damaged(lambda c: c.update(predictor="transformer")), "are not those of a predictor"),
        (lambda f: (f / "config.json").write_text("[]"), "not an object"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04no"), "pickle"),
        (lambda f: change_weights(f, lambda w: w.fill_(torch.nan)), "not finite"),
        (lambda f: change_weights(f, lambda w: w.to(torch.int8)), "a predictor of I8"),
    ],
)
def test_what_is_damaged_is_named(made, tmp_path, damage, words):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((made / "mlp" / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(LOPError, match=words):
        read_planner(tmp_path).plan(Budget.of(0.3))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.startswith("predictor."):
            tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


def test_nothing_there(tmp_path):
    with pytest.raises(InvalidInputError, match="cannot be read as a model"):
        read_planner("org/no-such-pruner")
    with pytest.raises(InvalidInputError, match="has no config"):
        inspect_made(tmp_path)


LIGHT = """
import resource, sys
from hf_lop.cli import main
sys.argv = {words!r}
try:
    main()
except SystemExit as end:
    assert not end.code
assert not {{"torch", "transformers"}} & sys.modules.keys()
print(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    [["plan", "transformer", "--ratio", "0.3"], ["inspect", "mlp"], ["inspect", "pruned"], ["inspect", "elastic"]],
)
def test_the_command_line_imports_no_torch(made, words):
    command = ["hf-lop", words[0], str(made / words[1]), *words[2:], "--json"]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(words=command)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)
    assert float(done.stderr) < 1.5  # seconds of CPU, on a busy machine; 0.5 on a quiet one
