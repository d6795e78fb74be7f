"""lmms-eval as its users start it: a Python that never mentions hf_lop, one process and two, our model and its own wrapper."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="the extra eval is not installed")

from demo_benchmarks import write_benchmarks

from hf_lop import LOPPruner, demo, evaluate
from hf_lop.hub.read.load import load_model, load_processor
from tests import warm
from tests.tiny_repo import build_repo, question

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MODULE = "import runpy, sys; del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"


def launch(module, *arguments, processes=1):
    """Run a module, return what it printed and wrote to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment["OMP_NUM_THREADS"] = "1"
    if processes == 1:
        child = warm.run(MODULE, module, *arguments, env=environment)
    else:
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", module]
        command = [sys.executable, *several, *map(str, arguments)]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout + child.stderr


def lmms_eval(model, arguments, task, tasks, out, **options):
    """Run lmms-eval; it exits with 0 whatever happens, so what counts are the files it leaves."""
    said = launch(
        "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", task, "--include_path", tasks,
        "--output_path", out, "--log_samples", **options,
    )  # fmt: skip
    found = sorted(out.rglob(f"*_samples_{task}.jsonl"))
    assert len(found) == 1, said
    samples = [json.loads(line) for line in found[0].read_text().splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    assert [sample["doc_id"] for sample in samples] == list(range(len(samples)))
    given = [sample["filtered_resps"] for sample in samples]
    return tuple(answer if isinstance(answer, str) else answer[0] for answer in given)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("tasks"), 5)


@pytest.fixture(scope="module")
def expected(tasks):
    """What the pruned model answers in memory."""
    model, processor = demo.load_model()
    demo.load_pruner().prune(model, 0.7)
    results = evaluate(model, "lop_demo", processor=processor, include_path=tasks)["lop_demo"]
    assert 0.5 < results.metrics["accuracy"] < 1  # answers that are all right would show little
    return results.answers


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "demo-lop70"
    demo.load_pruner().prune(demo.load_model()[0], 0.7).save_pretrained(folder)  # recovered in float32, as above
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_same_answers_as_in_memory(processes, expected, pruned, tasks, tmp_path):
    arguments = f"pretrained={pruned},dtype=float32"
    assert lmms_eval("hf_lop", arguments, "lop_demo", tasks, tmp_path, processes=processes) == expected


def test_pruned_on_the_fly(expected, tasks, tmp_path):
    arguments = f"pretrained={demo.MODEL_DIR},pruner={demo.PRUNER_DIR},ratio=0.7,dtype=float32"
    assert lmms_eval("hf_lop", arguments, "lop_demo", tasks, tmp_path) == expected


def test_evaluate_in_two_processes(expected, pruned, tasks, tmp_path):
    """Both return the same; the first alone prints and writes."""
    out = tmp_path / "results.json"
    said = launch(
        "tests.run_cli", "evaluate", pruned, "--tasks", "lop_demo", "--include-path", tasks, "--dtype", "float32",
        "--batch-size", 4, "--out", out, processes=2,
    )  # fmt: skip
    assert said.count("demo-lop70, ") == 1
    (task,) = json.loads(out.read_text())["tasks"]
    assert tuple(task["answers"]) == expected
    assert task["samples"] == len(expected) == 20


def test_its_own_wrapper_loads_a_pruned_repository(tasks, tmp_path):
    """lmms-eval's `qwen2_5_vl`, which calls the class of transformers, answers as `hf_lop` does."""
    pytest.importorskip("decord", reason="lmms-eval's qwen2_5_vl needs decord, which has no build for this Python")
    (tmp_path / "base").mkdir()
    build_repo(tmp_path / "base")
    model, processor = load_model(tmp_path / "base"), load_processor(tmp_path / "base")
    batch = dict(question(processor))
    LOPPruner.fit(model, [batch], [batch], predictor="mlp").prune(model, 0.4).save_pretrained(tmp_path / "pruned")
    assert isinstance(model.config.text_config.intermediate_size, list)
    limits = processor.image_processor.size  # by default the wrapper blows pictures up to those of a 7B model
    pixels = f"min_pixels={limits['shortest_edge']},max_pixels={limits['longest_edge']}"
    arguments = f"pretrained={tmp_path / 'pruned'},device=cpu,device_map=cpu,{pixels}"
    theirs = lmms_eval("qwen2_5_vl", arguments, "lop_demo", tasks, tmp_path / "out")
    ours = evaluate(tmp_path / "pruned", "lop_demo", include_path=tasks, dtype="bfloat16")["lop_demo"]
    assert ours.answers == theirs
    assert len(set(theirs)) > 1
