"""`evaluate` in one process: models in memory and by id, both harnesses, and everything that can go wrong."""

import copy
import importlib.util
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from hf_lop import LOPPruner, demo, evaluate
from hf_lop.cli import app
from hf_lop.errors import EvaluationError, InvalidInputError, MissingDependencyError, UnsupportedModelError
from hf_lop.evaluation.fingerprint import weight_fingerprint
from hf_lop.evaluation.paper import TASKS, PaperScores
from hf_lop.evaluation.results import Results, read_raw
from tests.small_models import CONFIGS, text_batches
from tests.tiny_repo import build_processor, build_repo


def test_without_the_extra(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lmms_eval" else real(name))
    with pytest.raises(MissingDependencyError, match=r'Evaluation needs lmms_eval.*pip install "hf-lop\[eval\]"'):
        evaluate(demo.MODEL_DIR, "pope")


class TestFingerprint:
    def test_depends_on_weights_alone(self, built):
        model = built["gated"]
        name = weight_fingerprint(model)
        assert len(name) == 16
        assert weight_fingerprint(copy.deepcopy(model)) == name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_sees_one_bit_and_the_order(self, llama, dtype):
        model = llama.to(dtype)
        names = {weight_fingerprint(model)}
        weight = model.model.layers[2].mlp.up_proj.weight.data
        weight[3, 5] += weight[3, 5].abs() * torch.finfo(dtype).eps
        names.add(weight_fingerprint(model))
        weight[[0, 1]] = weight[[1, 0]]
        names.add(weight_fingerprint(model))
        assert len(names) == 3

    def test_sees_beyond_a_chunk(self, monkeypatch):
        monkeypatch.setattr("hf_lop.evaluation.fingerprint._CHUNK", 4)
        layer = torch.nn.Linear(5, 3)
        name = weight_fingerprint(layer)
        layer.weight.data[2, 4] += 1
        assert weight_fingerprint(layer) != name


class TestRaw:
    """What harnesses return is read without trust."""

    def test_only_finite_numbers(self):
        values = {"alias": "x", "acc,none": np.float64(0.5), "acc_stderr,none": "N/A", "acc_stderr_clt,none": 0.1}
        values |= {
            "f1,none": float("nan"),
            "pass,none": [],
            "submission,none": None,
            "acc,strict": 1,
            "flag,none": True,
        }
        samples = [{"doc_id": i, "filtered_resps": [a], "acc": s} for i, a, s in ((1, "b", 1), (0, "a", {"score": 0}))]
        raw = {
            "results": {"x": values},
            "n-samples": {"x": {"effective": 2, "original": 3}},
            "samples": {"x": samples},
        }
        raw["configs"] = {"x": {"dataset_path": "parquet", "test_split": "test"}}
        (result,) = read_raw(raw, "lmms-eval", "0")
        assert result.metrics == {"acc": 0.5, "acc,strict": 1.0}
        assert all(type(value) is float for value in result.metrics.values())
        assert result.standard_errors == {"acc": 0.1}
        assert result.answers == ("a", "b")
        assert (result.samples, result.total, result.dataset) == (2, 3, "x")

    def test_an_error_of_something_else_than_a_mean_is_dropped(self):
        values = {"f1,none": 0.7, "f1_stderr_clt,none": 0.1}
        samples = [{"doc_id": 0, "filtered_resps": ["a"], "f1": {"score": 0.0}}]
        raw = {
            "results": {"x": values},
            "n-samples": {"x": {"effective": 1, "original": 1}},
            "samples": {"x": samples},
        }
        assert read_raw(raw, "lmms-eval", "0")[0].standard_errors == {}

    def test_nothing_to_report(self):
        raw = {"results": {"x": {"score,none": None}}, "n-samples": {"x": {"effective": 1, "original": 1}}}
        with pytest.raises(EvaluationError, match="No metric of the task x is a finite number"):
            read_raw(raw, "lmms-eval", "0")
        raw["n-samples"]["x"]["effective"] = 0
        with pytest.raises(EvaluationError, match="has no question"):
            read_raw(raw, "lmms-eval", "0")


pytest.importorskip("lmms_eval", reason="the extra eval is not installed")

from demo_benchmarks import write_benchmarks

from hf_lop.evaluation.harnesses import task_manager, wrap
from hf_lop.evaluation.lmms_model import LOPModel
from hf_lop.evaluation.reward import TaskReward

LM_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = write_benchmarks(tmp_path_factory.mktemp("tasks"), 4)
    rows = [{"question": "What colour is", "choices": [" red", " anna", " 7"], "answer": i % 3} for i in range(6)]
    data = folder / "lm.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "colours.yaml").write_text(LM_TASK.format(name="colours", data=data))
    empty = (
        (folder / "pope.yaml")
        .read_text()
        .replace("task: pope", "task: pope_empty")
        .replace("pope.parquet", "0.parquet")
    )
    demo.load_data("report", 1).select([]).to_parquet(folder / "0.parquet", batch_size=1)
    (folder / "empty.yaml").write_text(empty)
    text = (folder / "pope.yaml").read_text().replace("task: pope", "task: pope_missing")
    (folder / "missing.yaml").write_text(text.replace("dataset_path: parquet", "dataset_path: org/no-such-dataset"))
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "demo-lop50"
    demo.load_pruner().prune(demo.load_model()[0], 0.5).save_pretrained(folder)  # recovered in float32, as below
    return folder


def on(tasks, **options):
    return {"include_path": tasks, "batch_size": 8, "dtype": "float32", **options}


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.slow
class TestModels:
    def test_by_folder_in_memory_and_on_the_fly(self, tasks, pruned):
        by_folder = evaluate(pruned, "lop_demo", **on(tasks))
        on_the_fly = evaluate(demo.MODEL_DIR, "lop_demo", pruner=demo.PRUNER_DIR, ratio=0.5, **on(tasks, batch_size=1))
        dense, processor = demo.load_model()
        in_memory = evaluate(demo.load_pruner().prune(dense, 0.5), "lop_demo", processor=processor, **on(tasks))
        questions = demo.load_data("report", 16)
        expected = demo.answer(dense, processor, questions)
        for results in (by_folder, on_the_fly, in_memory):
            assert [answer.strip() for answer in results["lop_demo"].answers] == expected
            assert results["lop_demo"].metrics["accuracy"] == demo.accuracy(expected, questions)["all"]
            assert results.pruning["ratio"] == 0.5
            assert results.weights == by_folder.weights
        assert by_folder.model == "demo-lop50"
        assert by_folder.parameters == 553824

    def test_both_harnesses_in_one_call(self, tasks, pruned):
        results = evaluate(str(pruned), "colours,lop_demo", limit=3, **on(tasks))
        assert [(t.task, t.harness, t.samples) for t in results.tasks] == [
            ("colours", "lm-eval", 3),
            ("lop_demo", "lmms-eval", 3),
        ]
        with pytest.raises(InvalidInputError, match="No result of 'pope'"):
            results["pope"]

    def test_text_tasks_as_lm_eval_itself_runs_them(self, tasks, tmp_path, llama):
        """The harness's own `hf-multimodal` by path, and a language model by path and in memory."""
        from lm_eval import simple_evaluate

        ours = evaluate(demo.MODEL_DIR, ["colours"], harness="lm-eval", **on(tasks))
        theirs = simple_evaluate(
            "hf-multimodal",
            f"pretrained={demo.MODEL_DIR},dtype=float32",
            tasks=["colours"],
            task_manager=task_manager("lm-eval", ["colours"], [str(tasks)]),
            device="cpu",
            bootstrap_iters=0,
        )
        assert ours["colours"].metrics["acc"] == theirs["results"]["colours"]["acc,none"]
        scores = [sample["filtered_resps"] for sample in theirs["samples"]["colours"]]
        assert [json.loads(answer)[0][0] for answer in ours["colours"].answers] == pytest.approx(
            [s[0][0] for s in scores]
        )

    def test_a_language_model_gets_no_images(self, llama):
        processor = demo.load_model()[1].tokenizer
        with pytest.raises(UnsupportedModelError, match="no image processor"):
            LOPModel(llama, processor=processor)

    @pytest.mark.slow
    def test_batches_of_bytes(self, tasks, tmp_path):
        """A random model with a byte-level tokenizer: batches answer as single questions do."""
        build_repo(tmp_path)
        names = ["mmmu_val", "lop_demo"]
        single, batched = (evaluate(tmp_path, names, **on(tasks, batch_size=size)) for size in (1, 5))
        assert len({answer for task in single.tasks for answer in task.answers}) > 2
        for task in single.tasks:
            assert batched[task.task].answers == task.answers

    def test_several_pictures_or_none_in_one_batch(self, tmp_path):
        build_repo(tmp_path)
        pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
        contents = [
            [{"type": "image", "url": picture} for picture in given] + [{"type": "text", "text": "What colour?"}]
            for given in ([], pictures[:1], pictures, [])
        ]
        requests = [
            SimpleNamespace(args=("What colour?", lambda row: row, {"max_new_tokens": 4}, index, "mixed", "test"))
            for index in range(len(contents))
        ]
        answers = []
        for size in (1, 4):
            model = LOPModel(str(tmp_path), dtype="float32", device="cpu", batch_size=size)
            model.task_dict = {"mixed": {"test": [[{"role": "user", "content": content}] for content in contents]}}
            answers.append([given.text for given in model.generate_until(requests)])
        assert answers[0] == answers[1]
        assert answers[0][0] == answers[0][3]
        assert len(set(answers[0])) > 1

    def test_a_pruned_language_model_as_lm_eval_itself_loads_it(self, tasks, tmp_path):
        from lm_eval import simple_evaluate

        tokenizer = build_processor().tokenizer
        config = LlamaConfig(**{**CONFIGS["gated"].to_dict(), "vocab_size": len(tokenizer)})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
        LOPPruner.fit(model, text_batches(2), text_batches(1, seed=1), predictor="mlp").prune(model, 0.5)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        theirs = simple_evaluate(
            "hf",
            f"pretrained={tmp_path},dtype=float32",
            tasks=["colours"],
            task_manager=task_manager("lm-eval", ["colours"], [str(tasks)]),
            device="cpu",
            bootstrap_iters=0,
        )
        ours = evaluate(tmp_path, "colours", **on(tasks))  # a language model: no need to name the harness
        scores = [sample["filtered_resps"][0][0] for sample in theirs["samples"]["colours"]]
        assert [json.loads(answer)[0][0] for answer in ours["colours"].answers] == pytest.approx(scores)
        assert ours["colours"].metrics["acc"] == theirs["results"]["colours"]["acc,none"]
        assert ours.pruning["ratio"] == 0.5

    def test_the_model_stays_as_it_was(self, tasks):
        model, processor = demo.load_model()
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        name = weight_fingerprint(model)
        for _ in range(2):  # lmms-eval deletes the model of its own wrappers after a run
            evaluate(model, "lop_demo", processor=processor, include_path=tasks, limit=2)
        assert weight_fingerprint(model) == name
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), states[2])


class TestAnswers:
    @pytest.mark.slow
    def test_garbage_is_scored_without_control_characters(self, tasks, monkeypatch):
        model, processor = demo.load_model()
        monkeypatch.setattr(type(processor.tokenizer), "decode", lambda *_, **__: "\x00\x0b\ud800re\x07d\ufffe")
        results = evaluate(model, ",".join(TASKS), processor=processor, include_path=tasks)
        assert {answer for task in results.tasks for answer in task.answers} == {"red"}
        assert [result.task for result in results.tasks] == list(TASKS)

    def test_cache_knows_weights(self, tasks, tmp_path, monkeypatch):
        model, processor = demo.load_model()
        calls = []
        real = LOPModel._generate
        monkeypatch.setattr(LOPModel, "_generate", lambda *a: calls.append(1) or real(*a))

        def run():
            calls.clear()
            results = evaluate(
                model, "lop_demo", processor=processor, include_path=tasks, cache=tmp_path / "cache", batch_size=4
            )
            return results["lop_demo"].answers, len(calls)

        first = run()
        assert first[1] == 4
        assert run() == (first[0], 0)
        demo.load_pruner().prune(model, 0.9)
        second = run()
        assert second[1] == 4
        assert second[0] != first[0]

    @pytest.mark.slow
    def test_the_command_lines_cache_knows_weights_too(self, tasks, tmp_path, monkeypatch):
        """lmms-eval's own key has the folder's name, so a folder that was saved anew would get old answers."""
        from lmms_eval.evaluator import simple_evaluate

        calls = []
        real = LOPModel._generate
        monkeypatch.setattr(LOPModel, "_generate", lambda *a: calls.append(1) or real(*a))
        demo.load_model()[1].save_pretrained(tmp_path / "model")
        for ratio, expected in ((0.0, 1), (0.0, 1), (0.5, 2)):
            demo.load_pruner().prune(demo.MODEL_DIR, ratio).save_pretrained(tmp_path / "model")
            simple_evaluate(
                "hf_lop",
                f"pretrained={tmp_path / 'model'},device=cpu",
                tasks=["lop_demo"],
                task_manager=task_manager("lmms-eval", ["lop_demo"], [str(tasks)]),
                use_cache=str(tmp_path / "cache"),
                batch_size=16,
                bootstrap_iters=0,
            )
            assert len(calls) == expected


class TestFailures:
    @pytest.mark.slow
    def test_other_tasks_keep_their_results(self, tasks, tmp_path):
        out = tmp_path / "results.json"
        names = "pope,mme,pope_empty,pope_missing,lop_demo"
        with pytest.raises(EvaluationError) as failure:
            evaluate(demo.MODEL_DIR, names, **on(tasks, limit=3))  # MME asks in pairs
        message = str(failure.value)
        assert "mme failed in lmms-eval. AssertionError: MME only supports pairwise evaluation" in message
        assert "pope_empty" in message
        assert "pope_missing failed in lmms-eval." in message
        assert "org/no-such-dataset" in message
        assert [task.task for task in failure.value.results.tasks] == ["pope", "lop_demo"]
        arguments = [
            "evaluate",
            str(demo.MODEL_DIR),
            "--tasks",
            "mme,lop_demo",
            "--limit",
            "3",
            "--out",
            str(out),
            "--json",
        ]
        result = CliRunner().invoke(app, [*arguments, "--include-path", str(tasks)])
        assert isinstance(result.exception, EvaluationError)
        assert [task["task"] for task in json.loads(result.stdout)["tasks"]] == ["lop_demo"]
        assert [task.task for task in Results.load(out).tasks] == ["lop_demo"]

    def test_all_tasks_fail(self, tasks):
        with pytest.raises(EvaluationError, match="mme failed") as failure:
            evaluate(demo.MODEL_DIR, "mme", **on(tasks, limit=1))
        assert failure.value.results is None

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            pytest.param(
                {"tasks": "popee"},
                r"No task 'popee' in lmms-eval or lm-eval\. Did you mean pope",
                marks=pytest.mark.slow,
            ),
            ({"tasks": ""}, "name at least one task"),
            ({"tasks": []}, "name at least one task"),
            ({"harness": "helm"}, "harness is 'helm'; choose one of lmms-eval, lm-eval"),
            ({"limit": 0}, "limit is 0"),
            ({"limit": 0.5}, "limit is 0.5"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"include_path": "no/such/folder"}, "no/such/folder is no folder"),
            ({"ratio": 0.3}, "give both to prune, or neither"),
            ({"pruner": demo.PRUNER_DIR, "ratio": 1.3}, "ratio is 1.3"),
            ({"model": "org/no-such-model"}, "org/no-such-model"),
        ],
    )
    def test_bad_arguments(self, tasks, options, words):
        with pytest.raises(InvalidInputError, match=words):
            evaluate(**{"model": demo.MODEL_DIR, "tasks": "pope", "include_path": tasks, **options})

    @pytest.mark.parametrize("size", [0, "auto"])
    def test_bad_batch_size_of_the_plugin(self, size):
        with pytest.raises(InvalidInputError, match="batch_size is"):
            LOPModel(str(demo.MODEL_DIR), batch_size=size)

    def test_videos_are_refused_by_name(self):
        model = wrap("lmms-eval", *demo.load_model(), 1)
        model.task_dict = {"films": {"test": [{}]}}
        film = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}]
        with pytest.raises(UnsupportedModelError, match="The task films has videos"):
            model._messages(lambda _: film, {}, 0, "films", "test")


class TestResults:
    def test_saved_and_loaded(self, tasks, tmp_path):
        results = evaluate(demo.MODEL_DIR, "pope,lop_demo", **on(tasks, limit=4))
        results.save(tmp_path / "results.json")
        assert Results.load(tmp_path / "results.json") == results
        assert results.to_dict()["tasks"][0]["answers"] == []
        assert "4 of 8" in str(results)
        (tmp_path / "other.json").write_text('{"tasks": [{}]}')
        with pytest.raises(InvalidInputError, match="no results of hf_lop"):
            Results.load(tmp_path / "other.json")
        (tmp_path / "other.json").write_text("no JSON")
        with pytest.raises(InvalidInputError, match="is no JSON"):
            Results.load(tmp_path / "other.json")

    @pytest.mark.slow
    def test_the_paper_on_the_command_line(self, tasks, pruned, tmp_path):
        common = ["--tasks", "lop-paper", "--include-path", str(tasks), "--batch-size", "8", "--dtype", "float32"]
        dense = str(tmp_path / "dense.json")
        first = CliRunner().invoke(
            app, ["evaluate", str(demo.MODEL_DIR), *common, "--out", dense], catch_exceptions=False
        )
        assert "| model | 0.00 | 0.00 | 62.50 | 62.50 | 0.00 | 41.67 |" in first.stdout
        options = ["evaluate", str(pruned), *common, "--dense", dense]
        second = CliRunner().invoke(app, options, catch_exceptions=False).stdout
        assert "| dense | 0.00 | 0.00 | 62.50 | 62.50 | 0.00 | 41.67 |" in second
        assert "| demo-lop50, 50% of the neurons removed | " in second
        options.append("--json")
        plain = json.loads(CliRunner().invoke(app, options, catch_exceptions=False).stdout)
        assert plain["paper"]["average"] == pytest.approx((plain["paper"]["mmbench"] + plain["paper"]["mmmu"]) / 3)
        assert plain["paper"]["drop"]["average"] == pytest.approx(1 - plain["paper"]["average"] / (125 / 3))
        assert "pope" not in plain["paper"]["drop"]  # the dense model has 0 there

    def test_the_dense_card_gets_no_results_of_a_pruned_model(self):
        options = ["evaluate", "org/demo", "--tasks", "pope", "--pruner", "org/lop", "--ratio", "0.3"]
        result = CliRunner().invoke(app, [*options, "--push-results", "org/demo"])
        assert isinstance(result.exception, InvalidInputError)
        assert "org/demo is the dense one" in str(result.exception)
        result = CliRunner().invoke(app, [*options, "--eval-results", "acc"])
        assert "write METRIC=DATASET:TASK" in str(result.exception)
        result = CliRunner().invoke(app, [*options, "--eval-results", "acc=a/b:c"])
        assert "Add --push-results" in str(result.exception)

    def test_too_few_questions_for_a_column(self, tasks):
        results = evaluate(demo.MODEL_DIR, "lop-paper", **on(tasks, limit=2))
        with pytest.raises(InvalidInputError, match="The task mme gave no mme_cognition_score"):
            PaperScores.of(results)
        assert "Avg" not in str(results)


class TestReward:
    def test_scores_a_candidate_in_its_state(self, tasks):
        model, processor = demo.load_model()
        reward = TaskReward("lop_demo", processor, metric="accuracy", include_path=tasks, batch_size=16)
        dense = reward(model)
        assert (
            dense.value
            == evaluate(model, "lop_demo", processor=processor, include_path=tasks)["lop_demo"].metrics["accuracy"]
        )
        assert dense.samples == 16
        for layer in model.model.language_model.layers:
            layer.mlp.down_proj.weight.data.zero_()
        assert reward(model).value < dense.value
        assert reward.name == "lop_demo:accuracy"

    @pytest.mark.slow
    def test_several_tasks_in_the_papers_scale(self, tasks):
        model, processor = demo.load_model()
        names = "mmbench_en_dev_static,mmmu_val"
        score = TaskReward(names, processor, include_path=tasks, batch_size=16)(model)
        results = evaluate(model, names, processor=processor, include_path=tasks, batch_size=16)
        mmbench, mmmu = (task.metrics for task in results.tasks)
        assert score.value == (mmbench["gpt_eval_score"] + 100 * mmmu["mmmu_acc"]) / 2
        assert score.samples == 24

    def test_which_metric(self, tasks):
        model, processor = demo.load_model()
        with pytest.raises(InvalidInputError, match=r"lop_demo has the metrics accuracy, .*metric=\.\.\."):
            TaskReward("lop_demo", processor, include_path=tasks, limit=1)(model)
        with pytest.raises(InvalidInputError, match="no metric 'f1'"):
            TaskReward("lop_demo", processor, metric="f1", include_path=tasks, limit=1)(model)
