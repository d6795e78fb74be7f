"""Exports: other spellings of the config, uniform widths, what is refused, and pushes to a Hub over HTTP."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2Config
from typer.testing import CliRunner

import hf_lop
from hf_lop import demo
from hf_lop.cli import app
from hf_lop.errors import CheckpointMismatchError, InvalidInputError, UnsupportedModelError
from hf_lop.evaluation.comparison.bias import mark_output_biases
from hf_lop.hub.cards.export import FORMATS, export_card
from hf_lop.hub.export.configs import per_layer_config
from hf_lop.hub.export.uniform import widen
from hf_lop.units.configs import layer_widths
from hf_lop.units.kinds import find_units
from hf_lop.units.modeling_lop import add_output_biases
from tests.helpers import logits
from tests.hub_server import run_python, serve
from tests.tiny_models import tiny_inputs, tiny_model
from tests.tiny_pruned import WIDTHS, prune_tiny, save, text_model

DENSE = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pruned Qwen2 with tokenizer, license, and a card of its own."""
    folder = tmp_path_factory.mktemp("exports") / "model"
    save(prune_tiny(text_model("qwen2", tie_word_embeddings=True)), folder)
    (folder / "LICENSE").write_text("MIT\n")
    return folder


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "pictures"
    prune_tiny(tiny_model("qwen2_5_vl")).save_pretrained(folder)
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# -- Config only -------------------------------------------------------------------------------------------------------


def test_config_exports_change_the_config_only(folder, tmp_path):
    to = "per_layer_config"
    written = hf_lop.export(folder, to, tmp_path / "out")
    before, after = config_of(folder), config_of(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert {"LICENSE", "tokenizer.json", "generation_config.json", "README.md"} <= set(written.files)
    assert after["intermediate_size"] == DENSE
    assert after["pruning_config"] == before["pruning_config"] | {"export": {"format": to, "widths": WIDTHS}}
    assert written.parameters["exported"] == written.parameters["pruned"] < written.parameters["dense"]
    same = {"intermediate_size", "pruning_config", "per_layer_config"}
    assert {k: v for k, v in before.items() if k not in same} == {k: v for k, v in after.items() if k not in same}


def test_per_layer_config_in_transformers_own_config_class(folder, tmp_path):
    """Its schema, not our reading of it: the constructor of the stock class, which hf_lop does not hook."""
    hf_lop.export(folder, "per_layer_config", tmp_path / "out")
    raw = config_of(tmp_path / "out")
    assert raw["per_layer_config"] == {"1": {"intermediate_size": 40}, "2": {"intermediate_size": 17}, "3": {"intermediate_size": 64}}  # fmt: skip
    config = Qwen2Config(**raw)
    assert config.is_heterogeneous
    assert [config.per_layer_config[i].intermediate_size for i in range(4)] == WIDTHS
    config.save_pretrained(tmp_path / "again")
    again = config_of(tmp_path / "again")
    assert (again["per_layer_config"], again["intermediate_size"]) == (raw["per_layer_config"], DENSE)


def test_per_layer_config_loads_through_the_hook_and_exports_again(folder, tmp_path):
    hf_lop.export(folder, "per_layer_config", tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(
        logits(model, tiny_inputs("llama")), logits(AutoModelForCausalLM.from_pretrained(folder), tiny_inputs("llama"))
    )
    hf_lop.export(tmp_path / "out", "per_layer_config", tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "out")


def test_a_picture_model_as_per_layer_config(picture_folder, tmp_path):
    hf_lop.export(picture_folder, "per_layer_config", tmp_path / "out")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    expected = logits(AutoModelForImageTextToText.from_pretrained(picture_folder), tiny_inputs("qwen2_5_vl"))
    assert torch.equal(logits(model, tiny_inputs("qwen2_5_vl")), expected)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 50), st.booleans())
def test_sparse_configs_say_every_width(widths, dense, nested):
    inner = {"intermediate_size": widths, "num_hidden_layers": len(widths)}
    config = {"text_config": inner} if nested else inner
    before = copy.deepcopy(config)
    made = per_layer_config(config, widths, dense)
    assert config == before
    text = made["text_config"] if nested else made
    sparse = text["per_layer_config"]
    assert [
        sparse.get(str(i), {"intermediate_size": dense})["intermediate_size"] for i in range(len(widths))
    ] == widths
    assert all(entry["intermediate_size"] != dense for entry in sparse.values())


# -- Uniform -----------------------------------------------------------------------------------------------------------

STOCK = """
import sys, torch, transformers
folder, auto, expected = {folder!r}, transformers.{auto}, torch.load({expected!r})
model, info = auto.from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
assert type(model).__module__.startswith("transformers.models."), type(model)
with torch.no_grad():
    print(float((model.eval()(**expected["inputs"]).logits - expected["logits"]).abs().max()))
assert "hf_lop" not in sys.modules
print(model.config.get_text_config().intermediate_size, model.num_parameters())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5_vl"])
def test_uniform_loads_in_plain_transformers(kind, tmp_path):
    """In a process that cannot import hf_lop, and without remote code."""
    model, widths = prune_tiny(tiny_model(kind), [80, 40, 17, 64]), [80, 40, 17, 64]
    model.save_pretrained(tmp_path / "model")
    written = hf_lop.export(tmp_path / "model", "uniform", tmp_path / "out")
    torch.save({"inputs": tiny_inputs(kind), "logits": logits(model, tiny_inputs(kind))}, tmp_path / "expected.pt")
    auto = "AutoModelForCausalLM" if kind == "qwen2" else "AutoModelForImageTextToText"
    code = STOCK.format(folder=str(tmp_path / "out"), auto=auto, expected=str(tmp_path / "expected.pt"))
    error, width, parameters = run_python(code, home=tmp_path / "home", block=("hf_lop", "wrapt")).split()
    assert float(error) < 1e-5
    assert int(width) == max(widths)
    assert int(parameters) == written.parameters["exported"]
    assert written.parameters["pruned"] < written.parameters["exported"] < written.parameters["dense"]
    config = config_of(tmp_path / "out")
    assert "auto_map" not in config
    assert config["pruning_config"]["export"] == {"format": "uniform", "widths": widths}
    assert not (tmp_path / "out/modeling_lop.py").exists()


@pytest.mark.parametrize("kind", ["gated", "gated_bias", "fused", "plain_bias", "conv1d"])
def test_wider_layers_compute_the_same(built, batches, kind):
    model = copy.deepcopy(built[kind])
    with torch.no_grad():
        before = model(**batches[0]).logits
        for unit in find_units(model):
            assert widen(model, unit, 61).count == 61
        after = model(**batches[0]).logits
    assert {unit.count for unit in find_units(model)} == {61}
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_uniform_of_another_field_name(built, batches, tmp_path):
    """GPT-2 calls its FFN width n_inner and stores weights transposed; only the config formats cannot say that."""
    model = prune_tiny(copy.deepcopy(built["conv1d"]), [40, 20, 7, 30])
    model.save_pretrained(tmp_path / "model")
    hf_lop.export(tmp_path / "model", "uniform", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert layer_widths(again.config) is None
    with torch.no_grad():
        torch.testing.assert_close(again(**batches[0]).logits, model(**batches[0]).logits, rtol=1e-4, atol=1e-4)
    assert again.config.n_inner == 40
    with pytest.raises(UnsupportedModelError, match="another name"):
        hf_lop.export(tmp_path / "model", "per_layer_config", tmp_path / "sparse")


# -- Refusals ----------------------------------------------------------------------------------------------------------


def test_what_is_no_pruned_model_is_refused(tmp_path, built):
    built["gated"].save_pretrained(tmp_path / "dense")
    dense, pruner = (
        (tmp_path / "dense", "one FFN width for all layers"),
        (demo.PRUNER_DIR, "is a pruner, not a pruned model"),
    )
    for name, words in (dense, pruner):
        with pytest.raises(UnsupportedModelError, match=words):
            hf_lop.export(name, "uniform", tmp_path / "out")
    with pytest.raises(InvalidInputError, match="no-such"):
        hf_lop.export(tmp_path / "no-such", "uniform", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arguments_are_checked_first(folder, tmp_path):
    with pytest.raises(InvalidInputError, match="no format 'onnx'; choose one of per_layer_config"):
        hf_lop.export(folder, "onnx", tmp_path / "out")
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InvalidInputError, match="not empty"):
        hf_lop.export(folder, "uniform", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_added_biases_are_refused_where_stock_code_drops_them(tmp_path):
    model = prune_tiny(text_model("llama"))
    add_output_biases(model, find_units(model))
    mark_output_biases(model)
    model.save_pretrained(tmp_path / "model")
    for to in ("per_layer_config", "uniform"):
        with pytest.raises(UnsupportedModelError, match="recover='bias'"):
            hf_lop.export(tmp_path / "model", to, tmp_path / "out")


@pytest.mark.parametrize(("to", "instead"), [("anymodel", "vllm serve"), ("block_configs", "as per_layer_config")])
def test_a_format_that_is_gone_says_what_to_do_instead(folder, tmp_path, to, instead):
    with pytest.raises(InvalidInputError, match=f"no format '{to}' any more.*{instead}.*or.* as uniform"):
        hf_lop.export(folder, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_leaves_nothing(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for to in ("per_layer_config", "uniform"):
        with pytest.raises(CheckpointMismatchError):
            hf_lop.export(tmp_path / "model", to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("file", ["model.safetensors", "generation_config.json"])
def test_a_link_out_of_the_folder_is_not_exported(folder, tmp_path, file):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / file).rename(tmp_path / "secret")
    (tmp_path / "model" / file).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointMismatchError, match=f"{file} of .* is a link"):
        hf_lop.export(tmp_path / "model", "per_layer_config", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_other_names_are_exported_and_absent_ones_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    weights, index = tmp_path / "model/model.safetensors", tmp_path / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(weights), "own.safetensors")}))
    weights.rename(tmp_path / "model/own.safetensors")
    written = hf_lop.export(tmp_path / "model", "per_layer_config", tmp_path / "out")
    assert {"own.safetensors", "model.safetensors.index.json"} <= set(written.files)
    (tmp_path / "model/own.safetensors").unlink()
    with pytest.raises(CheckpointMismatchError, match=r"own\.safetensors of .* is missing"):
        hf_lop.export(tmp_path / "model", "per_layer_config", tmp_path / "none")
    index.unlink()
    with pytest.raises(InvalidInputError, match="has neither"):
        hf_lop.export(tmp_path / "model", "per_layer_config", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# -- Command and Hub ---------------------------------------------------------------------------------------------------


def test_command(folder, tmp_path):
    command = ["export", str(folder), "--to", "uniform", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert report["widths"] == [96] * 4
    assert report["parameters"]["exported"] == report["parameters"]["dense"] > report["parameters"]["pruned"]
    assert "does not save" in report["saves"]
    command[-1] = str(tmp_path / "text")
    text = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert f"{report['parameters']['pruned']:,} pruned" in text
    assert "does not save" in text


def test_into_the_current_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hf_lop.export(folder, "per_layer_config", ".")
    assert "per_layer_config" in config_of(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_cards(folder, tmp_path):
    for to in FORMATS:
        if to == "gguf":
            pytest.importorskip("gguf", reason="the extra export is not installed")
        hf_lop.export(folder, to, tmp_path / to)
        card = (tmp_path / to / "README.md").read_text()
        assert FORMATS[to].saves in card
        assert FORMATS[to].tested in card
        assert str(tmp_path) not in card
        for word in ("NAME", "AUTO ", "AUTO.", "FILE", "REVISION", "PLAIN"):
            assert word not in card, (to, word)


@pytest.mark.parametrize(
    ("to", "line"),
    [
        ("uniform", 'AutoModel.from_pretrained("me/RENAMED AUTO", revision="a b")'),
        ("per_layer_config", 'AutoModel.from_pretrained("me/RENAMED AUTO", revision="a b")'),
        ("gguf", "llama-server --model 'PLAIN x.gguf'"),
    ],
)
def test_code_of_odd_names(to, line):
    counts = dict.fromkeys(("dense", "pruned", "exported"), 1)
    facts = {"source": None, "made": {}, "auto_class": "AutoModel", "base_data": {}}
    card = export_card(
        to, name="me/RENAMED AUTO", file="PLAIN x.gguf", revision="a b", parameters=counts, neurons=counts, **facts
    )
    assert line in str(card)


HUB = """
from transformers import AutoModelForCausalLM
import hf_lop
model = AutoModelForCausalLM.from_pretrained({folder!r})
model.push_to_hub("me/pruned")
"""
PUSH = """
import hf_lop
written = hf_lop.export("me/pruned", "per_layer_config", "out", push_to="pruned")
print(written.pushed_to)
"""


@pytest.mark.slow
def test_a_pushed_config_sends_no_weights_again(folder, tmp_path):
    with serve(tmp_path / "hf_home") as hub:
        run_python(HUB.format(folder=str(folder)), hub)
        main = hub.files("me/pruned")
        before = len(hub.log)
        assert "/me/pruned/commit/" in run_python(PUSH, hub, home=tmp_path / "home")
        puts = [entry for entry in hub.log[before:] if entry[0] == "PUT"]
        assert puts == []  # LFS bytes are put; none were
        assert hub.files("me/pruned") == main
        assert hub.history("me/pruned", "per-layer-config")[0] == "Export as per_layer_config"
        branch = hub.files("me/pruned", "per-layer-config")
        assert branch["model.safetensors"] == main["model.safetensors"]
        assert json.loads(branch["config.json"])["per_layer_config"]["2"] == {"intermediate_size": 17}
        card = branch["README.md"].decode()
        assert 'from_pretrained("me/pruned", revision="per-layer-config")' in card
        assert "base_model: me/pruned" in card
        (code,) = [block.split("```")[0] for block in card.split("```python\n")[1:]]
        check = "\nassert model.config.intermediate_size == [96, 40, 17, 64]\n"
        run_python(code + check, hub, home=tmp_path / "reader")
        remote = code.replace("import hf_lop", "#").replace('config")', 'config", trust_remote_code=True)')
        run_python(remote + check, hub, home=tmp_path / "remote", block=("hf_lop", "wrapt"))
