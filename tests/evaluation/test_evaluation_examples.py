"""The examples that evaluate: the demo's table, and the paper's tables on the demo, stopped on the way and resumed."""

import re

import pytest

pytest.importorskip("lmms_eval", reason="the extra eval is not installed")

from demo_benchmarks import write_benchmarks

from hf_lop import demo
from hf_lop.evaluation.results import Results
from hf_lop.learning.data import model_batches
from tests.helpers import script

pytestmark = pytest.mark.slow


def test_evaluate_demo(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate_demo.py", "--pictures", "6", "--ratios", "0.5"])
    script("evaluate_demo.py").main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [["| none (dense)", "0.0%"], ["| 50%", "11.7%"]]
    assert lines[-1].startswith("24 questions of the report split, lmms-eval ")


def test_reproduce_paper(monkeypatch, capsys, tmp_path):
    module = script("reproduce_paper.py")
    options = ["--work", tmp_path / "work", "--demo", "--pictures", 2, "--batch-size", 16, "--samples", 16]
    options += ["--search-samples", 16, "--search", "cmaes", "--evaluations", 2, "--targets", 0.3, 0.6]
    monkeypatch.setattr("sys.argv", ["reproduce_paper.py", *map(str, options)])
    real, calls = module.evaluate, []

    def evaluate(*arguments, **named):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(module, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        module.main()
    pruner = (tmp_path / "work" / "pruner" / "model.safetensors").stat().st_mtime_ns
    assert len(list((tmp_path / "work" / "results").glob("*.json"))) == 5
    module.main()
    assert len(calls) == 1 + 1 + 3 * 4 + 1 + 2 * 3  # the stopped one; dense, Table 1, 60 % for Table 2, two predictors
    assert (tmp_path / "work" / "pruner" / "model.safetensors").stat().st_mtime_ns == pruner
    text = capsys.readouterr().out
    assert (tmp_path / "work" / "tables.md").read_text() == text
    assert [len(re.findall(r"^\| ", part, re.MULTILINE)) for part in text.split("## Table ")] == [0, 14, 6, 4]
    published = re.search(r"\| 50% \| 11\.7% \| lop \| (.*) \|", text)[1].split(" | ")
    assert [re.search(r"\((.*)\)", cell)[1] for cell in published[:-1]] == [
        "1478.07", "468.57", "82.17", "35.51", "87.47", "68.38", "9.1%",
    ]  # fmt: skip
    ours = Results.load(tmp_path / "work" / "results" / "lop-0.5.json")
    assert published[2].startswith(f"{ours[module.MMBENCH].metrics['gpt_eval_score']:.2f} (")
    assert ours.pruning["recovery"] is None
    module.main()
    assert capsys.readouterr().out == text
    assert len(calls) == 21


def test_mmbench_as_data(tmp_path):
    """What the paper calibrates on: the questions as lmms-eval puts them, and the right letter."""
    folder = write_benchmarks(tmp_path, 2)
    chats = script("reproduce_paper.py").mmbench_chats([folder])
    assert len(chats) == 8
    (picture, text), answer = chats[0][0]["content"], chats[0][1]["content"][0]["text"]
    assert picture["image"].size == (84, 84)
    assert re.match(r"What colour is the \w+ object\? There are several options:\nA\. \w+\nB\. ", text["text"])
    assert answer in "ABCD"
    batch = next(model_batches(demo.load_model()[1], chats, batch_size=4))
    assert batch["input_ids"].shape[0] == 4
    assert (batch["labels"] != -100).any(1).all()
