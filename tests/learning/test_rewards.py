"""Rewards against slow references on really pruned models, and single-layer probes against masked models."""

import math

import numpy as np
import pytest
import torch

from hf_lop.errors import InvalidInputError
from hf_lop.learning.bench import Bench
from hf_lop.learning.decoder.replay import record_batches
from hf_lop.learning.divergence import TOP, DenseTop
from hf_lop.learning.probes import probe_layers
from hf_lop.learning.rewards import REWARDS, Reward, Score, reward_name, scorer
from hf_lop.units.slice import masking, prunable_units
from hf_lop.units.views import ElasticModel
from tests.conftest import slow
from tests.families import build, text_inputs
from tests.helpers import cut, orders
from tests.small_models import text_batches
from tests.tiny_models import tiny_inputs, tiny_model

WIDTHS = [48, 31, 17, 5]


def answered(batches, seed=5):
    """Two to four labelled tokens at the end of every sample."""
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        labels = torch.full_like(batch["input_ids"], -100)
        for sample in range(len(labels)):
            count = int(torch.randint(2, 5, (1,), generator=generator))
            labels[sample, -count:] = batch["input_ids"][sample, -count:]
        batch["labels"] = labels
    return batches


@torch.no_grad()
def by_hand(kind, dense, pruned, batches):
    """Value and standard error in plain Python and float64, sample by sample."""
    sums, weights = [], []
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        log_p = dense(**inputs).logits.double().log_softmax(-1)
        log_q = pruned(**inputs).logits.double().log_softmax(-1)
        for s, ids in enumerate(batch["input_ids"]):
            values = []
            for t in range(len(ids)):
                if "labels" in batch:
                    counts = t + 1 < len(ids) and int(batch["labels"][s, t + 1]) != -100
                else:
                    counts = bool(batch["attention_mask"][s, t]) and (kind == "divergence" or t + 1 < len(ids))
                if not counts:
                    continue
                if kind == "divergence":
                    values.append(-float((log_p[s, t].exp() * (log_p[s, t] - log_q[s, t])).sum()))
                elif kind == "accuracy":
                    values.append(float(log_q[s, t].argmax() == ids[t + 1]))
                else:
                    values.append(float(log_q[s, t, ids[t + 1]]))
            if values:
                sums.append(min(values) if kind == "accuracy" else sum(values))
                weights.append(len(values) if kind in ("divergence", "perplexity") else 1)
    value = sum(sums) / sum(weights)
    spread = sum((a - value * w) ** 2 for a, w in zip(sums, weights, strict=True))
    return value, math.sqrt(spread * len(sums) / (len(sums) - 1)) / sum(weights)


@pytest.mark.parametrize("padded", [*slow(False), True])
@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("kind", REWARDS)
def test_rewards_are_what_their_formulas_say(llama, kind, answers, padded):
    batches = text_batches(3, padded=padded)
    if answers:
        batches = answered(batches)
    elif REWARDS[kind].needs_labels:
        with pytest.raises(InvalidInputError, match="no labels"):
            Reward.on(llama, orders(llama), batches, kind)
        return
    reward = Reward.on(llama, orders(llama), batches, kind)
    for widths in (WIDTHS, [48] * 4, [1] * 4):
        score = reward(widths)
        value, error = by_hand(kind, llama, cut(llama, orders(llama), widths), batches)
        assert score.value == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert score.standard_error == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert score.samples == 6
        assert reward(widths) == score


def test_answers_that_the_model_gives_are_accurate(llama):
    """Label the model's own greedy answers: dense accuracy 1, and one wrong token spoils its sample."""
    batches = text_batches(2)
    with torch.no_grad():
        for batch in batches:
            labels = torch.full_like(batch["input_ids"], -100)
            labels[:, 5:] = llama(batch["input_ids"]).logits.argmax(-1)[:, 4:-1]
            batch["labels"] = labels
    reward = Reward.on(llama, orders(llama), batches, "accuracy")
    assert reward([48] * 4).value == 1
    assert reward([48] * 4).standard_error == 0
    batches[0]["labels"][1, 7] += 1
    assert Reward.on(llama, orders(llama), batches, "accuracy")([48] * 4).value == 0.75


def test_the_dense_model_diverges_by_nothing(llama):
    score = Reward.on(llama, orders(llama), text_batches(2))([48] * 4)
    assert score.value == pytest.approx(0, abs=1e-7)


def test_rewards_share_an_elastic_model_and_its_records(llama):
    elastic = ElasticModel(llama, orders(llama))
    recorded = record_batches(elastic.model, answered(text_batches(2)))
    elastic.set_widths(WIDTHS)  # whatever it is set to, the dense predictions are the dense model's
    shared = {kind: Reward(elastic, recorded, kind) for kind in REWARDS}
    for kind, reward in shared.items():
        assert reward(WIDTHS) == Reward.on(llama, orders(llama), answered(text_batches(2)), kind)(WIDTHS)


def test_a_callable_sees_the_model_that_pruning_gives(llama):
    """It may run and generate with the candidate, which must answer as a model that was really cut."""
    batch, seen = text_batches(1)[0], []

    def judge(candidate):
        assert type(candidate) is type(llama)
        assert not candidate.training
        tokens = candidate.generate(**batch, max_new_tokens=4, do_sample=False)
        seen.append((tokens, candidate(**batch).logits))
        return Score(float(len(seen)), 0.5, 2) if len(seen) > 1 else torch.tensor(0.25)

    before = {name: value.clone() for name, value in llama.state_dict().items()}
    score = scorer(Bench(llama, orders(llama), []), judge)
    assert score(WIDTHS).value == 0.25
    assert score([48] * 4) == Score(2.0, 0.5, 2)
    for (tokens, logits), widths in zip(seen, (WIDTHS, [48] * 4), strict=True):
        pruned = cut(llama, orders(llama), widths)
        assert torch.equal(tokens, pruned.generate(**batch, max_new_tokens=4, do_sample=False))
        torch.testing.assert_close(logits, pruned(**batch).logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_callables_have_a_name_and_return_a_number(llama):
    def judge(candidate):
        return "good"

    assert reward_name(judge) == "judge"
    judge.name = "task"
    assert reward_name(judge) == "task"
    with pytest.raises(InvalidInputError, match="task returned a str"):
        scorer(Bench(llama, orders(llama), []), judge)(WIDTHS)
    for nameless in (lambda candidate: 0.0, type("Judge", (), {"__call__": lambda *_: 0.0})()):
        with pytest.raises(InvalidInputError, match="no name"):
            reward_name(nameless)
    judge.name = "accuracy"  # would pass for the built-in one
    with pytest.raises(InvalidInputError, match="no name of its own"):
        reward_name(judge)


def test_a_family_with_images_and_one_with_a_head(llama):
    for model, batch in ((tiny_model("qwen3_vl"), tiny_inputs("qwen3_vl")), (build("gemma2"), None)):
        batches = [batch or text_inputs(model)] * 2
        order = orders(model)
        widths = [len(indices) // 3 for indices in order]
        value, _ = by_hand("divergence", model, cut(model, order, widths), batches)
        assert Reward.on(model, order, batches)(widths).value == pytest.approx(value, rel=1e-4)


def test_the_vision_tower_runs_once_per_batch():
    model, calls = tiny_model("qwen2_5_vl"), []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    reward = Reward.on(model, orders(model), [tiny_inputs("qwen2_5_vl", seed) for seed in range(3)])
    for width in (96, 40, 3):
        reward([width] * 4)
    probe_layers(Bench(model, orders(model), [tiny_inputs("qwen2_5_vl")]), [0.5, 1.0])
    assert len(calls) == 3 + 1


def test_a_single_sample_has_no_standard_error(llama):
    batch = {key: value[:1] for key, value in text_batches(1)[0].items()}
    assert math.isnan(Reward.on(llama, orders(llama), [batch])(WIDTHS).standard_error)


def test_unknown_kinds_and_targets_are_refused(llama):
    with pytest.raises(InvalidInputError, match="log_likelihood, accuracy"):
        Reward.on(llama, orders(llama), text_batches(1), "bleu")
    with pytest.raises(InvalidInputError, match="two tokens"):
        Reward.on(llama, orders(llama), [{"input_ids": torch.tensor([[5]])}], "perplexity")


def test_the_divergence_is_exact_in_the_head_and_a_bound_in_the_tail():
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (3 * torch.randn(2, 20, 4 * TOP, generator=generator)).log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum(1)
    found = DenseTop.of(log_p).divergence(log_q)
    assert (found <= exact + 1e-5).all()
    assert (found > 0.9 * exact).all()
    small_p, small_q = log_p[:, :TOP].log_softmax(-1), log_q[:, :TOP].log_softmax(-1)
    exact = (small_p.exp() * (small_p - small_q)).sum(1)
    torch.testing.assert_close(DenseTop.of(small_p).divergence(small_q), exact, rtol=1e-5, atol=1e-6)


def test_the_divergence_of_certain_predictions_is_finite():
    log_p = torch.full((1, 2 * TOP), -200.0)
    log_p[0, 3] = 0.0
    assert DenseTop.of(log_p).divergence(log_p).item() == pytest.approx(0, abs=1e-6)
    forbidden = torch.full((1, 8), -math.inf)
    forbidden[0, :2] = math.log(0.5)
    assert DenseTop.of(forbidden).divergence(forbidden).item() == 0


@torch.no_grad()
def slow_probes(model, units, order, batches, ratios, context=0.0):
    total, count = np.zeros((len(units), len(ratios))), 0

    def kept(layer, ratio):
        return order[layer][: max(1, round(units[layer].count * (1 - ratio)))]

    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        where = batch["attention_mask"].bool()
        if "labels" in batch:
            where = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
        log_p = model(**inputs, use_cache=False).logits[where].double().log_softmax(-1)
        count += len(log_p)
        for layer in range(len(units)):
            for sign, column, ratio in [(1, c, r) for c, r in enumerate(ratios)] + [(-1, slice(None), 0.0)]:
                plan = [kept(other, ratio if other == layer else context) for other in range(len(units))]
                with masking(model, units, plan):
                    log_q = model(**inputs, use_cache=False).logits[where].double().log_softmax(-1)
                total[layer, column] += sign * float((log_p.exp() * (log_p - log_q)).sum())
    return total / count


@pytest.mark.parametrize("answers", [True, *slow(False)])
@pytest.mark.parametrize("name", ["llama", *slow("qwen3_vl", "gemma3")])
def test_probes_equal_masked_models(name, answers):
    model = tiny_model(name)
    batches = [tiny_inputs(name, seed) for seed in range(2)]
    batches = answered(batches) if answers else batches
    units, ratios = prunable_units(model), [0.3, 0.7, 1.0]
    found = probe_layers(Bench(model, orders(model), batches), ratios, (0.0, 0.5))
    for context, table in zip((0.0, 0.5), found, strict=True):
        slow = slow_probes(model, units, orders(model), batches, ratios, context)
        np.testing.assert_allclose(table, slow, rtol=1e-3, atol=1e-6)


def test_probes_start_at_their_layer(llama):
    ran = []
    for index, layer in enumerate(llama.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=index: ran.append(i))
    probe_layers(Bench(llama, orders(llama), text_batches(1)), [0.5] * 10)
    counts = [ran.count(index) for index in range(4)]
    assert counts[3] - counts[0] == 10 * 3 + 2  # ten probes of each later layer, and two checks


def test_probes_of_layers_that_cannot_be_skipped(llama):
    notes = {}
    llama.model.layers[0].mlp.register_forward_hook(lambda m, a, out: notes.update(x=out))
    llama.model.layers[3].mlp.register_forward_hook(lambda m, a, out: out + notes.pop("x"))
    units, batches = prunable_units(llama), text_batches(1)
    found = probe_layers(Bench(llama, orders(llama), batches), [0.5], (0.0, 0.5))[1]
    np.testing.assert_allclose(
        found, slow_probes(llama, units, orders(llama), batches, [0.5], 0.5), rtol=1e-3, atol=1e-6
    )
