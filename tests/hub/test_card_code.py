"""Every line of code on a card runs as printed, against the Hub it is printed on: Python, shell, benchmarks.

Benchmarks get one option more, a folder with stand-ins for the data that this Hub does not have; lmms-eval's own command,
to which such a folder cannot give another "pope", also gets another task.
"""

import json
import re
import shlex

import pytest

from tests.hub_server import run_python, serve

pytestmark = pytest.mark.slow

MAKE = """
from huggingface_hub import HfApi
from hf_lop import demo
from demo_benchmarks import write_benchmarks

HfApi().create_repo("me/demo")
HfApi().upload_folder(repo_id="me/demo", folder_path=demo.MODEL_DIR)
pruner = demo.load_pruner()
pruner.config.base_model = "me/demo"
pruner.push_to_hub("me/lop-demo")
type(pruner).from_pretrained("me/lop-demo").prune("me/demo", 0.3).push_to_hub("me/demo-lop30")
write_benchmarks("tasks", pictures=2)
"""
MAKE_TEXT = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from hf_lop import LOPPruner
from tests.small_models import CONFIGS, text_batches
from tests.tiny_repo import build_processor

tokenizer = build_processor().tokenizer
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(LlamaConfig(**{**CONFIGS["gated"].to_dict(), "vocab_size": len(tokenizer)}))
model.push_to_hub("me/text")
tokenizer.push_to_hub("me/text")
model = AutoModelForCausalLM.from_pretrained("me/text")
LOPPruner.fit(model, text_batches(2), text_batches(1, seed=1), predictor="mlp").push_to_hub("me/lop-text")
LOPPruner.from_pretrained("me/lop-text").prune("me/text", 0.5).push_to_hub("me/text-lop50")
"""
TASK = """
task: hellaswag
dataset_path: json
dataset_kwargs: {data_files: {test: rows.json}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
ASK = """
from hf_lop.demo.scenes import draw_scene

scene = draw_scene("report/0")
content = [{"type": "image", "image": scene.image}, {"type": "text", "text": scene.questions[0].text}]
(said,) = pipe(text=[{"role": "user", "content": content}], max_new_tokens=2, return_full_text=False)
print(said["generated_text"].split()[0] == scene.questions[0].answer, type(pipe.model).__module__)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("cards")) as running:
        run_python(MAKE, running)
        yield running


def code(hub, repo_id, language):
    card = hub.files(repo_id)["README.md"].decode()
    return re.findall(rf"^```{language}\n(.*?)^```", card, re.DOTALL | re.MULTILINE)


def commands(hub, repo_id):
    (block,) = code(hub, repo_id, "bash")
    return [shlex.split(line, comments=True) for line in block.splitlines() if not line.startswith("pip ")]


def run_command(words, hub, **options):
    if words[:2] == ["python", "-m"]:
        start = f"import runpy, sys; sys.argv = {words[2:]!r}; runpy.run_module({words[2]!r}, run_name='__main__')"
    else:
        assert words[0] == "hf-lop", words
        start = f"import sys; from hf_lop.cli import main; sys.argv = {words!r}; main()"
    return run_python(start, hub, **options)


def test_python_of_the_pruned_model(hub, tmp_path):
    with_hf_lop, without, _ = code(hub, "me/demo-lop30", "python")
    same = "\nassert model.num_parameters() == 583_200, model.num_parameters()"
    run_python(with_hf_lop + same, hub, home=tmp_path)
    run_python(without + same, hub, home=tmp_path, block=("hf_lop", "wrapt"))


def test_pipeline_of_the_pruned_model(hub, tmp_path):
    block = code(hub, "me/demo-lop30", "python")[2]
    right, module = run_python(block + ASK, hub, home=tmp_path).split()
    assert (right, module.split(".")[0]) == ("True", "transformers_modules")
    trusting = block.replace(", trust_remote_code=True", "")  # "or import hf_lop, and no trust"
    right, module = run_python("import hf_lop\n" + trusting + ASK, hub, home=tmp_path).split()
    assert (right, module.split(".")[0]) == ("True", "transformers")


def test_python_of_the_pruner(hub, tmp_path):
    assert "FFN neurons removed" in run_python("\n".join(code(hub, "me/lop-demo", "python")), hub, home=tmp_path)
    theirs = hub.files("me/model-lop30")["model.safetensors"]
    assert theirs == hub.files("me/demo-lop30")["model.safetensors"]


def test_shell_of_the_pruner(hub, tmp_path):
    pytest.importorskip("lmms_eval", reason="the extra eval is not installed")
    prune, evaluate = commands(hub, "me/lop-demo")
    run_command(prune, hub, home=tmp_path / "home", cwd=tmp_path)
    weights = tmp_path / "model-lop30" / "model.safetensors"
    assert weights.read_bytes() == hub.files("me/demo-lop30")["model.safetensors"]
    evaluate += ["--include-path", str(hub.home / "tasks"), "--push-results", "me/lop-demo"]
    said = run_command(evaluate, hub, home=tmp_path / "home", cwd=tmp_path)
    assert "mme" in said
    table = hub.files("me/lop-demo")["README.md"].decode().split("<!-- results:begin -->")[1]
    assert "| benchmark | metric | neurons removed | pruned model | questions |" in table
    assert len(re.findall(r"^\| .* \| 30\.1% \| ", table, re.MULTILINE)) >= 4


def test_shell_of_the_pruned_model(hub, tmp_path):
    pytest.importorskip("lmms_eval", reason="the extra eval is not installed")
    ours, theirs = commands(hub, "me/demo-lop30")
    tasks, options = str(hub.home / "tasks"), {"home": tmp_path / "home", "cwd": tmp_path}
    assert "mme" in run_command([*ours, "--include-path", tasks], hub, **options)
    theirs = ["lop_demo" if word == "pope" else word for word in theirs]
    run_command([*theirs, "--include_path", tasks, "--output_path", "out"], hub, **options)
    assert list((tmp_path / "out").rglob("*_results.json"))  # lmms-eval exits with 0 whatever happens


def test_a_text_model_and_its_pruner(hub, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    run_python(MAKE_TEXT, hub)
    with_hf_lop, without, pipeline = code(hub, "me/text-lop50", "python")
    assert "AutoModelForCausalLM, AutoTokenizer" in with_hf_lop
    run_python(with_hf_lop, hub, home=tmp_path)
    run_python(without + pipeline + "\nprint(pipe('user'))", hub, home=tmp_path, block=("hf_lop", "wrapt"))
    row = {"question": "What colour is", "choices": [" red", " seven"], "answer": 0}
    (tmp_path / "rows.json").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    (tmp_path / "task.yaml").write_text(TASK)
    (evaluate,) = commands(hub, "me/text-lop50")
    options = {"home": tmp_path / "home", "cwd": tmp_path}
    assert "hellaswag" in run_command([*evaluate, "--include-path", "."], hub, **options)
    _, evaluate = commands(hub, "me/lop-text")
    evaluate[evaluate.index("0.3")] = "0.5"
    assert "hellaswag" in run_command([*evaluate, "--include-path", "."], hub, **options)
