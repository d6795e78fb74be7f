"""Elastic models: every width as a view, on every kind of FFN, and the user's model untouched."""

import copy

import pytest
import torch
from torch import nn

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.units.views import ElasticModel, shadow
from tests.conftest import slow
from tests.helpers import cut, logits, orders
from tests.small_models import CONFIGS, text_batches

WIDTHS = [48, 31, 17, 1]


def traces(model):
    """Everything a user could notice: objects, bytes, versions, attributes and hooks of every module."""
    tensors = [(n, id(p), p.data_ptr(), p._version, p.requires_grad, p.clone()) for n, p in model.named_parameters()]
    plain = []
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if type(value) in (int, float, bool, str)}
        hooks = {key: len(value) for key, value in vars(module).items() if "hook" in key and hasattr(value, "__len__")}
        plain.append((name, id(module), own, hooks, sorted(vars(module))))
    return tensors, plain


def same(before, after):
    (tensors, plain), (tensors2, plain2) = before, after
    assert plain == plain2
    for (*facts, value), (*facts2, value2) in zip(tensors, tensors2, strict=True):
        assert facts == facts2
        assert torch.equal(value, value2)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_width_gives_the_output_of_a_cut_model(built, kind):
    model, batch = built[kind], text_batches(1)[0]
    order = orders(model)
    elastic = ElasticModel(model, order)
    for widths in (WIDTHS, [1, 1, 1, 1], [47, 48, 2, 30], WIDTHS):
        elastic.set_widths(widths)
        assert elastic.widths == tuple(widths)
        torch.testing.assert_close(
            logits(elastic.model, batch), logits(cut(model, order, widths), batch), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", CONFIGS)
def test_dense_widths_are_bit_identical(built, kind):
    model, batch = built[kind], text_batches(1)[0]
    elastic = ElasticModel(model, orders(model))
    elastic.set_widths(WIDTHS)
    elastic.set_widths([48] * 4)
    assert torch.equal(logits(elastic.model, batch), logits(model, batch))


@pytest.mark.parametrize("kind", ["gated", "gated_bias", "plain_bias", "conv1d"])
def test_widths_are_views_of_one_copy(built, kind):
    model = built[kind]
    elastic = ElasticModel(model, orders(model))
    places = []
    for widths in ([20] * 4, [7] * 4):
        elastic.set_widths(widths)
        modules = [m for unit in elastic.units for part in unit.modules(elastic.model) for m in _flat(part)]
        assert all(
            module.weight.numel() * 48 == module.weight.untyped_storage().nbytes() // 4 * widths[0]
            for module in modules
        )
        places.append([module.weight.untyped_storage().data_ptr() for module in modules])
    assert places[0] == places[1]


def _flat(part):
    return part if isinstance(part, list) else [part]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_users_model_is_only_read(built, kind):
    model, batch = copy.deepcopy(built[kind]).train(), text_batches(1)[0]
    before = traces(model)
    elastic = ElasticModel(model, orders(model))
    elastic.set_widths(WIDTHS)
    logits(elastic.model, batch)
    same(before, traces(model))
    assert model.training
    assert not elastic.model.training


@pytest.mark.parametrize("error", [KeyboardInterrupt, *slow(RuntimeError)])
def test_an_interrupt_anywhere_leaves_no_trace(llama, error, monkeypatch):
    """Raise at every single tensor operation and module call, one after the other."""
    batch, order = text_batches(1)[0], orders(llama)
    before, fuse = traces(llama), {"left": 10**9}

    class Fuse(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            fuse["left"] -= 1
            if fuse["left"] == 0:
                raise error("stop")
            return func(*args, **(kwargs or {}))

    def run():
        with Fuse():
            elastic = ElasticModel(llama, order)
            elastic.set_widths(WIDTHS)
            logits(elastic.model, batch)

    run()
    steps = 10**9 - fuse["left"]
    for step in range(1, steps + 1, 7):
        fuse["left"] = step
        with pytest.raises(error):
            run()
    same(before, traces(llama))


def test_widths_recover_from_an_interrupt(llama, monkeypatch):
    batch, order = text_batches(1)[0], orders(llama)
    elastic = ElasticModel(llama, order)
    last = elastic._tensors[2][1]
    with monkeypatch.context() as patch:
        patch.setattr(last, "narrow", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            elastic.set_widths(WIDTHS)
    elastic.set_widths(WIDTHS)
    torch.testing.assert_close(
        logits(elastic.model, batch), logits(cut(llama, order, WIDTHS), batch), rtol=1e-5, atol=1e-5
    )


def test_a_shadow_shares_every_parameter(llama):
    twin = shadow(llama)
    assert all(a is b for a, b in zip(llama.parameters(), twin.parameters(), strict=True))
    assert not {id(m) for m in llama.modules()} & {id(m) for m in twin.modules()}


@pytest.mark.parametrize(
    ("widths", "words"), [([48] * 3, "3 widths"), ([48, 48, 0, 48], "Layer 2"), ([48, 49, 48, 48], "Layer 1")]
)
def test_bad_widths_change_nothing(llama, widths, words):
    elastic = ElasticModel(llama, orders(llama))
    elastic.set_widths(WIDTHS)
    with pytest.raises(InvalidInputError, match=words):
        elastic.set_widths(widths)
    assert elastic.widths == tuple(WIDTHS)


def test_bad_orders_are_refused(llama):
    order = orders(llama)
    with pytest.raises(InvalidInputError, match="3 layers"):
        ElasticModel(llama, order[:3])
    with pytest.raises(InvalidInputError, match="layer 1"):
        ElasticModel(llama, [order[0], order[1][:-1], *order[2:]])


def test_weights_that_are_not_there_or_computed_are_refused(llama):
    order = orders(llama)
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        ElasticModel(copy.deepcopy(llama).to("meta"), order)
    nn.utils.parametrizations.weight_norm(llama.model.layers[1].mlp.down_proj)
    with pytest.raises(UnsupportedModelError):
        ElasticModel(llama, order)
