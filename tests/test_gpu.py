"""On a CUDA device: what is cut there equals its mask, recovers, saves and reloads; skipped without one."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lop.pruner.pruner import LOPPruner
from hf_lop.units.kept import noted
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import masking
from tests.helpers import logits
from tests.small_models import text_batches

pytestmark = pytest.mark.gpu
# Kernels for other shapes sum in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def on_device(model, dtype):
    return copy.deepcopy(model).to("cuda", dtype)


def given(batches):
    return [{key: value.cuda() for key, value in batch.items()} for batch in batches]


@pytest.fixture(scope="module")
def fitted(built):
    data = given(text_batches(8, seed=5))
    return LOPPruner.fit(on_device(built["gated"], torch.float32), data, data[:1], predictor="mlp")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", ["gated", "conv1d", "fused"])
def test_pruned_equals_masked(built, dtype, kind):
    from tests.fake_pruner import fake_pruner

    dense = on_device(built[kind], dtype)
    pruned = fake_pruner(built[kind]).prune(copy.deepcopy(dense), 0.4, recover=None)
    assert {parameter.device.type for parameter in pruned.parameters()} == {"cuda"}
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}
    batch = given(text_batches(1))[0]
    with masking(dense, find_units(dense), noted(pruned)["neurons"]):
        masked = logits(dense, batch)
    torch.testing.assert_close(logits(pruned, batch), masked, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_fit_is_that_of_the_cpu(built, fitted):
    data = text_batches(8, seed=5)
    here = LOPPruner.fit(copy.deepcopy(built["gated"]), data, data[:1], predictor="mlp")
    for ours, theirs in zip(fitted.statistics(), here.statistics(), strict=True):
        torch.testing.assert_close(ours.square, theirs.square, rtol=1e-3, atol=1e-4)
    assert fitted.plan(0.5).widths == pytest.approx(here.plan(0.5).widths, abs=3)


@pytest.mark.parametrize("recover", ["fold", "sketch", "lstsq", "sequential", "auto"])
def test_recoveries(built, fitted, recover, tmp_path):
    data = given(text_batches(8, seed=3)) if recover not in ("fold", "sketch") else None
    pruned = fitted.prune(on_device(built["gated"], torch.float32), 0.5, recover=recover, data=data)
    batch = given(text_batches(1))[0]
    assert torch.isfinite(logits(pruned, batch)).all()
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    assert torch.equal(logits(loaded, batch), logits(pruned, batch))


def test_elastic(built, fitted):
    elastic = fitted.elastic(on_device(built["gated"], torch.float32))
    elastic.set_plan(0.5)
    batch = given(text_batches(1))[0]
    pruned = fitted.prune(on_device(built["gated"], torch.float32), 0.5, recover=None)
    torch.testing.assert_close(logits(elastic.model, batch), logits(pruned, batch), rtol=1e-4, atol=1e-4)


def test_latency_is_measured_on_the_card(fitted):
    plan = copy.deepcopy(fitted).cuda().plan(latency=1.0)
    assert plan.device.startswith("cuda")
