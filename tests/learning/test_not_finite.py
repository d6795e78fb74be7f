"""Data and weights with NaN or infinity in them: named where they are, never in a pruner."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.learning.rewards import REWARDS, Reward
from hf_lop.learning.statistics import collect_statistics
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.recovery.in_turn import recover_in_turn
from hf_lop.recovery.moments import second_moments
from hf_lop.units.slice import prunable_units
from tests.fake_pruner import fake_pruner
from tests.helpers import orders, random_kept
from tests.small_models import text_batches

BAD = [float("nan"), float("inf"), -float("inf")]


def poisoned(model, value, batch, token=63):
    """Batches of which one has a token whose embedding is no number."""
    batches = [{**one, "input_ids": one["input_ids"].clamp_max(token - 1)} for one in text_batches(4)]
    with torch.no_grad():
        model.get_input_embeddings().weight[token, 3] = value
    batches[batch]["input_ids"][1, 2] = token
    return batches


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("batch", [0, 2])
def test_calibration_names_batch_and_layer(llama, value, batch):
    with pytest.raises(InvalidInputError, match=rf"Calibration batch {batch} gives activations in layer 0"):
        LOPPruner.fit(llama, poisoned(llama, value, batch), text_batches(1), predictor="mlp")


def test_a_weight_of_a_later_layer(llama):
    with torch.no_grad():
        llama.model.layers[2].mlp.up_proj.weight[5, 7] = float("nan")
    with pytest.raises(InvalidInputError, match="Calibration batch 0 gives activations in layer 2"):
        LOPPruner.fit(llama, text_batches(2), text_batches(1), predictor="mlp")


@pytest.mark.parametrize("recover", ["sequential", "lstsq"])
def test_recovery_names_batch_and_layer(llama, recover):
    pruner, before = fake_pruner(llama), copy.deepcopy(llama.state_dict())
    with pytest.raises(InvalidInputError, match="Recovery batch 1 gives activations in layer 0"):
        pruner.prune(llama, 0.4, data=poisoned(llama, float("nan"), 1), recover=recover)
    assert llama.config.intermediate_size == 48
    assert all(llama.state_dict()[name].shape == value.shape for name, value in before.items())


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("batch", [0, 2])
def test_rewards_name_the_batch(llama, kind, batch):
    batches = [{**one, "labels": one["input_ids"].clone()} for one in poisoned(llama, float("nan"), batch)]
    with pytest.raises(InvalidInputError, match=rf"Validation batch {batch} gives predictions"):
        Reward.on(llama, orders(llama), batches, kind)([48, 40, 30, 20])


def test_padding_may_be_no_number(llama):
    """Some models make NaN of rows that are masked altogether."""
    batches = text_batches(2, padded=True)
    expected = collect_statistics(llama, batches)
    hook = llama.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: (args[0].masked_fill(~padding[0].unsqueeze(-1), float("nan")),)
    )
    padding = [batches[0]["attention_mask"].bool()]
    found = collect_statistics(llama, batches[:1], prunable_units(llama)[:2])
    hook.remove()
    for a, b in zip(found, collect_statistics(llama, batches[:1]), strict=False):
        assert all(torch.isfinite(getattr(a, name)).all() for name in ("mean", "square", "norm", "fluctuation"))
        torch.testing.assert_close(a.mean, b.mean)
    assert len(expected) == 4


@pytest.mark.parametrize("name", ["mean", "square", "sketch_scale", "predictor.head.weight"])
def test_a_pruner_with_such_numbers_is_not_loaded(saved_pruner, name):
    path = saved_pruner / "model.safetensors"
    state = load_file(path)
    name = name if name in state else "norm"
    state[name].view(-1)[3] = float("nan")
    save_file(state, path, {"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=rf"{name} holds numbers that are not finite"):
        LOPPruner.from_pretrained(saved_pruner)


def test_second_moments_and_a_recovery_in_turn(llama):
    units = prunable_units(llama)
    batches = poisoned(llama, float("inf"), 3)
    with pytest.raises(InvalidInputError, match="Recovery batch 3"):
        list(second_moments(llama, batches, units))
    with pytest.raises(InvalidInputError, match="Recovery batch 3"):
        recover_in_turn(llama, batches, units, random_kept(units, [30] * 4))
