"""The whole trip over HTTP: push and pull a pruner, prune, push and pull the model, run the cards' code as printed.

Every step is a Python of its own with the real huggingface_hub client; each reader starts with an empty cache.
"""

import json
import re

import pytest

from hf_lop.hub.cards.facts import MARKER
from hf_lop.hub.read.made import KEPT
from hf_lop.units.ship import remote_code
from tests.hub_server import run_python, serve
from tests.tiny_repo import build_repo

pytestmark = pytest.mark.slow

FACTS = """
import torch
from tests.tiny_repo import question

def logits(model, processor):
    with torch.no_grad():
        return model.eval()(**question(processor)).logits
"""
MAKE = (
    FACTS
    + """
from huggingface_hub import HfApi
from transformers import AutoModelForImageTextToText, AutoProcessor
from hf_lop import LOPPruner

HfApi().create_repo("me/base")
HfApi().upload_folder(repo_id="me/base", folder_path="base")
model, processor = AutoModelForImageTextToText.from_pretrained("me/base"), AutoProcessor.from_pretrained("me/base")
batch = dict(question(processor))
pruner = LOPPruner.fit(model, [batch], [batch], provenance={"dataset": "one picture", "samples": 1})
print(pruner.push_to_hub("lop-base", private=True).commit_url)

pruner = LOPPruner.from_pretrained("me/lop-base")
pruned = pruner.prune("me/base", 0.3)
torch.save(logits(pruned, processor), "expected.pt")
print(pruned.push_to_hub("base-lop30", tags=["tiny"]).commit_url)
"""
)
COMPARE = (
    FACTS
    + """
assert torch.equal(logits(model, processor), torch.load({expected!r}))
print(type(model).__module__, model.config.pruning_config["pruner"])
"""
)


@pytest.fixture(scope="module")
def trip(tmp_path_factory):
    home = tmp_path_factory.mktemp("maker")
    (home / "base").mkdir()
    build_repo(home / "base")
    with serve(home) as running:
        run_python(MAKE, running)
        yield running


def blocks(hub, repo_id):
    return re.findall(r"```python\n(.*?)```", hub.files(repo_id)["README.md"].decode(), re.DOTALL)


def test_pushes_are_whole_and_one_commit_each(trip):
    assert trip.history("me/lop-base") == trip.history("me/base-lop30") == ["Upload model", "initial commit"]
    assert trip.repositories["me/lop-base"].private
    pruner, model = trip.files("me/lop-base"), trip.files("me/base-lop30")
    assert set(pruner) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "assets/plans.png", "assets/quality.png",
    }  # fmt: skip
    base = set(trip.files("me/base"))
    assert set(model) == base | {*remote_code(), "assets/widths.png", KEPT}
    assert model["LICENSE"] == b"MIT\n"
    config = json.loads(model["config.json"])
    assert config["pruning_config"]["base_model"] == "me/base"
    assert config["pruning_config"]["base_revision"] == trip.repositories["me/base"].refs["main"]
    assert config["pruning_config"]["pruner"] == "me/lop-base"
    assert config["pruning_config"]["pruner_revision"] == trip.repositories["me/lop-base"].refs["main"]
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_lop.Qwen2_5_VLForConditionalGeneration"


def test_cards_name_repositories_commits_and_no_path(trip, tmp_path_factory):
    pruner, model = (trip.files(repo_id)["README.md"].decode() for repo_id in ("me/lop-base", "me/base-lop30"))
    for card in (pruner, model):
        assert "base_model: me/base" in card
        assert trip.repositories["me/base"].refs["main"] in card
        assert str(tmp_path_factory.getbasetemp()) not in card
        assert "/tmp" not in card
        assert "license: mit" in card
    assert "base_model_relation: finetune" in model
    assert "base_model_relation: adapter" in pruner
    assert "- tiny" in model
    assert "one picture" in pruner


def test_card_code_with_hf_lop(trip, tmp_path):
    check = COMPARE.format(expected=str(trip.home / "expected.pt"))
    out = run_python(blocks(trip, "me/base-lop30")[0] + check, trip, home=tmp_path)
    assert out.split() == ["transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "me/lop-base"]


def test_card_code_without_hf_lop(trip, tmp_path):
    """The child can import neither hf_lop nor what only hf_lop brings; saving again keeps the repository loadable."""
    code = blocks(trip, "me/base-lop30")[1] + COMPARE.format(expected=str(trip.home / "expected.pt"))
    code += """
for folder in ("again", "and_again"):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(model, processor), torch.load(EXPECTED))
""".replace("EXPECTED", repr(str(trip.home / "expected.pt")))
    out = run_python(code, trip, home=tmp_path, block=("hf_lop", "wrapt"))
    assert out.split()[0].startswith("transformers_modules.me.base")
    again = f"import hf_lop\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n{FACTS}"
    again += f"""
model = AutoModelForImageTextToText.from_pretrained("again")
assert type(model).__module__.startswith("transformers.models"), type(model)
assert torch.equal(logits(model, AutoProcessor.from_pretrained("again")), torch.load({str(trip.home / "expected.pt")!r}))
"""
    run_python(again, trip, home=tmp_path)


def test_without_either_the_error_is_clear(trip, tmp_path):
    code = """
from transformers import AutoModelForImageTextToText
try:
    AutoModelForImageTextToText.from_pretrained("me/base-lop30")
except Exception as error:
    print(type(error).__name__, error)
"""
    assert "intermediate_size" in run_python(code, trip, home=tmp_path, block=("hf_lop",))


def test_pruner_card_code(trip, tmp_path):
    code = "\n".join(blocks(trip, "me/lop-base"))
    assert "FFN neurons removed" in run_python(code, trip, home=tmp_path)
    assert trip.history("me/model-lop30") == ["Upload model", "initial commit"]
    ours, theirs = (trip.files(repo_id) for repo_id in ("me/model-lop30", "me/base-lop30"))
    assert ours["model.safetensors"] == theirs["model.safetensors"]


def test_pushing_again(trip, tmp_path):
    """A card of one's own stays, files of earlier weights go, branches and a stock push work."""
    code = f"""
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForImageTextToText
import hf_lop

model = AutoModelForImageTextToText.from_pretrained("me/base-lop30")
model.push_to_hub("me/again", max_shard_size="100KB")
sharded = HfApi().list_repo_files("me/again")
assert "model.safetensors.index.json" in sharded and "model.safetensors" not in sharded, sharded
assert "me/again" in ModelCard.load("me/again").content
ModelCard(ModelCard.load("me/again").content.replace({MARKER!r}, "") + "My own words.").push_to_hub("me/again")
model.push_to_hub("me/again", commit_message="Whole")
model.push_to_hub("me/again", revision="branch", max_shard_size="100KB")
model.save_pretrained("folder", push_to_hub=True, repo_id="me/folder", commit_message="Saved")
model.save_pretrained("folder", push_to_hub=True, repo_id="me/folder", max_shard_size="100KB", private=True)

config = model.config
config.text_config.intermediate_size = 16
del config.pruning_config
plain = type(model)(config)
plain.push_to_hub("me/plain")
"""
    run_python(code, trip, home=tmp_path)
    files = trip.files("me/again")
    assert not [name for name in files if "-of-" in name or "index" in name]
    assert b"My own words." in files["README.md"]
    assert trip.history("me/again")[0] == "Whole"
    branch = trip.files("me/again", "branch")
    assert "model.safetensors.index.json" in branch
    assert "model.safetensors" not in branch
    folder = trip.files("me/folder")
    assert trip.history("me/folder") == ["Upload model", "Saved", "initial commit"]
    assert set(folder) == set(branch)
    assert "modeling_lop.py" not in trip.files("me/plain")
    assert "automatically generated" in trip.files("me/plain")["README.md"].decode()


def test_offline_after_one_pull(trip, tmp_path):
    """A model pulled once prunes and saves whole from the cache."""
    script = """
import os
from hf_lop import LOPPruner
model = LOPPruner.from_pretrained("me/lop-base").prune("me/base", 0.5)
model.save_pretrained("out")
print(*sorted(os.listdir("out")))
"""
    online = run_python(script, trip, home=tmp_path)
    before = len(trip.log)
    assert run_python("import shutil; shutil.rmtree('out')" + script, home=tmp_path) == online
    assert len(trip.log) == before
    assert "tokenizer.json" in online.split()
