"""Least squares in turn: equal to least squares where only one layer is cut, better where many are."""

import copy

import pytest
import torch

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.recovery.by_layer import recover_lstsq, set_output_weights
from hf_lop.recovery.in_turn import recover_in_turn
from hf_lop.recovery.moments import second_moments
from hf_lop.units.decoder import text_decoder
from hf_lop.units.slice import output_weight, prunable_units, slice_units
from tests.conftest import KINDS
from tests.families import build, text_inputs
from tests.recovery.test_recovery import some_kept
from tests.small_models import text_batches
from tests.tiny_models import tiny_inputs, tiny_model
from tests.units.test_elastic import same, traces


@torch.no_grad()
def decoded(model, batches):
    return torch.cat([text_decoder(model)(**batch)[0].flatten(0, 1) for batch in batches]).double()


def pruned(model, kept, weights):
    cut = copy.deepcopy(model)
    set_output_weights(cut, slice_units(cut, kept), weights)
    return cut


@pytest.mark.parametrize("kind", KINDS)
def test_one_cut_layer_is_fitted_as_by_itself(built, kind):
    model, batches = built[kind], text_batches(12, padded=True)
    units = prunable_units(model)
    for layer in (0, 2):
        kept = [torch.arange(unit.count) for unit in units]
        kept[layer] = some_kept(units)[layer]
        alone = recover_lstsq(model, units, kept, second_moments(model, batches, units))
        in_turn = recover_in_turn(model, batches, units, kept)
        for found, expected in zip(in_turn[: layer + 1], alone[: layer + 1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_removed_changes_nothing_and_the_model_is_left_alone(built, kind):
    model = built[kind]
    units, before = prunable_units(model), traces(model)
    whole = recover_in_turn(model, text_batches(2), units, [torch.arange(unit.count) for unit in units])
    assert all(torch.equal(w, output_weight(model, unit)) for w, unit in zip(whole, units, strict=True))
    recover_in_turn(model, text_batches(12), units, some_kept(units))
    same(before, traces(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gated", "plain_bias", "conv1d", "fused"])
def test_held_out_outputs_come_closer_than_layer_by_layer(built, kind):
    model, batches, report = built[kind], text_batches(60), text_batches(10, seed=9)
    units = prunable_units(model)
    kept = some_kept(units, 24)
    weights = {
        "alone": recover_lstsq(model, units, kept, second_moments(model, batches, units)),
        "in turn": recover_in_turn(model, batches, units, kept),
    }
    dense = decoded(model, report)
    errors = {
        name: float((decoded(pruned(model, kept, w), report) - dense).square().mean()) for name, w in weights.items()
    }
    assert errors["in turn"] < errors["alone"]


def test_low_precision_and_a_barely_cut_first_layer(built):
    """What the fit changes in the first layer is below the rounding of its output: no reason to refuse."""
    model, batches = copy.deepcopy(built["gated"]).bfloat16(), text_batches(12)
    units = prunable_units(model)
    kept = [torch.arange(unit.count - (layer != 0)) for layer, unit in enumerate(units)]
    model.model.embed_tokens.weight.data.mul_(30)
    weights = recover_in_turn(model, batches, units, kept)
    assert [w.dtype for w in weights] == [torch.bfloat16] * 4


def test_a_multimodal_model_runs_its_tower_once_per_batch():
    model, batches = tiny_model("qwen2_5_vl"), [tiny_inputs("qwen2_5_vl", seed) for seed in range(4)]
    units, seen = prunable_units(model), []
    model.model.visual.register_forward_hook(lambda *_: seen.append(1))
    weights = recover_in_turn(model, batches, units, some_kept(units, 60))
    assert len(seen) == 4
    assert [tuple(w.shape) for w in weights] == [(len(output_weight(model, f)), 60 + i) for i, f in enumerate(units)]


def test_what_cannot_be_fitted_is_refused(llama):
    units = prunable_units(llama)
    with pytest.raises(InvalidInputError, match="damping is 0"):
        recover_in_turn(llama, text_batches(1), units, some_kept(units), damping=0)
    with pytest.raises(InvalidInputError, match="at least one"):
        recover_in_turn(llama, [], units, some_kept(units))
    gemma = build("gemma2")  # a norm behind every FFN
    units = prunable_units(gemma)
    with pytest.raises(UnsupportedModelError, match="do not simply add"):
        recover_in_turn(gemma, [text_inputs(gemma)], units, [torch.arange(unit.count // 2) for unit in units])
    notes = {}  # a layer that needs what another one has left cannot be run alone
    llama.model.layers[0].mlp.register_forward_hook(lambda m, a, out: notes.update(x=out))
    llama.model.layers[3].mlp.register_forward_pre_hook(lambda m, a: (a[0] + notes.pop("x"),))
    with pytest.raises(UnsupportedModelError, match="cannot be run one by one"):
        recover_in_turn(llama, text_batches(1), prunable_units(llama), some_kept(prunable_units(llama)))
