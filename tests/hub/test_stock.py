"""Where all layers keep the same, a pruned model is saved as a stock checkpoint: one integer, no code, and it is still known as pruned."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.hub.export.export import export
from hf_lop.hub.read.inspect import inspect_model
from hf_lop.hub.read.made import KEPT, inspect_made
from hf_lop.hub.write.stock import as_stock
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import is_cut, slice_units
from tests.conftest import KINDS
from tests.fake_pruner import fake_pruner
from tests.helpers import logits
from tests.hub_server import run_python
from tests.small_models import SMALL, build
from tests.tiny_models import tiny_inputs, tiny_model

UNIFORM = {"method": "uniform", "recover": None}
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained({folder!r}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
torch.save(model(torch.arange(3, 13)[None]).logits, {folder!r} + "/logits.pt")
"""


@pytest.fixture
def pruned(built, tmp_path):
    def prune(kind="gated", ratio=0.5, **options):
        model = fake_pruner(built[kind]).prune(copy.deepcopy(built[kind]), ratio, **{**UNIFORM, **options})
        model.save_pretrained(tmp_path / kind)
        return model, tmp_path / kind

    return prune


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_hf_lop_or_trust_loads_it(pruned, kind, tmp_path):
    model, folder = pruned(kind)
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config
    assert not list(folder.glob("*.py"))
    assert "unpruned_intermediate_size" not in config
    assert config["pruning_config"]["dense_widths"] == [48] * 4
    # What is in memory still lists its widths.
    assert list(model.config.intermediate_size) == [24] * 4
    run_python(LOAD.format(folder=str(folder)), home=tmp_path / "home", block=("hf_lop",))
    expected = model(torch.arange(3, 13)[None]).logits
    assert torch.equal(torch.load(folder / "logits.pt"), expected)


def test_the_card_says_so(pruned):
    _, folder = pruned()
    card = (folder / "README.md").read_text()
    assert "this is a stock checkpoint" in card
    assert "import hf_lop" not in card
    assert "trust_remote_code" not in card


def test_it_is_still_known_as_pruned(pruned, built, tmp_path):
    _, folder = pruned(ratio=0.25)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.intermediate_size == 36
    assert is_cut(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / KEPT).read_bytes() == (folder / KEPT).read_bytes()
    assert (tmp_path / "again" / "README.md").read_text().replace("again", "gated") == (
        folder / "README.md"
    ).read_text()
    facts = inspect_made(folder)
    assert (facts["kind"], facts["widths"], facts["can_be_pruned"]) == ("pruned", [36] * 4, True)
    assert inspect_model(folder).pruned["widths"] == [36] * 4
    pruner = fake_pruner(built["gated"])
    with pytest.raises(UnsupportedModelError, match="already pruned"):
        pruner.make_elastic(loaded)
    # It goes on to other widths, and then it lists them.
    pruner.prune(loaded, 0.5, recover=None).save_pretrained(tmp_path / "further")
    assert isinstance(json.loads((tmp_path / "further" / "config.json").read_text())["intermediate_size"], list)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "further")), logits(loaded))


def test_streaming_and_heads(pruned, built, tmp_path):
    _, folder = pruned()
    built["gated"].save_pretrained(tmp_path / "dense")
    fake_pruner(built["gated"]).prune(tmp_path / "dense", 0.5, output_dir=tmp_path / "streamed", **UNIFORM)
    for name in ("config.json", "model.safetensors", KEPT):
        assert (tmp_path / "streamed" / name).read_bytes() == (folder / name).read_bytes()
    head = AutoModelForSequenceClassification.from_pretrained(folder)
    assert head.model.layers[0].mlp.gate_proj.out_features == 24


def test_code_of_an_earlier_save_goes(pruned, built, tmp_path):
    _, folder = pruned(ratio=0.31, method="lop")
    assert (folder / "modeling_lop.py").exists()
    _, again = pruned()
    assert again == folder
    assert not list(folder.glob("*.py"))


def test_a_multimodal_model(tmp_path):
    model = tiny_model("qwen2_5_vl")
    size = [unit.count for unit in find_units(model)]
    fake_pruner(model).prune(model, 0.5, **UNIFORM)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["intermediate_size"] == size[0] // 2
    loaded = type(model).from_pretrained(tmp_path)
    inputs = tiny_inputs("qwen2_5_vl")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_shapes_that_the_stock_class_would_not_build_stay_a_list(built):
    # A bias that pruning added, or another kind of unit, is nothing that a stock class has.
    model = copy.deepcopy(built["gated"])
    slice_units(model, [torch.arange(24)] * 4)
    model.config.pruning_config = {}
    with as_stock(model) as stock:
        assert stock
        assert model.config.intermediate_size == 24
    assert model.config.intermediate_size == [24] * 4
    model.config.pruned_ffn_output_bias = True
    with as_stock(model) as stock:
        assert not stock
    assert model.config.intermediate_size == [24] * 4


def test_exports_of_it_are_not_needed(pruned, tmp_path):
    _, folder = pruned()
    for to in ("uniform", "per_layer_config"):
        with pytest.raises(UnsupportedModelError, match="use it without an export"):
            export(folder, to, tmp_path / to)


def test_gemma_too():
    config = Gemma2Config(intermediate_size=48, num_key_value_heads=2, head_dim=8, **SMALL)
    model = AutoModelForCausalLM.from_config(config)
    fake_pruner(model).prune(model, 0.5, **UNIFORM)
    with as_stock(model) as stock:
        assert stock


def test_more_than_is_gone_is_asked_for(pruned, built):
    _, folder = pruned()
    with pytest.raises(InvalidInputError, match="has lost 50"):
        fake_pruner(build("gated")).prune(folder, 0.3)


def test_layers_that_were_changed_since_are_listed(pruned, tmp_path):
    _, folder = pruned()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name in ("gate_proj", "up_proj", "down_proj"):  # by hand, which no config notices
        projection = getattr(loaded.model.layers[1].mlp, name)
        short = projection.weight[:, :10] if name == "down_proj" else projection.weight[:10]
        projection.weight = torch.nn.Parameter(short.detach().clone())
        projection.out_features, projection.in_features = short.shape
    loaded.save_pretrained(tmp_path / "changed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "changed")
    assert again.config.intermediate_size == [24, 10, 24, 24]
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("value", [5, "x", [], ["48"], {"a": 1}, None])
def test_odd_facts_fail_no_save(built, tmp_path, value):
    model = fake_pruner(built["gated"]).prune(copy.deepcopy(built["gated"]), 0.5, **UNIFORM)
    model.config.pruning_config["dense_widths"] = value
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_pruning_config_of_another_tool_is_left_alone(built, tmp_path):
    model = copy.deepcopy(built["gated"])
    model.config.pruning_config = {"sparsity": 0.5}
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", "generation_config.json", "model.safetensors"}
    assert inspect_made(tmp_path) is None
