"""What lies beside the weights: templates and code come along or are pointed to, and no path of this machine does."""

import json

import pytest
from transformers import AutoModelForCausalLM

from hf_lop.hub.read.names import hub_id, origin
from hf_lop.hub.write.companions import copy_companions
from tests.fake_pruner import fake_pruner

OWN = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}


@pytest.fixture
def base(built, tmp_path):
    folder = tmp_path / "base"
    built["gated"].save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(OWN))
    (folder / "tokenization_mine.py").write_text("class Mine: ...")
    (folder / "notes.py").write_text("secret = 1")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools")
    return folder


def test_of_a_folder_code_is_copied_that_a_tokenizer_needs(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    fake_pruner(model).prune(model, 0.4, recover=None).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out/tokenization_mine.py").read_text() == "class Mine: ..."
    assert (tmp_path / "out/additional_chat_templates/tool_use.jinja").read_text() == "tools"
    assert not (tmp_path / "out/notes.py").exists()


def test_code_that_is_missing_is_said(base, tmp_path):
    (base / "tokenization_mine.py").unlink()
    model = AutoModelForCausalLM.from_pretrained(base)
    fake_pruner(model).prune(model, 0.4, recover=None)
    with pytest.warns(UserWarning, match=r"names code in tokenization_mine\.py, which is not in the folder"):
        model.save_pretrained(tmp_path / "out")


def test_of_a_hub_repository_its_code_is_pointed_to(base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(base))
    (tmp_path / "out").mkdir()
    copy_companions("org/base", "1" * 40, tmp_path / "out")
    assert not (tmp_path / "out/tokenization_mine.py").exists()
    named = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["auto_map"]
    assert named == {"AutoTokenizer": ["org/base--tokenization_mine.Mine", None]}
    assert (tmp_path / "out/additional_chat_templates/tool_use.jinja").read_text() == "tools"


def test_a_link_out_of_the_templates_is_not_followed(base, tmp_path):
    (tmp_path / "secret").write_text("key")
    (base / "additional_chat_templates/other.jinja").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    copy_companions(base, None, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/additional_chat_templates").iterdir()] == ["tool_use.jinja"]


@pytest.mark.parametrize(
    "name", ["../secret-client/x", "~/m", "C:\\Users\\a\\m", "/home/a/m", "./m", "a/b/c", "", None]
)
def test_paths_are_no_hub_ids(name):
    assert hub_id(name) is None


def test_a_name_counts_with_a_commit_only(llama):
    llama.name_or_path = "out/ckpt"
    assert origin(llama) == (None, None)
    llama.config._commit_hash = "1" * 40
    assert origin(llama) == ("out/ckpt", "1" * 40)


def test_nothing_is_asked_of_the_hub_by_a_folder_that_is_gone(llama, tmp_path, monkeypatch):
    llama.name_or_path = "out/ckpt"
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    pruned = fake_pruner(llama).prune(llama, 0.4, recover=None)
    pruned.save_pretrained(tmp_path / "out")
    assert "out/ckpt" not in asked
    assert "out/ckpt" not in (tmp_path / "out/config.json").read_text()
    assert "out/ckpt" not in (tmp_path / "out/README.md").read_text()
