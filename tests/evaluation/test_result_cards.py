"""Results on cards: the text of a card, and a push to a Hub."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from hypothesis import given
from hypothesis import strategies as st

from hf_lop.errors import InvalidInputError
from hf_lop.evaluation.card import eval_result_files, with_results
from hf_lop.evaluation.results import Results, TaskResult
from hf_lop.hub.cards.facts import RESULTS
from tests.hub_server import run_python, serve


def task(name="pope", metrics=None, **changes):
    plain = {
        "task": name,
        "metrics": metrics or {f"{name}_accuracy": 0.875},
        "standard_errors": {},
        "samples": 8,
        "total": 8,
        "dataset": f"org/{name}",
        "config": None,
        "split": "test",
        "harness": "lmms-eval",
        "harness_version": "0.7.3",
    }
    return TaskResult(**{**plain, **changes})


def results(*tasks):
    return Results("me/model", "0" * 16, 10, None, tasks, "2026-01-02T03:04:05+00:00", "0.1.0")


CARD = """---
# a comment of the user
license: mit
tags: [a,   b]
model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {name: other, type: org/other}
    metrics: [{type: acc, value: 0.5}]

base_model: org/base
---
# Title

model-index: not metadata
"""


def test_everything_else_stays_to_the_letter():
    new = with_results(CARD, results(task()), "model")
    assert "# a comment of the user\nlicense: mit\ntags: [a,   b]\nbase_model: org/base\n" in new
    assert new.endswith("---\n# Title\n\nmodel-index: not metadata\n")
    data = ModelCard(new).data
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results} == {
        ("other", "acc", 0.5),
        ("pope", "pope_accuracy", 0.875),
    }
    assert data.model_name == "mine"
    assert (data.eval_results[1].source_name, data.eval_results[1].dataset_args) == ("lmms-eval 0.7.3", {"samples": 8})


def test_a_second_time_replaces_the_first():
    once = with_results(CARD, results(task(), task("mme")), "model")
    assert with_results(once, results(task(), task("mme")), "model") == once
    better = with_results(
        once, results(task(metrics={"pope_accuracy": 0.9}, samples=4, standard_errors={"pope_accuracy": 0.1})), "model"
    )
    found = {r.metric_type: r for r in ModelCard(better).data.eval_results}
    assert found["pope_accuracy"].metric_value == 0.9
    assert found["pope_accuracy"].metric_args == {"stderr": 0.1}
    assert found["pope_accuracy"].dataset_args == {"samples": 4, "of": 8}
    assert set(found) == {"acc", "pope_accuracy", "mme_accuracy"}


@pytest.mark.parametrize(
    "card", ["", "# No metadata\n", "---\n---\n# Empty\n", "---\r\nlicense: mit\r\n---\r\n# Windows\r\n"]
)
def test_cards_of_all_kinds(card):
    new = with_results(card, results(task()), "model")
    assert [r.metric_value for r in ModelCard(new).data.eval_results] == [0.875]
    assert new.endswith(card.partition("---\n# ")[2] or card.rpartition("\n---\r\n")[2])
    assert with_results(new, results(task()), "model") == new


def with_table(card):
    return f"{card}\n{RESULTS[0]}\nNothing yet.\n{RESULTS[1]}\n\nThe end.\n"


def test_table_of_a_card_that_hf_lop_wrote():
    dense = results(task(metrics={"pope_accuracy": 0.9}))
    one = task(standard_errors={"pope_accuracy": 0.0123}, samples=4)
    new = with_results(with_table(CARD), results(one), "model", dense=dense)
    table = """| benchmark | metric | dense model | this model | questions |
| --- | --- | ---: | ---: | ---: |
| other | acc |  | 0.5 |  |
| pope | pope_accuracy | 0.9 | 0.875 ± 0.012 | 4 of 8 |
"""
    assert new.endswith(f"\n{RESULTS[0]}\n{table}{RESULTS[1]}\n\nThe end.\n")
    assert with_results(new, results(one), "model", dense=dense) == new
    assert ModelCard(new).data.eval_results[1].metric_args == {"stderr": 0.0123, "dense": 0.9}


def test_a_pruner_has_results_of_every_ratio():
    card = with_table("---\nlicense: mit\n---")
    for ratio, value in ((0.3, 0.8), (0.5, 0.6), (0.3, 0.9)):
        card = with_results(card, results(task(metrics={"acc": value})), "pruner", ratio=ratio)
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert rows[0] == "| benchmark | metric | neurons removed | pruned model | questions |"
    assert rows[2:] == ["| pope | acc | 50.0% | 0.6 | 8 |", "| pope | acc | 30.0% | 0.9 | 8 |"]
    assert "this model" not in card


def test_bad_cards_and_nothing_to_say():
    with pytest.raises(InvalidInputError, match="metadata cannot be read"):
        with_results("---\na: [\n---\n", results(task()), "model")
    with pytest.raises(InvalidInputError, match="metadata cannot be read"):
        with_results("---\nmodel-index: [{name: x}]\n---\n", results(task()), "model")
    with pytest.raises(InvalidInputError, match="hold no task"):
        with_results(CARD, results(), "model")


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_number_and_body(value, body):
    new = with_results(f"---\nlicense: mit\n---\n{body}", results(task(metrics={"m": value})), "model")
    assert new.endswith(f"---\n{body}")
    assert ModelCard(new).data.eval_results[0].metric_value == value


def test_eval_result_files():
    found = results(task(), task("part", samples=4))
    benchmarks = {"pope_accuracy": ("org/pope", "default"), "part_accuracy": ("org/part", "a b")}
    files = eval_result_files(found, benchmarks)
    assert list(files) == [".eval_results/org_pope_default.yaml", ".eval_results/org_part_a_b.yaml"]
    (entry,), (part,) = (parse_eval_result_entries(yaml.safe_load(text)) for text in files.values())
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/pope", "default", 0.875)
    assert entry.source_name == "lmms-eval 0.7.3"
    assert part.notes == "part on 4 of 8 questions"
    with pytest.raises(InvalidInputError, match=r"0 tasks have the metric 'f1'; name one of pope_accuracy"):
        eval_result_files(found, {"f1": ("a/b", "c")})


PUSH = """
from huggingface_hub import HfApi
from hf_lop import demo
from hf_lop.evaluation.card import push_results
from hf_lop.evaluation.results import Results

demo.load_pruner().prune(demo.MODEL_DIR, 0.3).push_to_hub("me/demo-lop30")
found = Results.load("results.json")
benchmarks = {"pope_accuracy": ("org/pope", "default")}
print(push_results([found, found], "me/demo-lop30", dense=found, benchmarks=benchmarks).commit_url)
HfApi().create_repo("me/no-card")
push_results(found, "me/no-card")
"""


@pytest.mark.slow
def test_push(tmp_path):
    results(task(), task("mme")).save(tmp_path / "results.json")
    with serve(tmp_path / "home") as hub:
        run_python(PUSH, hub, cwd=tmp_path)
        repository = hub.repositories["me/demo-lop30"]
        after = hub.files("me/demo-lop30")
        before = hub.files("me/demo-lop30", repository.at("main").parent)
        assert hub.history("me/demo-lop30") == ["Add evaluation results", "Upload model", "initial commit"]
        changed = {path for path in after if after[path] != before.get(path)}
        assert changed == {"README.md", ".eval_results/org_pope_default.yaml"}
        old, new = (files["README.md"].decode() for files in (before, after))
        rest = new.replace(new[new.index("model-index:") : new.index("\n---\n") + 1], "")
        table = [text.index(mark) for text in (rest, old) for mark in RESULTS]
        assert rest[: table[0]] + rest[table[1] :] == old[: table[2]] + old[table[3] :]
        assert "| mme | mme_accuracy | 0.875 | 0.875 | 8 |" in rest
        assert len(ModelCard(new).data.eval_results) == 2
        assert len(ModelCard(hub.files("me/no-card")["README.md"].decode()).data.eval_results) == 2
        assert b"\n" in after["README.md"]


@pytest.mark.slow
def test_push_by_the_command(tmp_path):
    pytest.importorskip("lmms_eval", reason="the extra eval is not installed")
    code = """
import sys
from hf_lop import demo
from hf_lop.cli import main
from demo_benchmarks import write_benchmarks

write_benchmarks("tasks", 2)
demo.load_pruner().prune(demo.MODEL_DIR, 0.3).push_to_hub("me/demo-lop30")
sys.argv = ["hf-lop", "evaluate", "me/demo-lop30", "--tasks", "lop_demo", "--include-path", "tasks", "--json"]
sys.argv += ["--push-results", "me/demo-lop30", "--eval-results", "accuracy=org/demo-data:default"]
main()
"""
    with serve(tmp_path / "home") as hub:
        plain = json.loads(run_python(code, hub, cwd=tmp_path))
        files = hub.files("me/demo-lop30")
        found = {r.metric_type: r.metric_value for r in ModelCard(files["README.md"].decode()).data.eval_results}
        assert found == plain["tasks"][0]["metrics"]
        assert plain["model"] == "me/demo-lop30"
        (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/org_demo-data_default.yaml"]))
        assert entry.value == found["accuracy"]
        assert str(tmp_path) not in files["README.md"].decode()
