import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel, MixtralConfig, MixtralForCausalLM

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.learning.importance import CRITERIA, neuron_order, unit_importance
from hf_lop.learning.statistics import collect_statistics
from hf_lop.units.configs import layer_widths, text_configs
from hf_lop.units.kinds import find_units
from hf_lop.units.measure import measure_size
from hf_lop.units.slice import masking, output_weight, prunable_units, slice_units
from tests.helpers import logits, random_kept
from tests.small_models import CONFIGS, SMALL, text_batches

WIDTHS = [48, 20, 7, 31]


@pytest.mark.parametrize("kind", CONFIGS)
class TestEveryKindOfFFN:
    def test_one_per_layer_with_its_width(self, built, kind):
        units = find_units(built[kind])
        assert [f.count for f in units] == [48] * 4
        assert all((f.slots[0].parts == 2) == (kind == "fused") for f in units)
        assert {len(f.modules(built[kind])[0]) for f in units} == {2 if kind.startswith("gated") else 1}

    def test_pruned_equals_masked_dense_model(self, built, batches, kind):
        model = copy.deepcopy(built[kind])
        units = find_units(model)
        kept = random_kept(units, WIDTHS)
        with masking(model, units, kept):
            masked = logits(model, batches[0])
        assert torch.equal(logits(model, batches[0]), logits(built[kind], batches[0]))  # the mask is gone again
        slice_units(model, kept)
        torch.testing.assert_close(logits(model, batches[0]), masked, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(masked, logits(built[kind], batches[0]), atol=1e-2)  # the cut neurons mattered
        assert layer_widths(text_configs(model)[0]) == WIDTHS
        assert [f.count for f in find_units(model)] == WIDTHS

    def test_save_and_reload_is_exact(self, built, batches, kind, tmp_path):
        model = copy.deepcopy(built[kind])
        slice_units(model, random_kept(find_units(model), WIDTHS))
        model.save_pretrained(tmp_path)
        reloaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(logits(reloaded, batches[0]), logits(model, batches[0]))

    def test_keeping_everything_changes_nothing(self, built, batches, kind):
        model = copy.deepcopy(built[kind])
        weights = [p.data_ptr() for p in model.parameters()]
        slice_units(model, [torch.arange(48)] * 4)
        assert [p.data_ptr() for p in model.parameters()] == weights
        assert torch.equal(logits(model, batches[0]), logits(built[kind], batches[0]))


def test_kept_neurons_stay_in_original_order(built, llama):
    slice_units(llama, [torch.tensor([40, 3, 17])] * 4)
    for layer, dense in zip(llama.model.layers, built["gated"].model.layers, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, dense.mlp.up_proj.weight[[3, 17, 40]])
        assert torch.equal(layer.mlp.down_proj.weight, dense.mlp.down_proj.weight[:, [3, 17, 40]])
        assert (layer.mlp.gate_proj.out_features, layer.mlp.down_proj.in_features) == (3, 3)


def test_dtype_device_class_and_gradients_stay(llama):
    model = llama.to(torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    slice_units(model, [torch.arange(8)] * 4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[0].mlp.gate_proj.weight.requires_grad


class TestRefused:
    def check(self, model, pattern):
        before = {k: v.clone() for k, v in model.state_dict().items() if not v.is_meta}
        with pytest.raises(UnsupportedModelError, match=pattern):
            slice_units(model, [torch.arange(4)] * 4)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in before)

    def test_mixture_of_experts(self):
        config = MixtralConfig(intermediate_size=48, num_key_value_heads=2, num_local_experts=2, **SMALL)
        self.check(MixtralForCausalLM(config), "mixture of experts")

    def test_already_pruned(self, llama):
        slice_units(llama, [torch.arange(9)] * 4)
        self.check(llama, "already pruned")

    def test_meta_device(self, llama):
        self.check(llama.to("meta"), "not in memory")

    def test_quantised(self, llama):
        llama.config.quantization_config = {"quant_method": "bitsandbytes"}
        self.check(llama, "quantised")

    def test_torchao_weights(self, llama):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(llama, Int8WeightOnlyConfig())
        with pytest.raises(UnsupportedModelError, match="cannot be cut by neuron"):
            prunable_units(llama)

    def test_per_neuron_parameters(self, llama):
        llama.model.layers[2].mlp.inner_norm = nn.LayerNorm(48)
        self.check(llama, r"layer 2 has per-neuron parameters")

    @pytest.mark.parametrize("kept", [[[0]] * 3, [[0], [0], [], [0]], [[0], [0], [48], [0]], [[0], [0], [1, 1], [0]]])
    def test_bad_indices(self, llama, kept):
        with pytest.raises(InvalidInputError):
            slice_units(llama, kept)
        assert [f.count for f in find_units(llama)] == [48] * 4
        assert llama.config.intermediate_size == 48


def test_a_bert_style_model_is_pruned_or_refused_by_name():
    config = BertConfig(intermediate_size=48, is_decoder=True, **SMALL)
    try:
        assert len(find_units(BertLMHeadModel(config))) == 4
    except UnsupportedModelError as error:
        assert "Bert" in str(error)  # noqa: PT017


def reference_activations(model, units, batches):
    """Each layer's activations as one `[T, n]` array per sample, without padding: the slow way."""
    samples = [[] for _ in units]
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            for store, unit in zip(samples, units, strict=True):
                unit.modules(model)[1].register_forward_pre_hook(
                    lambda _m, args, store=store, row=row, mask=batch["attention_mask"]: store.append(
                        args[0][row][mask[row].bool()].double()
                    )
                )
            with torch.inference_mode():
                model(**batch)
            for unit in units:
                unit.modules(model)[1]._forward_pre_hooks.clear()
    return samples


def test_statistics_and_scores_equal_the_formulas(llama):
    batches = text_batches(3, padded=True)
    units = find_units(llama)
    statistics = collect_statistics(llama, batches, units)
    samples = reference_activations(llama, units, batches)
    scores = {name: unit_importance(llama, units, name, statistics) for name in CRITERIA}
    for layer, xs in enumerate(samples):
        count = len(xs)
        assert count == 6
        weight = output_weight(llama, units[layer]).double()
        mean = sum(x.mean(0) for x in xs) / count
        q = sum(x.square().sum(0) for x in xs) / count
        v = sum((x - mean).square().sum(0) for x in xs) / count
        expected = {
            "l2": sum(x.norm(dim=0) for x in xs) / count,
            "wanda": weight.abs().mean(0) * q.sqrt(),
            "wifn": weight.abs().mean(0) * q.sqrt(),
            "wifv": v * weight.square().sum(0),
            "ifv": v,
            "magnitude": weight.norm(dim=0),
        }
        torch.testing.assert_close(statistics[layer].mean.double(), mean, rtol=1e-4, atol=1e-6)
        for name, value in expected.items():
            torch.testing.assert_close(scores[name][layer].double(), value, rtol=1e-4, atol=1e-6, msg=name)


def test_labels_do_not_matter_to_statistics(llama, batches):
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    for a, b in zip(collect_statistics(llama, labelled), collect_statistics(llama, batches), strict=True):
        assert torch.equal(a.norm, b.norm)


def test_statistics_leave_the_model_as_it_was(llama, batches):
    llama.train()
    llama.model.layers[1].eval()
    modes = [m.training for m in llama.modules()]
    collect_statistics(llama, batches)
    assert [m.training for m in llama.modules()] == modes
    assert not any(m._forward_pre_hooks for m in llama.modules())
    with pytest.raises(InvalidInputError, match="at least one"):
        collect_statistics(llama, [])
    with pytest.raises(RuntimeError):
        collect_statistics(llama, [{"input_ids": torch.zeros(1, 4)}])  # wrong dtype: the model's own error
    assert not any(m._forward_pre_hooks for m in llama.modules())


def test_criteria_are_checked(llama):
    units = find_units(llama)
    with pytest.raises(InvalidInputError, match="choose one of l2"):
        unit_importance(llama, units, "taylor")
    with pytest.raises(InvalidInputError, match="needs activation statistics"):
        unit_importance(llama, units, "wifv")
    assert len(unit_importance(llama, units, "magnitude")) == 4


def test_order_is_stable():
    assert neuron_order([torch.tensor([1.0, 3.0, 1.0, 2.0])])[0].tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("kind", CONFIGS)
def test_size_predicts_the_pruned_model(built, kind):
    model = copy.deepcopy(built[kind])
    units = find_units(model)
    size = measure_size(model, units)
    assert size.parameters == model.num_parameters()
    slice_units(model, random_kept(units, WIDTHS))
    cut = measure_size(model, find_units(model))
    assert size.parameters_at(WIDTHS) == cut.parameters == model.num_parameters()
    assert size.bytes_at(WIDTHS) == cut.num_bytes == sum(p.nbytes for p in model.parameters())
    assert size.flops_at(WIDTHS) == cut.flops
