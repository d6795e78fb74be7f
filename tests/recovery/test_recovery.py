"""Least squares and folding of the output projection, against slow float64 references and on held-out data."""

import copy

import pytest
import torch

from hf_lop.errors import InvalidInputError
from hf_lop.learning.statistics import collect_statistics
from hf_lop.recovery import moments as moments_module
from hf_lop.recovery.by_layer import recover_fold, recover_lstsq, set_output_weights
from hf_lop.recovery.moments import second_moments
from hf_lop.units.slice import output_weight, prunable_units, slice_units
from tests.conftest import KINDS, slow
from tests.families import build, text_inputs
from tests.helpers import random_kept
from tests.small_models import CONFIGS, text_batches
from tests.tiny_models import tiny_inputs, tiny_model

ONE = 4 * 48**2  # bytes of one layer's second moments


@torch.no_grad()
def activations(model, batches):
    """Inputs and outputs of every FFN's output projection at real tokens, `[T, n]` and `[T, d]` float64 per layer."""
    units = prunable_units(model)
    inputs, outputs = [[] for _ in units], [[] for _ in units]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        handles = []
        for i, unit in enumerate(units):

            def note(_m, a, out, i=i, mask=mask):
                inputs[i].append(a[0].reshape(*mask.shape, -1)[mask].double())
                outputs[i].append(out.reshape(*mask.shape, -1)[mask].double())

            handles.append(unit.modules(model)[1].register_forward_hook(note))
        model(**batch)
        for handle in handles:
            handle.remove()
    return [torch.cat(x) for x in inputs], [torch.cat(y) for y in outputs]


def some_kept(units, count=30, seed=0):
    return random_kept(units, [count + i for i in range(len(units))], seed)


@pytest.mark.parametrize("memory", [ONE, 2 * ONE, 3 * ONE, 2**32])
@pytest.mark.parametrize("kind", CONFIGS)
def test_second_moments_are_the_products_of_activations(built, kind, memory):
    model, batches = built[kind], text_batches(3, padded=True)
    found = list(second_moments(model, batches, prunable_units(model), memory=memory))
    for gram, x in zip(found, activations(model, batches)[0], strict=True):
        assert gram.dtype == torch.float32
        torch.testing.assert_close(gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"])
def test_layers_and_vision_tower_run_once_in_groups(name):
    model, batches = tiny_model(name), [tiny_inputs(name, seed) for seed in range(4)]
    units, seen, ran = prunable_units(model), [], []
    tower = next(m for n, m in model.named_modules() if n.split(".")[-1] in ("visual", "vision_tower"))
    tower.register_forward_hook(lambda *_: seen.append(1))
    for index, unit in enumerate(units):
        model.get_submodule(unit.path).register_forward_hook(lambda *_, i=index: ran.append(i))
    found = list(second_moments(model, batches, units, memory=2 * 4 * 96**2))
    assert len(seen) == 4
    checks = [1, 1, 2, 3]  # all layers recorded once, then from the third on and the last alone
    assert [ran.count(index) for index in range(4)] == [4 + c for c in checks]
    for gram, x in zip(found, activations(model, batches)[0], strict=True):
        torch.testing.assert_close(gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_only_what_fits_in_memory_exists_at_a_time(llama, monkeypatch):
    alive, most, zeros = [], [0], torch.zeros

    def watched(*shape, **kwargs):
        import weakref

        gram = zeros(*shape, **kwargs)
        alive.append(weakref.ref(gram))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return gram

    monkeypatch.setattr(moments_module.torch, "zeros", watched)
    units = prunable_units(llama)
    moments = second_moments(llama, text_batches(1), units, memory=ONE)
    monkeypatch.setattr(moments_module.torch, "zeros", watched)
    for gram in moments:
        del gram
    assert most[0] == 1


def test_layers_that_feed_later_ones(llama):
    notes = {}
    llama.model.layers[0].mlp.register_forward_hook(lambda m, a, out: notes.update(x=out))
    llama.model.layers[3].mlp.register_forward_pre_hook(lambda m, a: (a[0] + notes.pop("x"),))
    batches = text_batches(2)
    found = list(second_moments(llama, batches, prunable_units(llama), memory=ONE))
    for gram, x in zip(found, activations(llama, batches)[0], strict=True):
        torch.testing.assert_close(gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)


def test_an_encoder_decoder_and_a_model_that_is_its_own_decoder():
    for family in ("vision-encoder-decoder", "modernbert-decoder"):
        model = build(family)
        units, batch = prunable_units(model), text_inputs(model)
        memory = 4 * max(unit.count for unit in units) ** 2
        grouped = list(second_moments(model, [batch], units, memory=memory))
        whole = list(second_moments(model, [batch], units))
        for a, b in zip(grouped, whole, strict=True):
            torch.testing.assert_close(a, b)
            assert a.diagonal().min() >= 0
            assert a.diagonal().sum() > 0


def test_too_little_memory_and_no_data_are_refused(llama):
    units = prunable_units(llama)
    with pytest.raises(InvalidInputError, match="9,216 bytes"):
        list(second_moments(llama, text_batches(1), units, memory=ONE - 1))
    with pytest.raises(InvalidInputError, match="at least one"):
        list(second_moments(llama, [], units))


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_is_what_its_formula_says(built, kind):
    model, batches = built[kind], text_batches(20)
    units = prunable_units(model)
    kept = some_kept(units)
    found = recover_lstsq(model, units, kept, second_moments(model, batches, units), damping=0.03)
    for unit, indices, weight, x in zip(units, kept, found, activations(model, batches)[0], strict=True):
        dense, indices = output_weight(model, unit).double(), indices.sort().values
        # Damping in its other form: extra rows of the data, in which each kept neuron does its dense work alone.
        alone = torch.diag((0.03 * x[:, indices].square().sum(0).clamp_min(1e-9 * x.square().sum(0).mean())).sqrt())
        rows, targets = torch.cat([x[:, indices], alone]), torch.cat([x @ dense.T, alone @ dense[:, indices].T])
        expected = torch.linalg.lstsq(rows, targets).solution.T
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", slow("gated", "plain_bias", "conv1d", "fused"))
def test_held_out_outputs_come_closer(built, kind):
    """Every layer by itself, on tokens that were not calibrated on."""
    model, report = built[kind], text_batches(40, seed=9)
    units = prunable_units(model)
    kept = some_kept(units, 24)
    data = text_batches(200)
    methods = {
        "lstsq": recover_lstsq(model, units, kept, second_moments(model, data, units)),
        "fold": recover_fold(model, units, kept, collect_statistics(model, data, units)),
    }
    for layer, (x, _) in enumerate(zip(*activations(model, report), strict=True)):
        weight, indices = output_weight(model, units[layer]).double(), kept[layer].sort().values
        error = {"none": (x @ weight.T - x[:, indices] @ weight[:, indices].T).square().mean()}
        for name, weights in methods.items():
            error[name] = (x @ weight.T - x[:, indices] @ weights[layer].double().T).square().mean()
        assert error["lstsq"] < 0.9 * error["none"]
        assert error["lstsq"] < error["fold"]


def test_removed_neurons_that_others_can_replace_cost_nothing(llama):
    """Twins and multiples of kept neurons: the cut model then computes what the dense one did."""
    with torch.no_grad():
        for layer in llama.model.layers:
            mlp = layer.mlp
            mlp.gate_proj.weight[24:] = mlp.gate_proj.weight[:24]
            mlp.up_proj.weight[24:] = mlp.up_proj.weight[:24] * torch.linspace(-2, 2, 24)[:, None]
    units, batches = prunable_units(llama), text_batches(12)
    kept = [torch.arange(24)] * 4
    weights = recover_lstsq(llama, units, kept, second_moments(llama, batches, units), damping=1e-9)
    pruned = copy.deepcopy(llama)
    cut = slice_units(pruned, kept)
    batch = text_batches(1, seed=4)[0]
    with torch.no_grad():
        dense, broken = llama(**batch).logits, pruned(**batch).logits
        set_output_weights(pruned, cut, weights)
        recovered = pruned(**batch).logits
    assert (broken - dense).abs().max() > 0.1
    torch.testing.assert_close(recovered, dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_folding_keeps_the_mean_output(built, kind):
    model, batches = built[kind], text_batches(5)
    units = prunable_units(model)
    kept = some_kept(units)
    weights = recover_fold(model, units, kept, collect_statistics(model, batches, units))
    for unit, indices, weight, x in zip(units, kept, weights, activations(model, batches)[0], strict=True):
        mean, indices = x.mean(0), indices.sort().values
        expected = output_weight(model, unit).double() @ mean
        torch.testing.assert_close(weight.double() @ mean[indices], expected, rtol=1e-4, atol=1e-5)
        variance = x.var(0, correction=0).clamp_min(1e-6 * x.var(0, correction=0).mean())
        a = mean[indices] / variance[indices] / (mean[indices].square() / variance[indices]).sum()
        gone = torch.ones(len(mean), dtype=torch.bool)
        gone[indices] = False
        b = output_weight(model, unit).double()[:, gone] @ mean[gone]
        expected = output_weight(model, unit).double()[:, indices] + torch.outer(b, a)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recovered_weights_go_into_the_cut_model(built, kind, dtype):
    model = copy.deepcopy(built[kind]).to(dtype)
    units, batches = prunable_units(model), text_batches(2)
    names = {name: p.shape for name, p in model.named_parameters()}
    kept = some_kept(units)
    kept[2] = torch.arange(48)
    weights = recover_lstsq(model, units, kept, second_moments(model, batches, units))
    assert torch.equal(weights[2], output_weight(model, units[2]))
    cut = slice_units(model, kept)
    parameters = [unit.modules(model)[1].weight for unit in cut]
    set_output_weights(model, cut, weights)
    for unit, weight, parameter in zip(cut, weights, parameters, strict=True):
        assert unit.modules(model)[1].weight is parameter
        assert parameter.dtype == dtype
        assert torch.equal(output_weight(model, unit), weight)
    assert set(names) == {name for name, _ in model.named_parameters()}
    assert torch.isfinite(model(**batches[0]).logits).all()


def test_silent_layers_and_means_of_zero_change_nothing(llama):
    units = prunable_units(llama)
    kept = some_kept(units)
    plain = [output_weight(llama, f)[:, k.sort().values] for f, k in zip(units, kept, strict=True)]
    silent = recover_lstsq(llama, units, kept, [torch.zeros(48, 48)] * 4)
    statistics = collect_statistics(llama, text_batches(1), units)
    for measured in statistics:
        measured.mean.zero_()
    folded = recover_fold(llama, units, kept, statistics)
    for weights in (silent, folded):
        assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))


def test_constant_neurons_fold_without_infinities(llama):
    units = prunable_units(llama)
    statistics = collect_statistics(llama, text_batches(2), units)
    statistics[1].fluctuation[:20] = 0
    weights = recover_fold(llama, units, some_kept(units), statistics)
    assert all(torch.isfinite(weight).all() for weight in weights)


def test_what_does_not_fit_is_refused(llama):
    units = prunable_units(llama)
    kept, grams = some_kept(units), [torch.eye(48)] * 4
    with pytest.raises(InvalidInputError, match="damping"):
        recover_lstsq(llama, units, kept, grams, damping=0)
    with pytest.raises(InvalidInputError, match="layer 3 are missing"):
        recover_lstsq(llama, units, kept, grams[:3])
    with pytest.raises(InvalidInputError, match="shape"):
        recover_lstsq(llama, units, kept, [torch.eye(47)] * 4)
    with pytest.raises(InvalidInputError, match="not finite"):
        recover_lstsq(llama, units, kept, [torch.full((48, 48), torch.inf)] * 4)
    with pytest.raises(InvalidInputError, match="distinct"):
        recover_lstsq(llama, units, [torch.tensor([1, 1])] * 4, grams)
    with pytest.raises(InvalidInputError, match="another model"):
        recover_fold(llama, units, kept, collect_statistics(llama, text_batches(1), units)[:2])
    before = [output_weight(llama, unit).clone() for unit in units]
    good = recover_lstsq(llama, units, kept, grams)
    with pytest.raises(InvalidInputError, match="Layer 0"):
        set_output_weights(llama, units, good)
    assert all(torch.equal(a, output_weight(llama, f)) for a, f in zip(before, units, strict=True))


def test_the_model_is_only_read(llama):
    before = [(id(p), p._version, p.clone()) for p in llama.parameters()]
    units = prunable_units(llama)
    llama.train()
    recover_lstsq(llama, units, some_kept(units), second_moments(llama, text_batches(2), units, memory=ONE))
    recover_fold(llama, units, some_kept(units), collect_statistics(llama, text_batches(1), units))
    assert all(module.training and not module._forward_pre_hooks for module in llama.modules())
    for (identity, version, value), parameter in zip(before, llama.parameters(), strict=True):
        assert (identity, version) == (id(parameter), parameter._version)
        assert torch.equal(value, parameter)
