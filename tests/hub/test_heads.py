"""Every class that `auto_map` names loads, by both routes, as the stock class loads the dense model; and nothing else is touched."""

import copy
import json
import threading

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests import warm
from tests.conftest import KINDS, slow
from tests.fake_pruner import fake_pruner
from tests.helpers import logits
from tests.shrink import tiny_config
from tests.tiny_models import tiny_model

REPORT = """
import json, sys, transformers
from pathlib import Path
found = {}
for auto in json.loads(Path(sys.argv[1], "config.json").read_text())["auto_map"]:
    if auto != "AutoConfig":
        load = getattr(transformers, auto).from_pretrained
        model, info = load(sys.argv[1], output_loading_info=True, trust_remote_code=True)
        found[auto] = [type(model).__name__, *(sorted(map(str, info[kind])) for kind in sorted(info))]
assert "hf_lop" not in sys.modules
print(json.dumps(found))
"""


def pruned(built, kind, folder):
    model = copy.deepcopy(built[kind])
    fake_pruner(model).prune(model, 0.4, recover=None).save_pretrained(folder)
    return model


@pytest.mark.parametrize("remote", [False, *slow(True)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_of_the_auto_map_loads(built, kind, remote, tmp_path):
    built[kind].save_pretrained(tmp_path / "dense")
    pruned(built, kind, tmp_path / "pruned")
    names = [
        name for name in json.loads((tmp_path / "pruned/config.json").read_text())["auto_map"] if name != "AutoConfig"
    ]
    assert len(names) >= 4

    def report(folder):
        found = {}
        for name in names:
            model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
            found[name] = [type(model).__name__, *(sorted(map(str, info[part])) for part in sorted(info))]
        return found

    if not remote:
        assert report(tmp_path / "pruned") == report(tmp_path / "dense")
        return
    done = warm.run(REPORT, tmp_path / "pruned")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == report(tmp_path / "dense")


def test_a_head_is_saved_and_loaded_again(built, tmp_path):
    pruned(built, "gated", tmp_path / "pruned")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    head = load(tmp_path / "pruned", num_labels=3).eval()
    head.save_pretrained(tmp_path / "head")
    again, info = load(tmp_path / "head", output_loading_info=True)
    assert not any(info.values())
    assert again.config.intermediate_size == head.config.intermediate_size
    assert torch.equal(logits(again.eval()), logits(head))


@pytest.mark.parametrize(
    "case",
    [
        ("t5", "T5ForConditionalGeneration", "AutoModelForTextEncoding"),
        *slow(
            ("t5", "T5ForConditionalGeneration", "AutoModelForTokenClassification"),
            ("whisper", "WhisperForConditionalGeneration", "AutoModelForAudioClassification"),
            ("blip-2", "Blip2ForConditionalGeneration", "AutoModelForZeroShotImageClassification"),
        ),
    ],
)
def test_a_head_without_the_decoder_stays_dense(case, tmp_path):
    """Of another part of the model, whose layers could be taken for those that the config counts."""
    model_type, cls, auto = case
    model = getattr(transformers, cls)(tiny_config(model_type))
    model.save_pretrained(tmp_path / "dense")
    fake_pruner(model).prune(model, 0.4, recover=None).save_pretrained(tmp_path / "pruned")
    load = getattr(transformers, auto).from_pretrained
    dense, wanted = load(tmp_path / "dense", output_loading_info=True)
    head, found = load(tmp_path / "pruned", output_loading_info=True)
    assert found == wanted
    state = head.state_dict()
    for name, tensor in dense.state_dict().items():
        assert name in wanted["missing_keys"] or torch.equal(state[name], tensor)
    head.save_pretrained(tmp_path / "head")
    again, info = load(tmp_path / "head", output_loading_info=True)
    assert not any(info.values())
    assert "pruning_config" not in again.config.to_dict()


def test_a_model_class_that_a_mapping_names_in_vain(tmp_path):
    """transformers names VoxtralRealtimeTextModel, and has it not."""
    model = transformers.VoxtralRealtimeForConditionalGeneration(tiny_config("voxtral_realtime"))
    fake_pruner(model).prune(model, 0.4, recover=None).save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert [unit.count for unit in widths_of(again)] == [unit.count for unit in widths_of(model)]


CONFIGS = """
import copy, json, sys
from pathlib import Path
import hf_lop
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2_5_VLConfig
text = json.loads(Path(sys.argv[1], "config.json").read_text())
ask = {key: value for key, value in text.items() if key != "model_type"}
make = {
    "class": lambda: LlamaConfig(**text),
    "for_model": lambda: AutoConfig.for_model("llama", **ask),
    "nested": lambda: Qwen2_5_VLConfig(text_config={"intermediate_size": [9, 8], "num_hidden_layers": 2}).get_text_config(),
}[sys.argv[2]]
config = copy.deepcopy(make())
again = type(config)(**config.to_dict())
assert again.to_dict() == config.to_dict()
if sys.argv[2] != "nested":
    model = AutoModelForCausalLM.from_config(again)
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == text["intermediate_size"]
else:
    assert config.intermediate_size == [9, 8]
"""


@pytest.mark.parametrize("way", ["class", *slow("for_model", "nested")])
def test_a_config_is_made_of_lists_in_a_new_process(built, way, tmp_path):
    pruned(built, "gated", tmp_path)
    done = warm.run(CONFIGS, tmp_path, way)
    assert done.returncode == 0, done.stderr[-3000:]


def test_classes_of_other_models_are_not_touched(built, tmp_path):
    pruned(built, "gated", tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(PreTrainedModel.__init__, "_lop")
    assert not hasattr(transformers.LongT5ForConditionalGeneration.__init__, "_lop")


def test_one_config_serves_many_threads(built, tmp_path):
    """Each builds from the same object, which is written by none of them."""
    model = pruned(built, "gated", tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    before, found, errors = config.to_dict(), [], []

    def work():
        try:
            for _ in range(6):
                found.append([unit.count for unit in widths_of(LlamaForCausalLM(config))])
                assert config.to_dict() == before
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found == [model.config.intermediate_size] * 48
    assert config.to_dict() == before


def widths_of(model):
    from hf_lop.units.kinds import find_units

    return find_units(model)


class TestFewerLayers:
    def test_at_load(self, built, tmp_path):
        model = pruned(built, "gated", tmp_path / "pruned")
        short = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", num_hidden_layers=2)
        assert short.config.intermediate_size == model.config.intermediate_size[:2]
        model.model.layers = model.model.layers[:2]
        assert torch.equal(logits(short), logits(model))
        short.save_pretrained(tmp_path / "short")
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "short", output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(logits(again), logits(short))

    def test_in_memory(self, built, tmp_path):
        model = pruned(built, "gated", tmp_path / "pruned")
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:3], 3
        model.save_pretrained(tmp_path / "short")
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "short", output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(logits(again), logits(model))
        assert len(again.config.intermediate_size) == 3


@pytest.mark.parametrize("remote", [False, *slow(True)])
def test_the_text_part_of_a_model_is_saved_whole(tmp_path, remote):
    model = tiny_model("qwen2_5_vl")
    fake_pruner(model).prune(model, 0.4, recover=None)
    part = model.model.language_model
    with pytest.warns(UserWarning, match="says only how to load it"):
        part.save_pretrained(tmp_path)
    if remote:
        done = warm.run(REPORT, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout.splitlines()[-1])["AutoModel"] == ["Qwen2_5_VLTextModel", [], [], [], []]
        return
    again, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(3, 12)[None]
    assert torch.equal(again(ids).last_hidden_state, part(ids).last_hidden_state)
