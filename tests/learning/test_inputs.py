"""What models and batches can be given to a fit, a recovery and a search: each works, or is refused with a sentence."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.hub.save import extras
from hf_lop.learning.rewards import Reward
from hf_lop.learning.statistics import collect_statistics
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.recovery.moments import second_moments
from hf_lop.units.slice import prunable_units
from tests.conftest import slow
from tests.fake_pruner import fake_pruner
from tests.helpers import logits, orders
from tests.small_models import text_batches


def with_mask(shape):
    """Batches whose mask has one entry for each pair of tokens: every token sees those before it."""
    pairs = torch.ones(10, 10).tril().bool().expand(shape)
    return [{"input_ids": batch["input_ids"], "attention_mask": pairs} for batch in text_batches(3)]


def embedded(model, **others):
    """The same batches as embeddings of tokens that nobody knows."""
    with torch.no_grad():
        return [
            {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]), **others} for batch in text_batches(3)
        ]


class TestMasksOfPairs:
    @pytest.mark.parametrize("shape", [(2, 1, 10, 10), (2, 10, 10)])
    def test_fit(self, llama, shape):
        with pytest.raises(InvalidInputError, match=r"attention_mask is \[2, .*\]\. Which tokens are padding"):
            LOPPruner.fit(llama, with_mask(shape), text_batches(1), predictor="mlp")
        with pytest.raises(InvalidInputError, match=r"attention_mask is \[2, "):
            LOPPruner.fit(llama, text_batches(1), with_mask(shape), predictor="mlp")

    def test_a_mask_for_every_kind_of_layer(self, llama):
        batches = [{**batch, "attention_mask": {"full_attention": None}} for batch in text_batches(1)]
        with pytest.raises(InvalidInputError, match="attention_mask is dict"):
            collect_statistics(llama, batches)

    @pytest.mark.parametrize("recover", ["auto", "lstsq", "sequential"])
    def test_recovery(self, llama, recover):
        pruner, before = fake_pruner(llama), logits(llama)
        with pytest.raises(InvalidInputError, match="mask of tokens"):
            pruner.prune(llama, 0.4, data=with_mask((2, 1, 10, 10)), recover=recover)
        assert torch.equal(logits(llama), before)

    def test_search(self, llama):
        with pytest.raises(InvalidInputError, match="mask of tokens"):
            Reward.on(llama, orders(llama), with_mask((2, 1, 10, 10)))


class TestEmbeddings:
    def test_statistics_and_moments_are_those_of_the_tokens(self, llama):
        for ours, theirs in zip(
            collect_statistics(llama, embedded(llama)), collect_statistics(llama, text_batches(3)), strict=True
        ):
            assert torch.equal(ours.square, theirs.square)
        units = prunable_units(llama)
        for ours, theirs in zip(
            second_moments(llama, embedded(llama), units), second_moments(llama, text_batches(3), units), strict=True
        ):
            torch.testing.assert_close(ours, theirs)

    def test_divergence_is_that_of_the_tokens(self, llama):
        found, wanted = (Reward.on(llama, orders(llama), batches) for batches in (embedded(llama), text_batches(3)))
        assert found([48, 40, 30, 20]).value == pytest.approx(wanted([48, 40, 30, 20]).value, rel=1e-4)

    def test_labels_say_what_is_to_be_predicted(self, llama):
        labels = text_batches(3)[0]["input_ids"]
        batches = embedded(llama, labels=labels)
        tokens = [{**batch, "labels": labels} for batch in text_batches(3)]
        found, wanted = (Reward.on(llama, orders(llama), given, "perplexity") for given in (batches, tokens))
        assert found([48, 40, 30, 20]).value == pytest.approx(wanted([48, 40, 30, 20]).value, rel=1e-4)

    @pytest.mark.parametrize("kind", ["perplexity", "log_likelihood"])
    def test_rewards_that_need_to_know_tokens_say_so(self, llama, kind):
        with pytest.raises(InvalidInputError, match=r"known target|labels"):
            Reward.on(llama, orders(llama), embedded(llama), kind)

    @pytest.mark.parametrize("recover", ["sequential", *slow("lstsq", "auto")])
    def test_fit_and_prune(self, llama, recover):
        data = embedded(llama)
        pruner = LOPPruner.fit(llama, data[:2], data[2:], predictor="mlp")
        same = copy.deepcopy(llama)
        pruner.prune(llama, 0.3, data=data, recover=recover)
        pruner.prune(same, 0.3, data=text_batches(3), recover=recover)
        torch.testing.assert_close(logits(llama), logits(same), rtol=1e-3, atol=1e-3)

    def test_neither(self, llama):
        batches = [{"attention_mask": torch.ones(2, 10)}]
        with pytest.raises(InvalidInputError, match="needs input_ids or inputs_embeds"):
            Reward.on(llama, orders(llama), batches)


class TestWeightsOfEightBits:
    @pytest.fixture
    def small(self, llama):
        pruner = fake_pruner(llama)
        for layer in llama.model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                projection.weight = nn.Parameter(
                    projection.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
                )
        return llama, pruner

    @pytest.mark.parametrize("recover", ["auto", "sketch", "fold"])
    def test_a_recovery_is_refused_before_the_cut(self, small, recover):
        model, pruner = small
        with pytest.raises(UnsupportedModelError, match=r"down_proj are torch\.float8_e4m3fn; .*recover=None"):
            pruner.prune(model, 0.4, recover=recover)
        assert model.config.intermediate_size == 48
        assert model.model.layers[0].mlp.up_proj.weight.shape == (48, 32)

    def test_from_file_to_file(self, small, tmp_path):
        """They are loaded in the dtype that the config names, in memory and from file to file."""
        model, pruner = small
        model.save_pretrained(tmp_path / "base")
        pruner.prune(tmp_path / "base", 0.4, output_dir=tmp_path / "out")
        found = LlamaForCausalLM.from_pretrained(tmp_path / "out")
        assert found.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
        assert torch.equal(logits(found), logits(pruner.prune(tmp_path / "base", 0.4)))

    def test_the_cut_alone_is_exact(self, small):
        model, pruner = small
        before = [layer.mlp.up_proj.weight.float() for layer in model.model.layers]
        pruner.prune(model, 0.4, recover=None)
        for layer, (dense, neurons) in enumerate(zip(before, pruner.learned().order, strict=True)):
            weight = model.model.layers[layer].mlp.up_proj.weight
            assert weight.dtype == torch.float8_e4m3fn
            assert torch.equal(weight.float(), dense[neurons[: len(weight)].sort().values])


@pytest.mark.parametrize("part", ["gate_proj", "down_proj"])
class TestWeightsThatAreNoNumbers:
    @pytest.fixture
    def bad(self, llama, part):
        pruner = fake_pruner(llama)
        with torch.no_grad():
            getattr(llama.model.layers[2].mlp, part).weight[5, 7] = float("nan")
        return llama, pruner

    @pytest.mark.parametrize("recover", ["auto", None])
    def test_prune_names_the_weight(self, bad, part, recover):
        model, pruner = bad
        with pytest.raises(UnsupportedModelError, match=rf"weight model\.layers\.2\.mlp\.{part}\.weight holds NaN"):
            pruner.prune(model, 0.4, recover=recover)
        assert model.config.intermediate_size == 48

    def test_fit_names_the_weight(self, bad, part):
        words = rf"not finite, as the model's weight model\.layers\.2\.mlp\.{part}\.weight holds NaN"
        with pytest.raises(InvalidInputError, match=words):
            LOPPruner.fit(bad[0], text_batches(1), text_batches(1, seed=1), predictor="mlp")

    def test_from_file_to_file(self, bad, part, tmp_path):
        model, pruner = bad
        model.save_pretrained(tmp_path / "base")
        with pytest.raises(UnsupportedModelError, match=rf"model\.layers\.2\.mlp\.{part}\.weight"):
            pruner.prune(tmp_path / "base", 0.4, output_dir=tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrapper", [nn.DataParallel])
def test_a_wrapper_for_several_devices(llama, wrapper):
    wrapped = wrapper(llama)
    for work in (
        lambda: LOPPruner.fit(wrapped, text_batches(1), text_batches(1), predictor="mlp"),
        lambda: collect_statistics(wrapped, text_batches(1)),
        lambda: fake_pruner(llama).make_elastic(wrapped),
        lambda: fake_pruner(llama).prune(wrapped, 0.3),
    ):
        with pytest.raises(InvalidInputError, match=r"is a DataParallel around a model\. .*model\.module"):
            work()
    assert extras.pruned_widths(llama) is None
