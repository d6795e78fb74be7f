"""Collections: pushes that end up on one page of the Hub, and what happens if that page cannot be had."""

import json

import pytest

from tests.hub_server import run_python, serve

PUSH = """
import json, warnings
from hf_lop import demo

pruner = demo.load_pruner()
pruner.push_to_hub("me/lop-demo", collection="Pruned demo")
pruned = pruner.prune(demo.MODEL_DIR, 0.3)
with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    for _ in range(2):
        pruned.push_to_hub("me/demo-lop30", collection="Pruned demo")
from huggingface_hub import HfApi
slug = HfApi().create_collection("Pruned demo", exists_ok=True).slug
pruned.push_to_hub("me/by-slug", collection=slug, private=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    done = pruned.push_to_hub("me/refused", collection="org/nothing-" + 24 * "0")
print(json.dumps([str(done), [str(w.message) for w in caught if "collection" in str(w.message)]]))
"""
COMMAND = """
import sys
from hf_lop import demo
from hf_lop.cli import main

sys.argv = ["hf-lop", "prune", str(demo.MODEL_DIR), "--pruner", str(demo.PRUNER_DIR), "--ratio", "0.3", "--out", "out"]
sys.argv += ["--push-to", "me/demo-lop30", "--private", "--collection", TITLE, "--json"]
main()
"""


@pytest.fixture
def hub(tmp_path):
    with serve(tmp_path / "home") as running:
        yield running


@pytest.mark.slow
def test_pushes_meet_in_a_collection_once_each(hub, tmp_path):
    commit, said = json.loads(run_python(PUSH, hub, cwd=tmp_path).splitlines()[-1])
    (collection,) = hub.collections.values()
    assert collection["title"] == "Pruned demo"
    assert collection["private"] is False
    assert [item["id"] for item in collection["items"]] == ["me/lop-demo", "me/demo-lop30", "me/by-slug"]
    assert len(hub.history("me/demo-lop30")) >= 2
    assert hub.repositories["me/refused"].refs["main"] in commit  # what was pushed stays
    (warning,) = said
    assert "me/refused was pushed, but not added to the collection 'org/nothing-" in warning


@pytest.mark.slow
def test_by_the_command(hub, tmp_path):
    found = json.loads(run_python(COMMAND.replace("TITLE", repr("Small ones")), hub, cwd=tmp_path))
    ((slug, collection),) = hub.collections.items()
    assert found["collection"] == f"{hub.url}/collections/{slug}"
    assert found["pushed_to"].startswith(f"{hub.url}/me/demo-lop30/commit/")
    assert collection["private"]
    assert [item["id"] for item in collection["items"]] == ["me/demo-lop30"]


@pytest.mark.slow
def test_the_command_reports_what_failed(hub, tmp_path):
    nowhere = "org/nothing-" + 24 * "0"
    found = json.loads(run_python(COMMAND.replace("TITLE", repr(nowhere)), hub, cwd=tmp_path))
    assert found["collection"] is None
    assert hub.files("me/demo-lop30")["model.safetensors"]


def test_a_collection_needs_a_push():
    from hf_lop.cli.options import check_push
    from hf_lop.errors import InvalidInputError

    with pytest.raises(InvalidInputError, match="Add --push-to"):
        check_push(None, "Pruned demo")
    check_push("me/model", "Pruned demo")
    check_push(None, None)
