"""What holds for any kind of unit, shown with one that is harder than FFN neurons: KV groups (see `kv_groups.py`)."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_lop.errors import CheckpointMismatchError, UnsupportedModelError
from hf_lop.learning.bench import Bench
from hf_lop.learning.importance import neuron_order, unit_importance
from hf_lop.learning.probes import probe_layers
from hf_lop.learning.statistics import collect_statistics
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.units import kinds
from hf_lop.units.checks import UNITS
from hf_lop.units.configs import text_configs
from hf_lop.units.kinds import find_units
from hf_lop.units.measure import measure_size
from hf_lop.units.slice import masking, prunable_units, slice_units
from hf_lop.units.unit import Slot, entries, resized, runs, take
from hf_lop.units.views import ElasticModel
from tests.fake_pruner import fake_pruner
from tests.helpers import logits, random_kept
from tests.small_models import text_batches
from tests.units.kv_groups import find_kv_groups

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "pad_token_id": 0}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
COUNTS = [4, 1, 3, 2]


@pytest.fixture(autouse=True)
def kv_groups(monkeypatch):
    """The only kind, for the time of a test; attentions keep the number of their query heads, as older ones did."""
    monkeypatch.setattr(kinds, "KINDS", kinds.KINDS)
    monkeypatch.setitem(kinds.KINDS, "kv_groups", find_kv_groups)
    monkeypatch.delitem(kinds.KINDS, "neurons")
    built = LlamaAttention.__init__

    def with_a_number(self, config, layer_idx):
        built(self, config, layer_idx)
        self.num_heads = config.num_attention_heads

    monkeypatch.setattr(LlamaAttention, "__init__", with_a_number)


@pytest.fixture
def model(kv_groups):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(LlamaConfig(attention_bias=True, **SIZES, **HEADS)).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_what_is_found(model):
    units = find_units(model)
    assert [(unit.kind, unit.count, unit.block) for unit in units] == [("kv_groups", 4, 8)] * 4
    assert len(units[0].slots) == 7  # q, k, v with their biases, and the weight of o
    size = measure_size(model, units)
    of_piece = 2 * 4 * (32 + 1) + 2 * 4 * (32 + 1) + 32 * 8  # rows of q, k, v with biases, columns of o
    assert size.neuron_parameters == (of_piece,) * 4
    assert size.flops_at([3] * 4) == size.flops - 4 * 2 * (16 * 32 + 32 * 8)


def test_pruned_equals_masked(model):
    batch, units = text_batches(1, padded=True)[0], find_units(model)
    kept = random_kept(units, COUNTS, seed=1)
    with masking(model, units, kept):
        masked = logits(model, batch)
    dense = logits(model, batch)
    cut = slice_units(model, kept)
    assert [unit.count for unit in cut] == [unit.count for unit in find_units(model)] == COUNTS
    assert cut == find_units(model)
    assert [layer.self_attn.num_heads for layer in model.model.layers] == [2 * k for k in COUNTS]
    torch.testing.assert_close(logits(model, batch), masked, rtol=1e-5, atol=1e-5)
    assert (masked - dense).abs().max() > 0.1
    assert model.config.num_key_value_heads == COUNTS
    assert model.config.num_attention_heads == [8, 2, 6, 4]
    with pytest.raises(UnsupportedModelError, match="already pruned"):
        prunable_units(model)


def test_saved_and_reloaded(model, tmp_path):
    batch = text_batches(1)[0]
    slice_units(model, random_kept(find_units(model), COUNTS, seed=1))
    model.save_pretrained(tmp_path / "once")
    pruned = logits(model, batch)
    for step in ("once", "twice"):
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / step, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(logits(loaded.eval(), batch), pruned)
        assert loaded.config.num_key_value_heads == COUNTS
        loaded.save_pretrained(tmp_path / "twice")
    assert vars(loaded.config)[UNITS]["num_attention_heads"] == {"unit": "kv_groups", "per": 2, "unpruned": 8}


def test_a_unit_that_is_not_known_is_refused_by_name(model, tmp_path, monkeypatch):
    slice_units(model, random_kept(find_units(model), COUNTS, seed=1))
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(kinds.KINDS, "kv_groups")
    with pytest.raises(CheckpointMismatchError, match="'kv_groups', which this version"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_views_equal_the_cut_model(model):
    batch, units = text_batches(1)[0], find_units(model)
    scores = unit_importance(model, units, "l2", collect_statistics(model, text_batches(2), units))
    order = neuron_order(scores)
    assert [len(indices) for indices in order] == [4] * 4
    elastic, dense = ElasticModel(model, order), logits(model, batch)
    elastic.set_widths(COUNTS)
    assert text_configs(elastic.model)[0].num_attention_heads == [8, 2, 6, 4]
    sorted_cut = copy.deepcopy(model)
    for unit, indices, count in zip(units, order, COUNTS, strict=True):
        take(sorted_cut, unit, indices[:count])
    torch.testing.assert_close(logits(elastic.model, batch), logits(sorted_cut, batch), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(elastic.materialize(), batch), logits(sorted_cut, batch), rtol=1e-5, atol=1e-5)
    elastic.set_widths([4] * 4)
    assert torch.equal(logits(elastic.model, batch), dense)
    assert model.config.num_attention_heads == 8


def test_probes(model):
    units, batches = find_units(model), text_batches(2)
    order = neuron_order(unit_importance(model, units, "magnitude"))
    damage = probe_layers(Bench(model, order, batches), [0.25, 0.75])
    dense = [logits(model, batch).log_softmax(-1) for batch in batches]
    with masking(model, units, [order[0][:1], *(torch.arange(4) for _ in range(3))]):
        cut = [logits(model, batch).log_softmax(-1) for batch in batches]
    expected = np.mean([(p.exp() * (p - q)).sum(-1).mean().item() for p, q in zip(dense, cut, strict=True)])
    assert damage.shape == (1, 4, 2)
    assert damage[0, 0, 1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("recover", [None, "fold", "sketch"])
def test_a_pruner_cuts_in_memory_as_from_file_to_file(model, tmp_path, recover):
    model.save_pretrained(tmp_path / "dense")
    pruner = fake_pruner(model)
    pruner.save_pretrained(tmp_path / "pruner")
    pruner = LOPPruner.from_pretrained(tmp_path / "pruner")
    assert pruner.config.size.block == 8
    streamed = pruner.prune(tmp_path / "dense", 0.4, method="mcts", recover=recover, output_dir=tmp_path / "streamed")
    pruned = pruner.prune(tmp_path / "dense", 0.4, method="mcts", recover=recover)
    assert pruned.config.num_key_value_heads == streamed.config.num_key_value_heads == [3, 2, 2, 2]
    pruned.save_pretrained(tmp_path / "memory")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()
    if recover is None:
        order, units = pruner.order(), find_units(model)
        kept = [indices[:k] for indices, k in zip(order, (3, 2, 2, 2), strict=True)]
        batch = text_batches(1)[0]
        with masking(model, units, kept):
            masked = logits(model, batch)
        torch.testing.assert_close(logits(pruned.eval(), batch), masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recover", [None, "sketch"])
def test_an_elastic_repository_gives_every_size(model, tmp_path, recover):
    model.save_pretrained(tmp_path / "dense")
    pruner, batch = fake_pruner(model), text_batches(1)[0]
    pruner.make_elastic(tmp_path / "dense").save_pretrained(tmp_path / "elastic")
    size = AutoModelForCausalLM.from_pretrained(tmp_path / "elastic", lop_params=32000, lop_recover=recover).eval()
    counts = size.config.num_key_value_heads
    assert 4 < sum(counts) < 16
    ordinary = LOPPruner.from_pretrained(tmp_path / "elastic").prune(
        tmp_path / "elastic", params=32000, recover=recover
    )
    assert ordinary.config.num_key_value_heads == counts
    torch.testing.assert_close(logits(size, batch), logits(ordinary.eval(), batch), rtol=1e-4, atol=1e-4)


def test_least_squares_brings_outputs_back(model):
    held_out, dense = text_batches(1, seed=9)[0], copy.deepcopy(model)
    pruner, far = fake_pruner(model), {}
    for recover in (None, "lstsq"):
        data = text_batches(30, seed=5) if recover else None
        pruned = pruner.prune(copy.deepcopy(dense), 0.4, method="mcts", recover=recover, data=data)
        far[recover] = float((logits(pruned, held_out) - logits(dense, held_out)).square().mean())
    assert far["lstsq"] < far[None]
    with pytest.raises(UnsupportedModelError, match="do not simply add"):  # the FFN of the layer follows
        pruner.prune(model, 0.4, recover="sequential", data=text_batches(2))


def test_several_slots_of_one_tensor():
    """Phi-3's fused projection: query rows, then key rows, then value rows, cut in one take."""
    model = AutoModelForCausalLM.from_config(Phi3Config(**SIZES, num_attention_heads=8, num_key_value_heads=4))
    unit = find_units(model)[0]
    weight = model.get_submodule(unit.path).qkv_proj.weight.detach().clone()
    query, key, value = weight.split([32, 16, 16])
    kept = torch.tensor([3, 1])
    narrow = take(model, unit, kept)
    expected = torch.cat([part.unflatten(0, (4, -1))[kept].flatten(0, 1) for part in (query, key, value)])
    assert torch.equal(model.get_submodule(unit.path).qkv_proj.weight, expected)
    assert model.get_submodule(unit.path).qkv_proj.out_features == len(expected) == 32
    assert narrow == resized(unit, 2)
    assert narrow.slots[1] == Slot(narrow.slots[0].module, "weight", 0, start=16, block=4, parts=2, stride=8)
    assert narrow == find_units(model)[0]


def test_runs_are_entries_of_a_prefix():
    slots = (Slot("m", "w", 0, start=2, block=3), Slot("m", "w", 0, start=15, block=1, parts=2, stride=5))
    for width in range(5):
        index = entries(slots, 26, 4, torch.arange(width))
        assert torch.equal(index, torch.cat([torch.arange(*run) for run in runs(slots, 26, 4, width)]))
    assert runs(slots, 26, 4, 4) == [(0, 26)]
