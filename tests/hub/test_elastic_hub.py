"""Elastic repositories on a Hub: what is downloaded for a size, once, whole or not at all, by one process or several."""

import json
import threading

import pytest

from tests.hub_server import run_python, serve

pytestmark = pytest.mark.slow

MAKE = """
import copy, torch
from tests.fake_pruner import fake_pruner
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
                                     num_attention_heads=4, bos_token_id=1, eos_token_id=2)).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.05)
ids = torch.arange(3, 40)[None]
pruner = fake_pruner(model)
torch.save({r: pruner.prune(copy.deepcopy(model), r, recover=None)(ids).logits for r in (0.3, 0.5, 0.7)}, "expected.pt")
made = pruner.make_elastic(model)
print(made.push_to_hub("me/elastic", private=True).commit_url)
made.push_to_hub("me/elastic", revision="shards", max_shard_size="2MB")
"""
LOAD = """
import json, torch
import hf_lop
from transformers import AutoModelForCausalLM

model, info = AutoModelForCausalLM.from_pretrained("me/elastic", lop_ratio={ratio}, lop_recover=None,
                                                   output_loading_info=True, **{more})
assert not any(info.values()), info
with torch.no_grad():
    found = model(torch.arange(3, 40)[None]).logits
torch.testing.assert_close(found, torch.load({expected!r})[{ratio}], rtol=1e-4, atol=1e-4)
print(json.dumps({{"name": model.name_or_path, "commit": model.config._commit_hash, "weights": model.num_parameters() * 4,
                  "made": model.config.pruning_config}}))
"""


@pytest.fixture(scope="module")
def elastic(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("maker")) as running:
        run_python(MAKE, running)
        yield running


@pytest.fixture
def load(elastic, tmp_path):
    def run(ratio=0.5, home=tmp_path, code="", hub=elastic, **more):
        expected = str(elastic.home / "expected.pt")
        out = run_python(code + LOAD.format(ratio=ratio, more=more, expected=expected), hub, home=home)
        return json.loads(out.splitlines()[-1])

    return run


def weights_sent(hub):
    return sum(count for path, count in hub.sent.items() if "/pruner/" not in path and path.endswith(".safetensors"))


def test_the_push_is_one_commit_and_stock_loaders_see_a_dense_model(elastic, tmp_path):
    assert elastic.history("me/elastic") == ["Upload model", "initial commit"]
    assert elastic.repositories["me/elastic"].private
    files = set(elastic.files("me/elastic"))
    assert {"model.safetensors", "elastic/model.safetensors", "pruner/config.json", "pruner/model.safetensors"} < files
    assert "model.safetensors" not in elastic.files("me/elastic", "shards")
    elastic.sent.clear()
    code = """
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained("me/elastic", output_loading_info=True)
assert not any(info.values()), info
assert model.config.intermediate_size == 1024
"""
    run_python(code, elastic, home=tmp_path, block=("hf_lop",))
    assert not [path for path in elastic.sent if "/elastic/model" in path or "/pruner/" in path]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_a_size_downloads_what_it_weighs(elastic, load, ratio):
    elastic.sent.clear()
    first = load(ratio)
    assert first["weights"] < weights_sent(elastic) <= 1.15 * first["weights"]
    if ratio > 0.3:  # there some layers keep more than the transposed share
        assert weights_sent(elastic) <= 1.01 * first["weights"]
    assert first["name"] == "me/elastic"
    assert first["commit"] == first["made"]["base_revision"] == elastic.repositories["me/elastic"].refs["main"]


def test_the_same_size_again_downloads_nothing_and_works_offline(elastic, load):
    load()
    elastic.sent.clear()
    asked = len(elastic.log)
    load()
    assert elastic.sent == {}
    assert len(elastic.log) - asked <= 2
    load(hub=None)
    load(0.5, code="import os\nos.environ['HF_HUB_OFFLINE'] = '1'\n")
    before = sum(elastic.sent.values())
    load(0.3)
    assert "/pruner/model.safetensors" not in " ".join(elastic.sent)  # only the weights of another size
    assert sum(elastic.sent.values()) > before


def test_another_branch_cache_and_token(elastic, load, tmp_path):
    elastic.sent.clear()
    found = load(revision="shards", token="dummy", cache_dir=str(tmp_path / "other"))
    assert found["commit"] == elastic.repositories["me/elastic"].refs["shards"]
    assert any("model-0000" in path for path in elastic.sent)
    assert list((tmp_path / "other").glob("models--me--elastic"))


def test_recovery_downloads_hardly_more(elastic, tmp_path):
    elastic.sent.clear()
    code = """
import hf_lop
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/elastic", lop_ratio=0.5)
assert model.config.pruning_config["recovery"] == "sketch"
print(model.num_parameters() * 4)
"""
    weights = int(run_python(code, elastic, home=tmp_path))
    assert weights_sent(elastic) <= 1.02 * weights


def test_a_killed_download_leaves_nothing_that_loads(elastic, load, tmp_path):
    kill = """
import os
from hf_lop.hub.elastic import size_file
write, left = size_file._write, [12]
def dying(*arguments):
    left[0] -= 1
    if not left[0]:
        print("killed", flush=True)
        os._exit(0)
    return write(*arguments)
size_file._write = dying
import hf_lop
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("me/elastic", lop_ratio=0.5, lop_recover=None)
"""
    assert run_python(kill, elastic, home=tmp_path).split() == ["killed"]
    (partial,) = (tmp_path / "assets").rglob("*.partial")
    assert (partial / partial.name[1:].removesuffix(".partial") / "model.safetensors").is_file()
    load()
    assert not list((tmp_path / "assets").rglob("*.partial"))


def test_a_server_that_fails_leaves_nothing(elastic, tmp_path):
    code = """
import hf_lop
from hf_lop.errors import LOPError
from hf_lop.hub.read import repository as files
from transformers import AutoModelForCausalLM
read, left = files.Repository.read_into, [20]
def failing(self, file, start, buffer):
    left[0] -= 1
    if left[0] < 0:
        raise files.InvalidInputError("The server is gone. Try again.")
    return read(self, file, start, buffer)
files.Repository.read_into = failing
try:
    AutoModelForCausalLM.from_pretrained("me/elastic", lop_ratio=0.5)
except LOPError as error:
    print(error)
"""
    assert "The server is gone" in run_python(code, elastic, home=tmp_path)
    assert not [path for path in (tmp_path / "assets").rglob("model.safetensors") if ".partial" not in str(path)]


def test_two_processes_download_once(elastic, load):
    load(0.3)  # config and pruner are in the cache
    elastic.sent.clear()
    results, errors = [], []

    def run():
        try:
            results.append(load(0.7))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert results[0] == results[1]
    assert weights_sent(elastic) <= 1.01 * results[0]["weights"]


def test_pull(elastic, tmp_path):
    code = """
from hf_lop.cli import main
import sys
sys.argv = ["hf-lop", "pull", "me/elastic", "--ratio", "0.5", "--recover", "none", "--out", "half"]
main()
"""
    elastic.sent.clear()
    run_python(code, elastic, home=tmp_path)
    assert weights_sent(elastic) <= 1.01 * (tmp_path / "half/model.safetensors").stat().st_size
    check = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("half", trust_remote_code=True)
expected = torch.load({str(elastic.home / "expected.pt")!r})[0.5]
torch.testing.assert_close(model(torch.arange(3, 40)[None]).logits, expected, rtol=1e-4, atol=1e-4)
"""
    run_python(check, home=tmp_path, block=("hf_lop", "wrapt"))


def test_the_card_runs(elastic, tmp_path):
    card = elastic.files("me/elastic")["README.md"].decode()
    blocks = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    assert len(blocks) == 2
    check = "\nassert len(model.config.intermediate_size) == 6\nassert elastic.plan.pruning_ratio == 0.5\n"
    run_python("\n".join(blocks) + check, elastic, home=tmp_path)
