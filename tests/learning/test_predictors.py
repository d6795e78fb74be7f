import time

import numpy as np
import pytest
import torch

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.learning.predictors import PREDICTORS, TransformerPredictor, build_predictor, train_predictor
from hf_lop.planning.predict import predict_ratios
from tests.conftest import slow

TARGETS = torch.tensor([0.0, 0.3, 0.5, 1.0])


def small(name="transformer", num_layers=7, seed=0):
    return build_predictor(name, num_layers, seed=seed, dim=32)


def pairs(num_layers=7):
    targets = torch.linspace(0, 0.7, 15)
    return targets, targets[:, None] * torch.linspace(0.6, 1.4, num_layers)


@pytest.mark.parametrize("name", PREDICTORS)
def test_predicts_one_ratio_per_layer(name):
    ratios = small(name)(TARGETS)
    assert ratios.shape == (4, 7)
    assert ratios.dtype == torch.float32
    assert ((ratios > 0) & (ratios < 1)).all()


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_target_is_predicted_alike_alone_and_in_a_batch(name):
    predictor = small(name)
    torch.testing.assert_close(predictor(TARGETS)[2:3], predictor(TARGETS[2:3]))


@pytest.mark.parametrize("name", PREDICTORS)
def test_weights_in_half_precision_still_give_float32(name):
    predictor = small(name)
    ratios = predictor.bfloat16()(TARGETS)
    assert ratios.dtype == torch.float32
    torch.testing.assert_close(ratios, small(name)(TARGETS), atol=0.03, rtol=0)


def test_the_paper_sizes_are_the_defaults():
    predictor = TransformerPredictor(28)
    assert predictor.layers.weight.shape == (28, 128)
    assert len(predictor.blocks) == 2
    assert {block.heads for block in predictor.blocks} == {4}
    assert {block.up.out_features for block in predictor.blocks} == {4 * 128}


@pytest.mark.parametrize("name", PREDICTORS)
def test_numpy_predicts_the_same(name):
    predictor = small(name)
    weights = {key: value.detach().numpy() for key, value in predictor.named_parameters()}
    for target, ratios in zip(TARGETS.tolist(), predictor(TARGETS), strict=True):
        found = predict_ratios(name, weights, target, 7)
        assert (found.shape, found.dtype) == ((7,), np.float64)
        np.testing.assert_allclose(found, ratios.detach().numpy(), atol=1e-6)
    with pytest.raises(InvalidInputError, match="target ratio is nan"):
        predict_ratios(name, weights, float("nan"), 7)
    for damage in (lambda w: w.popitem(), lambda w: w.update({next(iter(w)): np.zeros((3, 3), np.float32)})):
        damaged = dict(weights)
        damage(damaged)
        with pytest.raises(CheckpointMismatchError, match="are not those of a predictor"):
            predict_ratios(name, damaged, 0.3, 7)
    if name != "bilstm":  # which has weights for any number
        with pytest.raises(CheckpointMismatchError, match="they predict 7 layers of 8"):
            predict_ratios(name, weights, 0.3, 8)


def test_a_plan_of_28_layers_takes_less_than_torch_does():
    predictor = build_predictor("transformer", 28)
    weights = {key: value.detach().numpy() for key, value in predictor.named_parameters()}

    def seconds(run):
        spent = []
        for _ in range(9):
            start = time.process_time()
            run()
            spent.append(time.process_time() - start)
        return min(spent)

    predict = seconds(lambda: predict_ratios("transformer", weights, 0.3, 28))
    # 28 passes over all layers, of which prediction saves all but one token each.
    assert predict < 0.5 * seconds(lambda: predictor(torch.tensor([0.3])))
    assert predict < 0.05


def test_a_ratio_depends_on_all_earlier_ratios_and_on_no_later_one():
    predictor = small()
    ratios = torch.full((1, 7), 0.3)
    jacobian = torch.autograd.functional.jacobian(lambda r: predictor.teacher_forced(TARGETS[1:2], r)[0], ratios)[:, 0]
    assert (jacobian.triu() == 0).all()
    assert (jacobian.tril(-1)[1:, 0] != 0).all()


def test_predictions_are_ordinary_tensors():
    ratios = small()(TARGETS)
    assert not ratios.is_inference()
    assert not ratios.requires_grad


def test_a_predictor_built_without_storage_takes_loaded_weights():
    predictor = small()
    with torch.device("meta"):
        empty = TransformerPredictor(7, dim=32)
    empty.load_state_dict(predictor.state_dict(), assign=True)
    torch.testing.assert_close(empty(TARGETS), predictor(TARGETS), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["transformer", *slow("bilstm", "mlp")])
def test_training_fits_the_pairs(name):
    targets, ratios = pairs()
    predictor = small(name)
    losses = train_predictor(predictor, targets, ratios, epochs=150, learning_rate=3e-3)
    assert len(losses) == 150
    assert losses[-1] < 1e-3 < losses[0]
    with torch.no_grad():
        assert (predictor(targets) - ratios).abs().mean() < 0.05


@pytest.mark.parametrize("name", PREDICTORS)
def test_same_seed_same_predictor_and_the_global_random_state_stays(name):
    targets, ratios = pairs()
    before = torch.get_rng_state()
    first, second = small(name, seed=3), small(name, seed=3)
    losses = train_predictor(first, targets, ratios, epochs=3, batch_size=4, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert train_predictor(second, targets, ratios, epochs=3, batch_size=4, seed=5) == losses
    assert torch.equal(first(TARGETS), second(TARGETS))
    assert not torch.equal(small(name, seed=4)(TARGETS), small(name, seed=3)(TARGETS))


def test_the_seed_orders_the_pairs():
    targets, ratios = pairs()
    losses = [train_predictor(small(), targets, ratios, epochs=2, batch_size=4, seed=seed) for seed in (0, 1)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("bad", [[], [-0.1], [1.1], [float("nan")], [[0.5]]])
@pytest.mark.parametrize("name", PREDICTORS)
def test_targets_outside_the_domain_are_refused(name, bad):
    with pytest.raises(InvalidInputError, match="targets"):
        small(name)(torch.tensor(bad))


def test_training_refuses_what_it_cannot_use():
    targets, ratios = pairs()
    nan = ratios.clone()
    nan[0, 0] = float("nan")
    for bad_targets, bad_ratios, more in (
        (targets, ratios[:, 1:], {}),
        (targets[1:], ratios, {}),
        (targets[:, None], ratios, {}),
        (targets[:0], ratios[:0], {}),
        (targets, nan, {}),
        (targets, ratios + 1, {}),
        (targets + 1, ratios, {}),
        (targets, ratios, {"epochs": 0}),
        (targets, ratios, {"batch_size": 0}),
    ):
        with pytest.raises(InvalidInputError):
            train_predictor(small(), bad_targets, bad_ratios, **more)


@pytest.mark.parametrize(
    ("name", "num_layers", "sizes"),
    [("rnn", 4, {}), ("mlp", 0, {}), ("mlp", 4, {"dim": 0}), ("transformer", 4, {"dim": 30, "heads": 4})],
)
def test_impossible_predictors_are_refused(name, num_layers, sizes):
    with pytest.raises(InvalidInputError):
        build_predictor(name, num_layers, **sizes)
