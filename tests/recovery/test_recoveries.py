"""Which recovery `prune` chooses, what it records, and FLAP's bias through saving and loading."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.evaluation.comparison.bias import add_to_output_biases, removed_means
from hf_lop.learning.statistics import collect_statistics
from hf_lop.planning.budget import Budget
from hf_lop.pruner.prune import Cut
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.recovery.choose import RECOVERIES, choose_recovery
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import output_weight, prunable_units, slice_units
from tests.conftest import slow
from tests.recovery.test_recovery import activations, some_kept
from tests.small_models import CONFIGS, text_batches
from tests.tiny_models import tiny_inputs, tiny_model

REMOTE = """
import sys
sys.modules["hf_lop"] = None
import torch, transformers
folder, auto, out = sys.argv[1:]
model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
torch.save(model(**torch.load(out)).logits, out)
"""


@pytest.mark.parametrize(
    ("recover", "data", "sketch", "expected"),
    [
        ("auto", False, False, None),
        ("auto", False, True, "sketch"),
        ("auto", True, False, "sequential"),
        ("auto", True, True, "sequential"),
        (None, False, True, None),
        (None, True, True, "reads no data"),
        ("lstsq", True, False, "lstsq"),
        ("lstsq", False, True, "needs data"),
        ("sequential", True, True, "sequential"),
        ("sequential", False, True, 'recover="sequential" needs data'),
        ("sketch", False, True, "sketch"),
        ("sketch", False, False, "no sketch"),
        ("sketch", True, True, "reads no data"),
        ("fold", False, True, "fold"),
        ("fold", True, True, "reads no data"),
        ("bias", False, False, "moved to the comparison"),
        ("bias", True, False, "moved to the comparison"),
        ("none", False, False, "choose"),
        (True, False, True, "choose"),
    ],
)
def test_decisions(recover, data, sketch, expected):
    if expected in (None, *RECOVERIES):
        assert choose_recovery(recover, data=data, sketch=sketch) == expected
    else:
        with pytest.raises(InvalidInputError, match=expected):
            choose_recovery(recover, data=data, sketch=sketch)


@pytest.mark.slow
def test_the_default_uses_the_sketch_and_says_so(built, tmp_path):
    """And the outputs on held-out data come closer than without."""
    held_out, distance = text_batches(3, seed=9), {}
    dense = built["gated"]
    pruner = LOPPruner.fit(dense, text_batches(100), text_batches(1, seed=1), predictor="mlp")
    for name, options in (("sketch", {}), ("none", {"recover": None})):
        pruned = pruner.prune(copy.deepcopy(dense), 0.3, **options)
        assert pruned.config.pruning_config["recovery"] == (name if name == "sketch" else None)
        with torch.inference_mode():
            distance[name] = sum(float((pruned(**b).logits - dense(**b).logits).square().mean()) for b in held_out)
        pruned.save_pretrained(tmp_path / name)
    assert distance["sketch"] < distance["none"]
    assert "(`sketch`)" in (tmp_path / "sketch" / "README.md").read_text()
    assert "Nothing takes over" in (tmp_path / "none" / "README.md").read_text()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_bias_keeps_the_mean_output(built, kind):
    model, batches = copy.deepcopy(built[kind]), text_batches(5)
    units = prunable_units(model)
    kept = some_kept(units)
    statistics = collect_statistics(model, batches, units)
    before = [(p := unit.modules(model)[1].bias) is not None and p.detach().clone() for unit in units]
    x, outputs = activations(model, batches)
    biases = removed_means(model, units, kept, statistics)
    cut = slice_units(model, kept)
    had = units[0].modules(model)[1].bias is not None
    add_to_output_biases(model, cut, biases)
    for layer, unit in enumerate(cut):
        bias = unit.modules(model)[1].bias
        assert (bias.dtype, bias.requires_grad) == (torch.float32, True)
        x_mean = x[layer].mean(0)[kept[layer].sort().values]
        found = output_weight(model, unit).double() @ x_mean + bias
        torch.testing.assert_close(found, outputs[layer].mean(0), rtol=1e-4, atol=1e-4)
        if had:
            torch.testing.assert_close(bias, before[layer] + biases[layer])
    text = model.config.get_text_config()
    assert getattr(text, "pruned_ffn_output_bias", False) is not had


def prune_with_bias(pruner, model, ratio):
    """What `prune(method="flap", recover="bias")` of versions before made of a model."""
    dense = copy.deepcopy(model)
    pruned = pruner.prune(model, ratio, method="flap", recover=None)
    units = prunable_units(dense)
    flap = Cut(Budget.of(ratio), "flap", None, strict=False)
    kept = flap.plan(pruner.config, pruner.learned(), pruner.predict, dense, units).kept
    biases = removed_means(dense, units, kept, pruner.statistics())
    add_to_output_biases(pruned, find_units(pruned), biases)
    pruned.config.pruning_config["recovery"] = "bias"
    return pruned


def biased(name, tmp_path, builder=tiny_model, dtype=torch.float32):
    """A model pruned with FLAP's bias, saved; with its logits."""
    model = builder(name).to(dtype)
    batch = tiny_inputs(name) if builder is tiny_model else text_batches(1)[0]
    made = LOPPruner.fit(model, [batch, batch], [batch], sketch_rows=0, predictor="mlp")
    pruned = prune_with_bias(made, model, 0.4)
    assert pruned.config.pruning_config["recovery"] == "bias"
    pruned.save_pretrained(tmp_path)
    with torch.inference_mode():
        return pruned, batch, pruned(**batch).logits


@pytest.mark.parametrize("name", ["llama", *slow("qwen2_5_vl", "llava", "gemma3")])
def test_the_bias_survives_saving_and_loading(name, tmp_path):
    pruned, batch, logits = biased(name, tmp_path)
    auto = AutoModelForCausalLM if name == "llama" else AutoModelForImageTextToText
    for load in (auto.from_pretrained, type(pruned).from_pretrained):
        model, info = load(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.inference_mode():
            assert torch.equal(model(**batch).logits, logits)
    model.save_pretrained(tmp_path / "again")  # and once more, from a loaded model
    again = auto.from_pretrained(tmp_path / "again")
    with torch.inference_mode():
        assert torch.equal(again(**batch).logits, logits)
    card = (tmp_path / "README.md").read_text()
    assert "got a bias" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_the_bias_loads_without_hf_lop(name, tmp_path, monkeypatch):
    _, batch, logits = biased(name, tmp_path / "model")
    torch.save(batch, tmp_path / "batch.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    auto = "AutoModelForCausalLM" if name == "llama" else "AutoModelForImageTextToText"
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "model"), auto, str(tmp_path / "batch.pt")]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    # Another process may have its tensors at other addresses, and on some processors other last digits by that.
    torch.testing.assert_close(torch.load(tmp_path / "batch.pt"), logits.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gated_bias", *slow("plain_bias", "conv1d")])
def test_where_there_are_biases_the_architecture_stays(built, kind, tmp_path):
    keys = set(built[kind].state_dict())
    pruned, batch, logits = biased(kind, tmp_path, builder=lambda name: copy.deepcopy(built[name]))
    assert set(pruned.state_dict()) == keys
    assert not hasattr(pruned.config, "pruned_ffn_output_bias")
    with torch.inference_mode():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(**batch).logits, logits)


def test_a_projection_that_takes_no_bias_is_refused_unchanged(pruner, llama):
    module = llama.model.layers[2].mlp.down_proj
    del module._parameters["bias"]
    module.bias = None  # now an ordinary attribute
    units = prunable_units(llama)
    with pytest.raises(UnsupportedModelError, match="cannot be given a bias"):
        removed_means(llama, units, some_kept(units), pruner.statistics())
    assert llama.config.intermediate_size == 48
    assert llama.model.layers[0].mlp.down_proj.bias is None
