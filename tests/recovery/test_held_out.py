"""`recover="auto"` never ends worse than no recovery, on data that it was not fitted to."""

import copy
import warnings

import pytest
import torch

from hf_lop.recovery.held_out import HeldOut, split, too_few
from tests.fake_pruner import fake_pruner
from tests.helpers import logits
from tests.small_models import text_batches


def pruned(model, recover, data):
    model = copy.deepcopy(model)
    return fake_pruner(model).prune(model, 0.5, recover=recover, data=data)


def divergence(dense, model, batches):
    return HeldOut(dense, batches).divergence(model)


def one_sided(count):
    return [
        {key: torch.full_like(value, 7) if key == "input_ids" else value for key, value in batch.items()}
        for batch in text_batches(count)
    ]


def test_good_data_is_used(built):
    data = text_batches(40)
    auto = pruned(built["gated"], "auto", data)
    assert auto.config.pruning_config["recovery"] == "sequential"
    assert torch.equal(logits(auto), logits(pruned(built["gated"], "sequential", data[:32])))
    report = text_batches(20, seed=9)
    assert divergence(built["gated"], auto, report) < divergence(
        built["gated"], pruned(built["gated"], None, None), report
    )


def test_one_sided_data_is_not(built):
    data = [*one_sided(16), *text_batches(4, seed=3)]
    with pytest.warns(UserWarning, match="it was not recovered"):
        auto = pruned(built["gated"], "auto", data)
    assert auto.config.pruning_config["recovery"] is None
    assert torch.equal(logits(auto), logits(pruned(built["gated"], None, None)))


@pytest.mark.parametrize("recover", ["auto", "sequential", "lstsq"])
def test_too_few_tokens_are_counted(built, recover):
    data = [{key: value[:1, :3] for key, value in batch.items()} for batch in text_batches(1)]
    with pytest.warns(UserWarning, match="data has 3 tokens for layers that keep up to"):
        found = pruned(built["gated"], recover, data)
    assert found.config.pruning_config["recovery"] == ("sketch" if recover == "auto" else recover)


def test_padding_does_not_count():
    padded = text_batches(1, padded=True)
    assert "data has 16 tokens" in too_few(padded, 17)
    assert too_few(padded, 16) is None


def test_nothing_is_held_out_of_one_batch(built):
    batches = text_batches(12)
    assert split(built["gated"], batches[:1]) == (batches[:1], [])
    fitting, held = split(built["gated"], batches)
    assert (len(fitting), len(held)) == (10, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        assert pruned(built["gated"], "auto", [whole]).config.pruning_config["recovery"] == "sequential"


def test_a_head_without_a_vocabulary_is_recovered_unchecked(built, tmp_path):
    from transformers import AutoModelForSequenceClassification

    built["gated"].save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert split(model, text_batches(4))[1] == []
