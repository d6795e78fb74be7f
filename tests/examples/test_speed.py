"""The speed benchmark's arithmetic, against costs counted by hand; its times are not tested."""

import pytest
import torch

from hf_lop.units.slice import slice_units
from tests.helpers import script
from tests.tiny_pruned import text_model


@pytest.fixture(scope="module")
def speed():
    return script("benchmarks/speed.py")


def test_costs(speed):
    model = text_model("llama", tie_word_embeddings=True)
    hidden, kv, width, layers, vocabulary, tokens = 64, 32, 96, 4, 320, 10
    projections = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * width)
    attention = layers * 2 * hidden * tokens * tokens
    flops = 2 * projections * tokens + 2 * hidden * vocabulary + attention
    norms = (2 * layers + 1) * hidden
    cache = layers * 2 * kv * tokens
    found = speed.costs(model, tokens)
    assert found["prefill"] == flops
    assert found["decode"] == 4 * (projections + hidden * vocabulary + norms + cache)
    slice_units(model, [torch.arange(n) for n in (96, 50, 17, 8)])
    removed = 3 * hidden * (4 * width - 171)
    pruned = speed.costs(model, tokens)
    assert flops - pruned["prefill"] == 2 * removed * tokens
    assert found["decode"] - pruned["decode"] == 4 * removed


@pytest.mark.parametrize("round_to", [1, 16, 64])
def test_widths(speed, round_to):
    widths = speed.draw([1536] * 30, 0.7, round_to, seed=1)
    assert all(width % round_to == 0 and width >= round_to for width in widths)
    assert abs(sum(widths) / (30 * 1536) - 0.3) < 0.02
    assert len(set(widths)) > 3


def test_no_ffn_keeps_the_shape(speed):
    assert speed.NoFFN()(torch.ones(1, 3, 8)).abs().sum() == 0


def test_table(speed):
    row = {"widths": [1]} | {
        f"{phase}, {key}": 1.5
        for phase in ("prefill", "decode")
        for key in ("ms", "speed-up", "ideal", "achieved", "FFNs achieved")
    }
    none = {"prefill, ms": 1.5, "decode, ms": 0.75, "share of FLOPs": 0.3}
    rows = {"dense": {"widths": [2], "prefill, ms": 3.0, "decode, ms": 3.0}, "30%, 16": row, "without FFNs": none}
    text = speed.markdown({"machine": "m", "torch": "t", "rounds": 1, "load": 0.5, "dtypes": {"float32": rows}})
    assert "| 30% | 16 | 1.50x | 1.50x | 1.50 | 1.50 | 1.50x | 1.50x | 1.50 | 1.50 |" in text
    assert "takes 50% of the time of the dense prefill for 30% of its FLOPs, and 25% of that of a token" in text
