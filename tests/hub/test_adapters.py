"""A LoRA of the dense model, cut to fit a pruned one: together they compute what the masked dense model computes with it."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_lop.cli import app
from hf_lop.errors import CheckpointMismatchError, InvalidInputError, UnsupportedModelError
from hf_lop.hub.read.kept import overlap, read_kept
from hf_lop.hub.read.made import KEPT
from hf_lop.hub.write.adapter import cut_adapter
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import masking
from tests.conftest import slow
from tests.fake_pruner import fake_pruner
from tests.helpers import logits

TARGETS = {
    "gated": ["q_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    "conv1d": ["c_attn", "c_fc", "mlp.c_proj"],
    "gated_bias": ["up_proj", "down_proj"],
    "fused": ["qkv_proj", "gate_up_proj", "down_proj"],
    "plain_bias": ["fc1", "fc2"],
}


def adapter_of(model, folder, **options):
    adapter = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, lora_alpha=6, **options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + noise.abs() if "magnitude" in name else noise)
    adapter.save_pretrained(folder)
    return adapter


@pytest.fixture
def pruned(built, tmp_path):
    """Prunes one of the small models, and returns the folder."""

    def prune(kind="gated", ratio=0.4, name="pruned", **options):
        fake_pruner(built[kind]).prune(copy.deepcopy(built[kind]), ratio, recover=None, **options).save_pretrained(
            tmp_path / name
        )
        return tmp_path / name

    return prune


@pytest.mark.parametrize("kind", ["gated", "conv1d", *slow("gated_bias", "fused", "plain_bias")])
@pytest.mark.parametrize("options", [{}, {"bias": "lora_only", "rank_pattern": {"down_proj": 5}}])
def test_it_computes_what_the_masked_dense_model_does(built, pruned, kind, options, tmp_path):
    folder = pruned(kind)
    whole = adapter_of(built[kind], tmp_path / "lora", target_modules=TARGETS[kind], **options)
    done = cut_adapter(tmp_path / "lora", folder, tmp_path / "cut")
    assert 0 < done["cut"] < done["tensors"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "cut").eval()
    merged = whole.merge_and_unload()
    with masking(merged, find_units(merged), read_kept(folder)["neurons"]):
        torch.testing.assert_close(logits(loaded), logits(merged), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_dora_on_projections_that_make_the_pieces(built, pruned, tmp_path):
    folder = pruned()
    whole = adapter_of(built["gated"], tmp_path / "lora", target_modules=["gate_proj", "up_proj"], use_dora=True)
    cut_adapter(tmp_path / "lora", folder, tmp_path / "cut")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "cut").eval()
    merged = whole.merge_and_unload()
    with masking(merged, find_units(merged), read_kept(folder)["neurons"]):
        torch.testing.assert_close(logits(loaded), logits(merged), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"target_modules": ["down_proj"], "use_dora": True},
            UnsupportedModelError,
            "lora_magnitude_vector, which cannot",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]},
            UnsupportedModelError,
            "the whole projection",
        ),
    ],
)
def test_what_cannot_be_cut(built, pruned, tmp_path, options, error, words):
    adapter_of(built["gated"], tmp_path / "lora", **options)
    with pytest.raises(error, match=words):
        cut_adapter(tmp_path / "lora", pruned(), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_other_input(built, pruned, tmp_path):
    folder = pruned()
    adapter_of(built["gated"], tmp_path / "lora", target_modules=TARGETS["gated"])
    cut_adapter(tmp_path / "lora", folder, tmp_path / "cut")
    built["gated"].save_pretrained(tmp_path / "dense")
    adapter_of(built["conv1d"], tmp_path / "other", target_modules=TARGETS["conv1d"])
    for adapter, model, error, words in (
        (tmp_path / "cut", folder, CheckpointMismatchError, "or was cut already"),
        (tmp_path / "lora", tmp_path / "dense", InvalidInputError, "is not pruned, so the adapter fits it as it is"),
        (tmp_path / "other", folder, CheckpointMismatchError, "the pruned model has no module transformer.h.0"),
        (tmp_path / "dense", folder, InvalidInputError, "has no adapter_config.json"),
        (tmp_path / "nowhere", folder, InvalidInputError, "cannot be read as an adapter"),
    ):
        with pytest.raises(error, match=words):
            cut_adapter(adapter, model, tmp_path / "never")
    with pytest.raises(InvalidInputError, match="not empty"):
        cut_adapter(tmp_path / "lora", folder, tmp_path / "cut")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(UnsupportedModelError, match="of the type 'IA3'; only plain LoRAs"):
        cut_adapter(tmp_path / "lora", folder, tmp_path / "never")
    (folder / KEPT).unlink()
    with pytest.raises(UnsupportedModelError, match="which pieces it kept is not known"):
        cut_adapter(tmp_path / "cut", folder, tmp_path / "never")
    assert not (tmp_path / "never").exists()


class TestOverlap:
    def test_two_cuts(self, pruned):
        found = overlap(pruned(ratio=0.3, name="a"), pruned(ratio=0.5, name="b"))
        assert found.share == 1  # the second keeps a part of the first
        assert found.by_chance < 0.8
        assert found.shared == found.right
        other = overlap(pruned(ratio=0.3, name="a"), pruned(ratio=0.3, name="c", method="magnitude"))
        assert 0.5 < other.share < 1

    def test_of_different_models(self, pruned, built, tmp_path):
        folder = pruned(name="a")
        with pytest.raises(CheckpointMismatchError, match="were cut from different models"):
            overlap(folder, _of_other_base(folder, tmp_path / "b"))
        built["gated"].save_pretrained(tmp_path / "dense")
        with pytest.raises(InvalidInputError, match="is not pruned, or does not say"):
            overlap(folder, tmp_path / "dense")


def _of_other_base(folder, out):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.pruning_config["dense_widths"] = [49] * 4
    model.save_pretrained(out)
    return out


def test_command_line(built, pruned, tmp_path):
    adapter_of(built["gated"], tmp_path / "lora", target_modules=TARGETS["gated"])
    a, b = pruned(name="a"), pruned(name="b", ratio=0.5)

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).stdout

    made = run("cut-adapter", tmp_path / "lora", "--model", a, "--out", tmp_path / "cut", "--json")
    assert json.loads(made) == {"out": str(tmp_path / "cut"), "cut": 12, "tensors": 35}
    assert json.loads(run("inspect", a, "--against", b, "--json"))["share"] == 1
    assert "share 100.0% of the pieces" in run("inspect", a, "--against", b)
    assert "can be pruned further: yes" in run("inspect", a)
