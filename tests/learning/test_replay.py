"""Replay at the decoder's door: equal predictions on families with images, one run of the vision tower per batch."""

import logging

import pytest
import torch

from hf_lop.errors import InvalidInputError
from hf_lop.learning.decoder.layers import LayerRuns, layer_of
from hf_lop.learning.decoder.replay import predictions, record_batches
from hf_lop.units.slice import prunable_units
from hf_lop.units.views import ElasticModel, shadow
from tests.conftest import slow
from tests.families import MULTIMODAL, build, text_inputs
from tests.helpers import cut, orders
from tests.small_models import text_batches
from tests.tiny_models import CONFIGS, TEXT_ONLY, tiny_inputs, tiny_model

WIDTHS = ([96, 40, 17, 64], [1, 1, 1, 1], [95, 33, 96, 2])


def labelled(batch):
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -4:-1] = batch["input_ids"][:, -4:-1]
    return {**batch, "labels": labels}


@torch.no_grad()
def reference(model, batch):
    """Predictions of the whole model, position by position in plain Python."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    rows = []
    for sample in range(logits.shape[0]):
        for position in range(logits.shape[1]):
            if "labels" in batch:
                counts = position + 1 < logits.shape[1] and batch["labels"][sample, position + 1] != -100
            else:
                counts = batch["attention_mask"][sample, position] == 1
            if counts:
                rows.append(logits[sample, position])
    return torch.stack(rows)


def vision_tower(model):
    names = ("visual", "vision_tower", "vision_model", "vision_encoder")
    return next(module for name, module in model.named_modules() if name.split(".")[-1] in names)


@pytest.mark.parametrize("answers", [True, *slow(False)], ids=["labels", "all"])
@pytest.mark.parametrize("name", CONFIGS)
def test_candidates_predict_as_really_pruned_models(name, answers):
    model, batches = tiny_model(name), [tiny_inputs(name, seed) for seed in (1, 2)]
    batches = [labelled(batch) for batch in batches] if answers else batches
    calls = []
    if name not in TEXT_ONLY:  # a shadow's modules are copies, but hooks are called through them too
        vision_tower(model).register_forward_hook(lambda *_: calls.append(1))
    order = orders(model)
    elastic = ElasticModel(model, order)
    recorded = record_batches(elastic.model, batches)
    assert {entry.way for entry in recorded} == {"projection"}
    for widths in WIDTHS:
        elastic.set_widths(widths)
        found = [entry.logits(elastic.model) for entry in recorded]
        assert len(calls) == (0 if name in TEXT_ONLY else len(batches))
        pruned = cut(model, order, widths)
        for entry, logits, batch in zip(recorded, found, batches, strict=True):
            seen = len(calls)
            expected = reference(pruned, batch)
            del calls[seen:]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(entry.logits(pruned), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", MULTIMODAL)
def test_every_family_with_images(family):
    try:
        model = build(family)
        batch = text_inputs(model)
        order = orders(model)
        with torch.no_grad():
            model(**batch)
    except Exception as error:  # tests/test_families.py says which types can be built and pruned
        pytest.skip(str(error)[:100])
    elastic = ElasticModel(model, order)
    entry = record_batches(elastic.model, [batch, batch])[1]
    widths = [max(1, unit.count // 2 - layer) for layer, unit in enumerate(elastic.units)]
    elastic.set_widths(widths)
    with torch.no_grad():
        expected = cut(model, order, widths)(**batch, use_cache=False).logits[entry.sample, entry.position]
    torch.testing.assert_close(entry.logits(elastic.model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "chameleon", "bert"])
def test_what_stands_behind_the_decoder_is_replayed_too(family):
    """Soft capping, scaling, forbidden tokens, a transform before the vocabulary."""
    model = build(family)
    if family == "gemma2":
        model.config.final_logit_softcapping = 2.0
    batch = text_inputs(model)
    elastic = ElasticModel(model, orders(model))
    entry = record_batches(elastic.model, [batch])[0]
    assert entry.way == "head"
    widths = [unit.count // 2 for unit in elastic.units]
    elastic.set_widths(widths)
    expected = reference(cut(model, orders(model), widths), batch)
    torch.testing.assert_close(entry.logits(elastic.model), expected, rtol=1e-5, atol=1e-5)
    assert not elastic.model._forward_hooks
    assert not elastic.model.get_decoder()._forward_hooks


def test_a_decoder_that_cannot_be_replayed_runs_in_the_whole_model(caplog):
    model = build("vision-encoder-decoder")
    batch = text_inputs(model)
    with caplog.at_level(logging.WARNING, logger="hf_lop"):
        entry = record_batches(model, [batch])[0]
    assert entry.way == "model"
    assert "cannot be replayed alone" in caplog.text
    torch.testing.assert_close(entry.logits(model), reference(model, batch), rtol=1e-5, atol=1e-5)


def test_a_decoder_whose_output_is_not_all_the_head_sees_is_noticed(llama, caplog):
    """A model that adds its embeddings behind the decoder must not be replayed without them."""

    class Residual(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head, self.weight, self.ids = head, head.weight, None

        def forward(self, hidden):
            return self.head(hidden) + (self.ids.sum() if hidden.shape[1] == 10 else 0)

    llama.lm_head = Residual(llama.lm_head)
    llama.register_forward_pre_hook(
        lambda m, a, k: setattr(m.lm_head, "ids", k["input_ids"]) if "input_ids" in k else None, with_kwargs=True
    )
    llama.lm_head.ids = torch.zeros(1)
    entry = record_batches(llama, text_batches(1))[0]
    assert entry.way == "model"


def test_the_model_that_is_recorded_is_only_read(llama):
    llama.train()
    before = {name: (id(p), p._version) for name, p in llama.named_parameters()}
    record_batches(llama, text_batches(2))
    assert before == {name: (id(p), p._version) for name, p in llama.named_parameters()}
    assert all(module.training and not module._forward_pre_hooks for module in llama.modules())


def test_an_error_while_recording_removes_every_hook(llama):
    with pytest.raises(IndexError):
        record_batches(llama, [{"input_ids": torch.full((1, 4), 1000)}])
    assert all(not module._forward_pre_hooks for module in llama.modules())


def test_predictions_by_hand():
    batch = {
        "input_ids": torch.tensor([[0, 5, 6, 7], [4, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    }
    where, target = predictions(batch)
    assert where.tolist() == [[False, True, True, True], [True] * 4]
    assert target.tolist() == [[5, 6, 7, -100], [5, 6, 7, -100]]
    where, target = predictions({**batch, "labels": torch.tensor([[-100] * 4, [4, -100, 6, 7]])})
    assert where.tolist() == [[False] * 4, [False, True, True, False]]
    assert target[where].tolist() == [6, 7]
    where, target = predictions({"decoder_input_ids": batch["input_ids"], "labels": batch["input_ids"]})
    assert where.all()
    assert torch.equal(target, batch["input_ids"])


def test_right_padding_is_never_a_target():
    batch = {"input_ids": torch.tensor([[4, 5, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    where, target = predictions(batch)
    assert target[where].tolist() == [5, -100]


def test_batches_without_predictions_are_left_out(llama):
    batch = text_batches(1)[0]
    nothing = {**batch, "labels": torch.full_like(batch["input_ids"], -100)}
    assert len(record_batches(llama, [nothing, batch])) == 1
    with pytest.raises(InvalidInputError, match="No batch"):
        record_batches(llama, [nothing])


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llama"])
def test_layers_are_skipped_exactly(name):
    model = shadow(tiny_model(name))
    units = prunable_units(model)
    runs, ran = LayerRuns(model, units), []
    entry = record_batches(model, [tiny_inputs(name)])[0]
    logits, outputs = runs.record(lambda: entry.logits(model))
    assert runs.skips_exactly(lambda: entry.logits(model), logits, outputs)
    for index, unit in enumerate(units):
        model.get_submodule(unit.path).register_forward_hook(lambda *_, i=index: ran.append(i))
    with runs.skipping(2, outputs[1]):
        assert torch.equal(entry.logits(model), logits)
    assert ran == [2, 3]
    ran.clear()
    last = runs.until(1, lambda: entry.logits(model))
    assert ran == [0, 1]
    torch.testing.assert_close(last, outputs[1])
    assert all("forward" not in vars(layer) for layer in runs.layers)


def test_layers_that_feed_later_ones_are_not_skipped(llama):
    """The last layer looks at what the first one computed, as layers with shared keys and values do."""
    model, notes = shadow(llama), {}
    units = prunable_units(model)
    model.model.layers[0].register_forward_hook(lambda m, a, out: None)
    first, last = (layer_of(model, units[i]) for i in (0, 3))
    first.mlp.register_forward_hook(lambda m, a, out: notes.update(x=out))
    last.mlp.register_forward_hook(lambda m, a, out: out + notes.pop("x"))
    entry = record_batches(model, text_batches(1))[0]
    runs = LayerRuns(model, units)
    logits, outputs = runs.record(lambda: entry.logits(model))
    assert not runs.skips_exactly(lambda: entry.logits(model), logits, outputs)
