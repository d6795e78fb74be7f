import copy

import numpy as np
import pytest
import torch

from hf_lop.allocation import global_threshold
from hf_lop.errors import InvalidInputError
from hf_lop.ffn.discovery import find_ffns
from hf_lop.ffn.importance import neuron_importance, neuron_order
from hf_lop.ffn.slicing import mask_neurons
from hf_lop.methods import METHODS
from tests.conftest import text_batches


def logits(model, batch):
    with torch.inference_mode():
        return model(**batch).logits


@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_the_budget_and_says_what_it_is(pruner, llama, method):
    pruned = pruner.prune(llama, 0.5, method=method, recover=None)
    widths = pruned.config.intermediate_size
    assert sum(widths) == 96
    facts = pruned.config.pruning_config
    assert (facts["method"], facts["recovery"]) == (method, None)
    assert facts["criterion"] == (METHODS[method].criterion or "l2")
    if method in ("uniform", "magnitude", "wanda"):
        assert set(widths) == {24}


@pytest.mark.parametrize(("method", "criterion"), [("magnitude", "magnitude"), ("wanda", "wanda"), ("flap", "wifv")])
def test_baselines_equal_the_masked_model_by_the_book(pruner, built, llama, batches, method, criterion):
    model = built["gated"]
    ffns = find_ffns(model)
    scores = neuron_importance(model, ffns, criterion, pruner.statistics())
    ratios = global_threshold([s.numpy() for s in scores], 0.5) if method == "flap" else np.full(4, 0.5)
    kept = [o[: round(48 * (1 - r))] for o, r in zip(neuron_order(scores), ratios, strict=True)]
    with mask_neurons(model, ffns, kept):
        expected = logits(model, batches[0])
    pruned = pruner.prune(llama, 0.5, method=method, recover=None)
    torch.testing.assert_close(logits(pruned, batches[0]), expected, rtol=1e-5, atol=1e-5)


def test_table_is_what_the_predictor_learned_from(pruner, llama):
    row = next(row for row in pruner.config.search_table if row["ratio"] == 0.5)
    widths = pruner.prune(llama, 0.5, method="table").config.intermediate_size
    np.testing.assert_allclose(widths, 48 * (1 - np.array(row["ratios"])), atol=1)


def test_least_squares_brings_the_outputs_back(pruner, built):
    held_out = text_batches(2, seed=9)
    distance = {}
    for name, options in (("none", {"recover": None}), ("lstsq", {"data": text_batches(40, seed=5)})):
        pruned = pruner.prune(copy.deepcopy(built["gated"]), 0.3, method="uniform", **options)
        assert pruned.config.pruning_config["recovery"] == (None if name == "none" else "lstsq")
        differences = [logits(pruned, batch) - logits(built["gated"], batch) for batch in held_out]
        distance[name] = float(torch.cat(differences).square().mean())
    assert distance["lstsq"] < 0.9 * distance["none"]


def test_fold_needs_no_data_and_keeps_the_architecture(pruner, llama, built):
    pruned = pruner.prune(llama, 0.5, recover="fold")
    plain = pruner.prune(copy.deepcopy(built["gated"]), 0.5, recover=None)
    assert pruned.config.intermediate_size == plain.config.intermediate_size
    assert set(pruned.state_dict()) == set(plain.state_dict())
    down = pruned.model.layers[3].mlp.down_proj.weight
    assert not torch.equal(down, plain.model.layers[3].mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "taylor"}, "choose one of lop"),
        ({"recover": "lora"}, 'choose "auto"'),
        ({"recover": None, "data": []}, "reads no data"),
        ({"recover": "lstsq"}, "needs data"),
        ({"data": []}, "batch"),
        ({"recover": "fold", "data": []}, "reads no data"),
    ],
)
def test_mistakes_change_nothing(pruner, llama, built, options, words):
    with pytest.raises(InvalidInputError, match=words):
        pruner.prune(llama, 0.5, **options)
    assert llama.config.intermediate_size == 48
    assert all(torch.equal(v, built["gated"].state_dict()[k]) for k, v in llama.state_dict().items())
