"""Blocks: what widths are multiples of by default, everywhere the same, and never where a budget does not allow it."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_lop.errors import CheckpointMismatchError, InfeasibleBudgetError, InvalidInputError
from hf_lop.hub.cards.pruned import multiples
from hf_lop.learning.probes import probed_width
from hf_lop.planning.blocks import auto_block, halved, read_blocks, resolve, shown
from hf_lop.planning.budget import Budget
from hf_lop.planning.plan import plan_budget
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.units.kinds import find_units
from hf_lop.units.measure import measure_size
from hf_lop.units.views import ElasticModel
from tests.fake_pruner import fake_pruner
from tests.small_models import SMALL, text_batches


@pytest.mark.parametrize(
    ("count", "block"),
    [
        (18944, 64),  # Qwen2.5-VL-7B
        (11008, 64),
        (1536, 32),  # SmolLM2-135M: 24 blocks of 64 would be too coarse
        (4864, 64),
        (8960, 64),
        (2048, 64),
        (2047, 1),
        (1024, 32),
        (512, 16),
        (256, 8),
        (128, 8),  # 16 blocks of 8 are the fewest
        (120, 1),
        (64, 1),
        (10, 1),
    ],
)
def test_the_largest_block_that_leaves_enough(count, block):
    assert auto_block(count) == block


def test_a_hard_step_is_a_factor():
    assert auto_block(2048, step=2) == 64
    assert auto_block(40, step=4) == 4
    assert auto_block(32 * 8 * 3, step=3) == 24


def test_what_is_said():
    assert resolve("auto", [256, 512]) == ((8, 16), ())
    blocks, (note,) = resolve("auto", [256, 100])
    assert blocks == (8, 1)
    assert "round_to is [8, 1], as layers of 100 neurons have no 16 blocks of 8" in note
    assert resolve(1, [256, 100]) == ((1, 1), ())
    assert halved((64, 8, 1)) == (32, 4, 1)
    assert halved((1, 3)) is None
    assert shown((8, 8)) == 8
    assert read_blocks(8, 2) == (8, 8)
    assert read_blocks([8, 1], 2) == (8, 1)
    assert [read_blocks(stored, 2) for stored in ("8", [8], [8, 0], None, [True, 8], {})] == [None] * 6


@pytest.mark.parametrize("round_to", ["8", "Auto", True, 0, 2.5])
def test_what_is_no_block(pruner, round_to):
    with pytest.raises(InvalidInputError, match='it must be "auto" or a positive integer'):
        pruner.plan(0.3, round_to=round_to)


@pytest.fixture(scope="module")
def wide():
    """A model with layers of 256 neurons."""
    config = LlamaConfig(intermediate_size=256, num_key_value_heads=2, **SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def fitted(wide):
    data = text_batches(3)
    return LOPPruner.fit(wide, data[:2], data[2:], predictor="mlp", search="cmaes", evaluations=3, sketch_rows=0)


def whole(widths, block=8):
    return all(width % block == 0 for width in widths)


def test_what_is_searched_is_what_is_cut(wide, monkeypatch):
    seen, set_widths = set(), ElasticModel.set_widths
    monkeypatch.setattr(ElasticModel, "set_widths", lambda self, w: (seen.update(w), set_widths(self, w))[1])
    data = text_batches(3)
    for search in ("additive", "cmaes"):
        options = {"predictor": "mlp", "search": search, "sketch_rows": 0, "targets": [0.2, 0.4], "evaluations": 3}
        made = LOPPruner.fit(wide, data[:2], data[2:], **options)
        rows = made.config.search_table
        assert all(whole(round(256 * (1 - r)) for r in row["ratios"]) for row in rows)
        # Where blocks are alike, probes are noted at the ratios that were measured.
        assert made.config.probes["ratios"] == tuple(1 - probed_width(256, r, 8) / 256 for r in PROBED)
    assert whole(seen)
    assert len(seen) > 10
    one = LOPPruner.fit(wide, data[:2], data[2:], predictor="mlp", sketch_rows=0, round_to=1)
    assert (one.config.round_to, one.config.probes["ratios"][-1]) == (1, 0.95)
    assert not whole(one.plan(0.31).widths)


PROBED = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.95)


def test_every_path_takes_the_blocks_of_the_pruner(wide, fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "pruner")
    loaded = LOPPruner.from_pretrained(tmp_path / "pruner")
    assert loaded.config.round_to == 8
    wide.save_pretrained(tmp_path / "dense")
    made = [
        loaded.prune(copy.deepcopy(wide), 0.3),
        loaded.prune(copy.deepcopy(wide), 0.3, method="wanda", recover=None),
        loaded.prune(tmp_path / "dense", 0.3, output_dir=tmp_path / "streamed"),
    ]
    loaded.make_elastic(copy.deepcopy(wide)).save_pretrained(tmp_path / "elastic")
    made.append(AutoModelForCausalLM.from_pretrained(tmp_path / "elastic", lop_ratio=0.3))
    elastic = loaded.elastic(copy.deepcopy(wide))
    elastic.set_plan(0.3)
    made.append(elastic.materialize())
    for model in made:
        assert whole(unit.count for unit in find_units(model))
        assert model.config.pruning_config["round_to"] == 8
    assert loaded.plan(0.3).widths == loaded.plan(0.3, round_to=8).widths
    assert "widths are multiples of 8" in str(loaded.plan(0.3))
    assert "widths are multiples of 8;" not in (tmp_path / "streamed" / "README.md").read_text()
    assert "widths are multiples of 8." in (tmp_path / "streamed" / "README.md").read_text()
    odd = loaded.prune(copy.deepcopy(wide), 0.31, round_to=1)
    assert odd.config.pruning_config["round_to"] == 1
    assert sum(unit.count for unit in find_units(odd)) == int(1024 * 0.69)


class TestOlderPruners:
    def test_they_get_blocks_and_say_so(self, wide):
        old = fake_pruner(wide)
        assert old.config.round_to is None
        with pytest.warns(UserWarning, match="round_to is 8 now. round_to=1 gives the plans of before"):
            assert whole(old.plan(0.31).widths)
        assert not whole(old.plan(0.31, round_to=1).widths)

    def test_an_elastic_repository_keeps_single_neurons(self, wide, tmp_path):
        old = fake_pruner(wide)
        old.make_elastic(copy.deepcopy(wide)).save_pretrained(tmp_path / "new")
        assert json.loads((tmp_path / "new" / "pruner" / "config.json").read_text())["round_to"] == 8
        config = json.loads((tmp_path / "new" / "pruner" / "config.json").read_text())
        del config["round_to"]
        (tmp_path / "new" / "pruner" / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", lop_ratio=0.31)
        assert list(model.config.intermediate_size) == list(old.plan(0.31, round_to=1).widths)

    @pytest.mark.parametrize("stored", ["8", [8], 0, [8, 8, 8, "8"]])
    def test_damaged(self, fitted, tmp_path, stored):
        fitted.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "round_to": stored}))
        with pytest.raises(CheckpointMismatchError, match=r"round_to is|damaged"):
            LOPPruner.from_pretrained(tmp_path).plan(0.3)


def test_blocks_are_halved_where_a_budget_needs_it(wide, fitted):
    plan = fitted.plan(0.98)
    assert plan.notes == ("round_to is 4 instead of 8, since the budget allows no larger blocks.",)
    assert whole(plan.widths, 4)
    assert plan.notes[0] in str(plan)
    assert fitted.plan(0.3).notes == ()
    with pytest.warns(UserWarning, match="round_to is 4 instead of 8"):
        fitted.prune(copy.deepcopy(wide), 0.98, recover=None)
    least = fitted.plan(0.99, round_to=1).parameters
    assert fitted.plan(params=least).parameters <= least
    with pytest.raises(InfeasibleBudgetError, match="one block of 8 in every layer"):
        fitted.plan(0.98, round_to=8)


def test_a_layer_kept_whole_is_named():
    model = AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=260, num_key_value_heads=2, **SMALL))
    size = measure_size(model, find_units(model))
    plan = plan_budget(lambda _: np.array([0.0, 0.2, 0.2, 0.2]), size, Budget.of(0.15, round_to=8))
    assert (plan.kept_whole, plan.widths[0]) == ((0,), 260)
    assert "but for layers kept whole: 0" in str(plan)
    assert multiples({"round_to": 8}, size.widths, plan.widths) == "8, but for layer 0, kept whole"
    assert multiples({"round_to": [8, 1]}, (16, 5), (16, 3)) == "8 or 1"
    assert multiples({"round_to": 1}, (16, 5), (16, 3)) is None
