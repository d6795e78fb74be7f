"""A pruner knows the weights that it was made of: the same, near ones, or others."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_lop.errors import CheckpointMismatchError
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.units.identity import compare, sample_weights
from hf_lop.units.slice import prunable_units
from hf_lop.units.unit import take
from tests.conftest import KINDS
from tests.fake_pruner import fake_pruner
from tests.small_models import build as build_shared
from tests.small_models import text_batches


def build(kind):
    """A model with a config of its own: pruning writes into it."""
    model = build_shared(kind)
    return copy.deepcopy(model)


def round_trip(model, bits=4, group=16):
    """What quantising all projections by groups of a row, and back, leaves."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            rows = parameter.data.reshape(-1, group)
            step = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            parameter.data = ((rows / step).round() * step).reshape(parameter.shape)


def tuned(model, modules):
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=modules, init_lora_weights=False))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.1
    return lora.merge_and_unload()


def one_step(model):
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = text_batches(1)[0]["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    return model


def permuted(model):
    for unit in prunable_units(model):
        take(model, unit, torch.randperm(unit.count, generator=torch.Generator().manual_seed(5)))
    return model


def changed_seed(model):
    with torch.random.fork_rng():
        torch.manual_seed(9)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


CHANGES = {
    "nothing": (lambda model: model, "same"),
    "bfloat16": (lambda model: model.bfloat16(), "same"),
    "float16": (lambda model: model.half(), "same"),
    "4 bits": (lambda model: round_trip(model) or model, "near"),
    "attention tuned": (lambda model: tuned(model, ["q_proj", "v_proj"]), "near"),
    "FFNs tuned": (lambda model: tuned(model, ["up_proj", "down_proj"]), "near"),
    "one step": (one_step, "near"),
    "permuted": (permuted, "other"),
    "another seed": (changed_seed, "other"),
}


@pytest.fixture(scope="module")
def own():
    return LOPPruner.fit(
        build("gated"), text_batches(2), text_batches(1, seed=1), predictor="mlp", base_model="org/base"
    )


@pytest.mark.parametrize("change", CHANGES)
def test_three_answers(own, change):
    make, answer = CHANGES[change]
    model = make(build("gated"))
    if answer == "other":
        with pytest.raises(
            CheckpointMismatchError, match="made of the weights of org/base; those of this model are others"
        ):
            own.prune(model, 0.4)
        assert model.config.intermediate_size == 48
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        strictly = copy.deepcopy(model)
        assert own.prune(model, 0.4).config.pruning_config["base_match"] == answer
    assert any("near those of org/base" in str(warning.message) for warning in said) == (answer == "near")
    if answer == "near":
        with pytest.raises(CheckpointMismatchError, match=r"near .* not the same, and strict"):
            own.prune(strictly, 0.4, strict=True)
    else:
        own.prune(strictly, 0.4, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_know_themselves(kind):
    model = build(kind)
    stored = sample_weights(model)
    assert stored.dtype == torch.int16
    assert compare(stored, build(kind))[0] == "same"
    assert compare(stored, changed_seed(model))[0] == "other"


def test_it_is_saved_and_a_card_says_near(own, tmp_path):
    own.save_pretrained(tmp_path / "pruner")
    loaded = LOPPruner.from_pretrained(tmp_path / "pruner")
    assert torch.equal(loaded.identity, own.identity)
    with pytest.warns(UserWarning, match="near those of org/base"):
        loaded.prune(one_step(build("gated")), 0.4).save_pretrained(tmp_path / "near")
    assert "near those that the pruner was made of" in (tmp_path / "near/README.md").read_text()


def test_from_file_to_file(own, tmp_path):
    build("gated").save_pretrained(tmp_path / "base")
    own.prune(tmp_path / "base", 0.4, recover=None, output_dir=tmp_path / "out", strict=True)
    changed_seed(build("gated")).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointMismatchError, match="are others"):
        own.prune(tmp_path / "other", 0.4, recover=None, output_dir=tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_an_elastic_repository_knows_its_sorted_weights(own, tmp_path):
    with pytest.raises(CheckpointMismatchError, match="are others"):
        own.make_elastic(changed_seed(build("gated")))
    own.make_elastic(build("gated")).save_pretrained(tmp_path / "elastic")
    inside, model = (
        LOPPruner.from_pretrained(tmp_path / "elastic"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "elastic"),
    )
    assert inside.prune(copy.deepcopy(model), 0.4, strict=True).config.pruning_config["base_match"] == "same"
    assert own.prune(copy.deepcopy(model), 0.4).config.pruning_config["base_match"] == "unknown"
    elastic = inside.elastic(model)
    elastic.set_plan(inside.plan(0.5))
    assert elastic.materialize().config.pruning_config["base_match"] == "same"


def test_weights_count_for_more_than_the_commit_that_they_were_loaded_from(own):
    """A model may have been trained since; only where weights cannot be compared the commit says what it is."""
    pruner = copy.deepcopy(own)
    pruner.config.base_revision = "1" * 40
    for make, seen in ((one_step, "near"), (changed_seed, None)):
        model = make(build("gated"))
        model.name_or_path, model.config._commit_hash = "org/base", "1" * 40
        if seen is None:
            with pytest.raises(CheckpointMismatchError, match="those of this model are others"):
                pruner.prune(model, 0.4)
        else:
            with pytest.warns(UserWarning, match="are near those of org/base"):
                assert pruner.prune(model, 0.4).config.pruning_config["base_match"] == seen
    without = fake_pruner(model)
    without.config.base_model, without.config.base_revision = "org/base", "1" * 40
    assert without.prune(model, 0.4, strict=True).config.pruning_config["base_match"] == "same"


def test_another_commit_is_no_matter_where_weights_agree(own):
    pruner, model = copy.deepcopy(own), build("gated")
    pruner.config.base_revision = "1" * 40
    model.name_or_path, model.config._commit_hash = "org/base", "2" * 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pruner.prune(model, 0.4, strict=True).config.pruning_config["base_match"] == "same"


def test_a_pruner_without_a_fingerprint_still_works(llama):
    with pytest.raises(CheckpointMismatchError, match="cannot be told, and strict"):
        fake_pruner(llama).prune(llama, 0.4, strict=True)
    assert fake_pruner(llama).prune(llama, 0.4).config.pruning_config["base_match"] == "unknown"
