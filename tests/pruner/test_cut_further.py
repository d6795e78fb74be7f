"""A pruned model is cut further with its base's pruner: the pieces that it kept are stored, and what is left is planned anew."""

import copy
import filecmp
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lop.errors import CheckpointMismatchError, InvalidInputError, LOPError, UnsupportedModelError
from hf_lop.hub.read.kept import kept_of, read_kept
from hf_lop.hub.read.made import KEPT
from hf_lop.planning.budget import Budget
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.pruner.sizes import pull
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import output_weight, slice_units
from tests.conftest import KINDS
from tests.fake_pruner import fake_pruner
from tests.helpers import logits, random_kept
from tests.small_models import text_batches

FIRST, SECOND = 0.3, 0.5


def same(left, right):
    states = [model.state_dict() for model in (left, right)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def widths(model):
    return [unit.count for unit in find_units(model)]


@pytest.fixture(scope="module")
def pruner(built):
    """One that has a sketch."""
    model, data = built["gated"], text_batches(8, seed=5)
    return LOPPruner.fit(model, data, data[:1], predictor="mlp", base_model="org/base", provenance={"samples": 16})


@pytest.mark.parametrize("kind", KINDS)
def test_in_two_steps_as_in_one(built, kind, tmp_path):
    pruner, once, twice = fake_pruner(built[kind]), *(copy.deepcopy(built[kind]) for _ in range(2))
    pruner.prune(once, SECOND, recover=None)
    pruner.prune(twice, FIRST, recover=None).save_pretrained(tmp_path / "first")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert pruner.prune(twice, SECOND, recover=None) is twice
    assert same(once, twice)
    made = [dict(model.config.pruning_config) for model in (once, twice)]
    assert made[1].pop("cut_before") == {"method": "lop", "recovery": None, "ratio": pytest.approx(FIRST, abs=0.01)}
    assert made[0] == made[1]
    pruner.prune(tmp_path / "first", SECOND, recover=None, output_dir=tmp_path / "streamed")
    twice.save_pretrained(tmp_path / "second")
    files = [path.name for path in (tmp_path / "second").iterdir() if path.is_file() and path.name != "README.md"]
    files.append(KEPT)
    assert filecmp.cmpfiles(tmp_path / "second", tmp_path / "streamed", files, shallow=False)[1:] == ([], [])
    kept = read_kept(tmp_path / "second")["neurons"]
    for pieces, dense, own in zip(kept, find_units(built[kind]), find_units(twice), strict=True):
        assert torch.equal(output_weight(built[kind], dense)[:, pieces], output_weight(twice, own))
    assert (
        "| cut in two steps | first 30.2% of the neurons by `lop` |" in (tmp_path / "second" / "README.md").read_text()
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    assert torch.equal(logits(again), logits(once))


def test_the_stored_pieces_are_those_of_the_dense_model(built, tmp_path):
    model = copy.deepcopy(built["gated"])
    fake_pruner(model).prune(model, FIRST, recover=None).save_pretrained(tmp_path / "out")
    kept = read_kept(tmp_path / "out")["neurons"]
    for layer, pieces in enumerate(kept):
        dense, own = (m.model.layers[layer].mlp for m in (built["gated"], model))
        assert torch.equal(dense.gate_proj.weight[pieces], own.gate_proj.weight)
        assert torch.equal(dense.down_proj.weight[:, pieces], own.down_proj.weight)
    # Copies and parts of a model know it, and a load of fewer layers.
    for part, there in ((copy.deepcopy(model), kept), (model.model, kept)):
        part.save_pretrained(tmp_path / "part")
        assert [torch.equal(*pair) for pair in zip(read_kept(tmp_path / "part")["neurons"], there, strict=True)] == [
            True
        ] * 4
    short = AutoModelForCausalLM.from_pretrained(tmp_path / "out", num_hidden_layers=2)
    short.save_pretrained(tmp_path / "short")
    assert len(read_kept(tmp_path / "short")["neurons"]) == 2


@pytest.mark.parametrize("recover", ["sketch", "fold", "lstsq", "sequential", "auto"])
def test_every_recovery_goes_on(built, pruner, recover):
    model = copy.deepcopy(built["gated"])
    data = text_batches(8, seed=3) if recover not in ("sketch", "fold") else None
    options = {"recover": recover, **({"data": data} if data else {})}
    pruner.prune(model, FIRST, **options)
    pruner.prune(model, SECOND, **options)
    once = pruner.prune(copy.deepcopy(built["gated"]), SECOND, **options)
    assert widths(model) == widths(once)
    bare = pruner.prune(copy.deepcopy(built["gated"]), SECOND, recover=None)
    # Least squares of least squares are those of the whole cut, but for their damping.
    apart, reach = ((logits(m) - logits(once)).norm() for m in (model, bare))
    assert apart < 0.5 * reach


@pytest.mark.parametrize("method", ["uniform", "wanda", "magnitude", "flap"])
def test_baselines_go_on(built, pruner, method):
    model = copy.deepcopy(built["gated"])
    pruner.prune(model, FIRST, recover=None)
    before = kept_of(model)["neurons"]
    pruner.prune(model, SECOND, method=method, recover=None)
    assert sum(widths(model)) == 96
    after = kept_of(model)["neurons"]
    assert all(set(new.tolist()) <= set(old.tolist()) for new, old in zip(after, before, strict=True))


def test_budgets_are_met_and_blocks_kept(built, pruner):
    for budget in (
        {"params": pruner.plan(SECOND).parameters},
        {"memory": pruner.plan(SECOND).memory_after},
        {"ratio": SECOND},
    ):
        for round_to in (1, 8):
            model = pruner.prune(copy.deepcopy(built["gated"]), FIRST, recover=None)
            there = widths(model)
            pruner.prune(model, round_to=round_to, recover=None, **budget)
            plan = pruner.plan(round_to=round_to, **budget)
            assert 0 <= sum(plan.widths) - sum(widths(model)) <= 4 * round_to
            assert model.num_parameters() <= plan.dense.parameters_at(plan.widths)
            assert all(k % round_to == 0 or k == n for k, n in zip(widths(model), there, strict=True))
            assert model.config.pruning_config["dense_parameters"] == plan.dense.parameters


def test_a_cut_made_otherwise_bounds_the_plan(built, pruner):
    model = copy.deepcopy(built["gated"])
    slice_units(model, random_kept(find_units(model), [48, 3, 48, 48]))
    pruner.prune(model, 0.4, recover=None)
    assert widths(model)[1] <= 3
    assert sum(widths(model)) == 115


class TestIdentity:
    def test_answers(self, built, pruner, tmp_path):
        for recover in (None, "sketch"):
            model = copy.deepcopy(built["gated"])
            pruner.prune(model, FIRST, recover=recover).save_pretrained(tmp_path / "out")
            pruner.prune(tmp_path / "out", SECOND, strict=True, output_dir=tmp_path / f"{recover}")
            assert pruner.prune(model, SECOND, strict=True).config.pruning_config["base_match"] == "same"

    def test_a_changed_one_is_near(self, built, pruner):
        model = pruner.prune(copy.deepcopy(built["gated"]), FIRST)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        with pytest.warns(UserWarning, match="are near those of org/base"):
            pruner.prune(model, SECOND)
        assert model.config.pruning_config["base_match"] == "near"

    @pytest.mark.parametrize("place", ["gate_proj", "down_proj"])
    def test_another_one_is_refused(self, built, pruner, place):
        model = pruner.prune(copy.deepcopy(built["gated"]), FIRST, recover=None)
        with torch.no_grad():
            for layer in model.model.layers:
                weight = getattr(layer.mlp, place).weight
                weight.copy_(weight.flip(0))
        with pytest.raises(CheckpointMismatchError, match="those of this model are others"):
            pruner.prune(model, SECOND)


class TestElastic:
    def test_a_size_is_cut_further_by_both_pruners(self, built, tmp_path):
        pruner = fake_pruner(built["gated"])
        pruner.make_elastic(copy.deepcopy(built["gated"])).save_pretrained(tmp_path / "elastic")
        pull(tmp_path / "elastic", tmp_path / "pulled", Budget.of(FIRST), recover=None)
        once = AutoModelForCausalLM.from_pretrained(tmp_path / "elastic", lop_ratio=SECOND, lop_recover=None)
        own = LOPPruner.from_pretrained(tmp_path / "elastic", subfolder="pruner")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "elastic", lop_ratio=FIRST, lop_recover=None)
        made = own.elastic(tmp_path / "elastic")
        made.set_plan(FIRST)
        for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "pulled"), loaded, made.materialize()):
            for by in (own, pruner):
                assert same(by.prune(copy.deepcopy(model), SECOND, recover=None), once)
        with pytest.raises(CheckpointMismatchError, match="sorted, by another order"):
            fake_pruner(built["gated"], seed=1).prune(tmp_path / "pulled", SECOND)

    def test_a_sorted_copy_of_the_dense_model(self, built):
        pruner = fake_pruner(built["gated"])
        elastic = pruner.elastic(copy.deepcopy(built["gated"]))
        elastic.set_plan(FIRST)
        cut = pruner.prune(elastic.materialize(), SECOND, recover=None)
        once = pruner.prune(copy.deepcopy(built["gated"]), SECOND, recover=None)
        assert torch.allclose(logits(cut), logits(once), atol=1e-5)


class TestRefusals:
    @pytest.fixture
    def folder(self, built, pruner, tmp_path):
        pruner.prune(copy.deepcopy(built["gated"]), FIRST, recover=None).save_pretrained(tmp_path / "first")
        return tmp_path / "first"

    @pytest.mark.parametrize(
        ("ratio", "words"), [(0.2, "has lost 30.2% already"), (0.302, "within the budget already")]
    )
    def test_less_than_is_gone(self, pruner, folder, ratio, words):
        with pytest.raises(InvalidInputError, match=words):
            pruner.prune(folder, ratio)
        with pytest.raises(InvalidInputError, match="within the budget already"):
            pruner.prune(folder, params=1e9)

    def test_nobody_knows_what_was_kept(self, pruner, folder, tmp_path):
        shutil.rmtree(folder / "pruning")
        with pytest.raises(
            UnsupportedModelError, match=r"which pieces it kept is not known.*Prune the dense base model"
        ):
            pruner.prune(folder, SECOND)
        # A save of it has no such file either, not even one of an earlier save.
        (tmp_path / "out" / "pruning").mkdir(parents=True)
        (tmp_path / "out" / KEPT).write_bytes(b"of something else")
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out" / KEPT).exists()

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.write_bytes(path.read_bytes()[:-8]),
            lambda path: path.write_bytes(b"{}"),
            lambda path: save(path, lambda kept: kept["neurons"][1].fill_(3)),
            lambda path: save(path, lambda kept: kept["neurons"][1].add_(48)),
            lambda path: save(path, lambda kept: kept["neurons"][1].neg_()),
            lambda path: save(path, lambda kept: kept["neurons"].pop()),
            lambda path: save(path, lambda kept: kept.update(experts=kept.pop("neurons"))),
        ],
    )
    def test_a_damaged_file(self, pruner, folder, damage):
        damage(folder / KEPT)
        with pytest.raises(LOPError, match=r"again|not known"):
            pruner.prune(folder, SECOND)

    @pytest.mark.parametrize("value", ["48", [48, 48], [1, 1, 1, 1], [48.0] * 4])
    def test_dense_widths_that_cannot_be(self, pruner, folder, value):
        config = json.loads((folder / "config.json").read_text())
        config["pruning_config"]["dense_widths"] = value
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointMismatchError, match="says that the dense model had the widths"):
            pruner.prune(folder, SECOND)

    def test_other_uses_still_need_the_dense_model(self, built, pruner, folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for use in (pruner.make_elastic, pruner.elastic, lambda m: LOPPruner.fit(m, text_batches(1), text_batches(1))):
            with pytest.raises(UnsupportedModelError, match="needs the dense base model"):
                use(model)


def save(path, change):
    from hf_lop.hub.read.kept import pack

    kept = read_kept(path.parents[1])
    change(kept)
    path.write_bytes(pack(kept))
