"""What is saved is what is in memory, whole or not at all; what nobody could load is refused before it is cut."""

import copy
import json
import os
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_lop.errors import CheckpointMismatchError, InvalidInputError, UnsupportedModelError
from hf_lop.hub.write import whole
from hf_lop.units.measure import count_parameters
from tests.conftest import slow
from tests.fake_pruner import fake_pruner
from tests.helpers import logits


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def cut(model):
    return fake_pruner(model).prune(model, 0.4, recover=None)


class TestCheck:
    def test_a_source_that_transformers_converts_back(self, llama, tmp_path):
        """A folder in block-wise FP8, which loads dequantised where there is no GPU, and would be saved as FP8 again."""
        llama.save_pretrained(tmp_path / "fp8")
        state = load_file(tmp_path / "fp8/model.safetensors")
        for name in [name for name in state if "layers" in name and state[name].dim() == 2]:
            state[name] = state[name].to(torch.float8_e4m3fn)
            rows, columns = (size // 16 for size in state[name].shape)
            state[f"{name}_scale_inv"] = torch.ones(rows, columns)
        save_file(state, tmp_path / "fp8/model.safetensors", {"format": "pt"})
        config = json.loads((tmp_path / "fp8/config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        (tmp_path / "fp8/config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
        assert model.model.layers[0].mlp.up_proj.weight.dtype.itemsize > 1
        cut(model)
        with pytest.raises(CheckpointMismatchError, match=r"stored as F8_E4M3.*save_original_format=False"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        model.save_pretrained(tmp_path / "out", save_original_format=False)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(again), logits(model))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda state: state.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
            (lambda state: state.update(extra=torch.ones(1)), "extra is not of the model"),
            (lambda state: state.update({"model.norm.weight": torch.ones(3)}), r"norm\.weight is \[3\]"),
        ],
    )
    def test_other_weights_than_in_memory(self, llama, tmp_path, monkeypatch, change, words):
        from transformers import modeling_utils

        write = modeling_utils.safe_save_file

        def changed(state, *args, **kwargs):
            change(state)
            write(state, *args, **kwargs)

        cut(llama)
        with monkeypatch.context() as patch:
            patch.setattr(modeling_utils, "safe_save_file", changed)
            with pytest.raises(CheckpointMismatchError, match=words):
                llama.save_pretrained(tmp_path / "out")
        assert not list(tmp_path.iterdir())
        llama.save_pretrained(tmp_path / "out")

    def test_an_earlier_save_stays_where_a_new_one_fails(self, llama, tmp_path, monkeypatch):
        cut(llama).save_pretrained(tmp_path / "out")
        before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
        monkeypatch.setattr("hf_lop.hub.write.check._counts", lambda _: ["a list is wrong."])
        with pytest.raises(CheckpointMismatchError, match="a list is wrong"):
            llama.save_pretrained(tmp_path / "out")
        assert {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")} == before


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class TestRefusedBeforeTheCut:
    def test_code_of_its_own(self, built):
        model = OwnModel(OwnConfig(**{**built["gated"].config.to_dict(), "model_type": "own-llama"}))
        before = logits(model)
        for change in (lambda pruner: pruner.prune(model, 0.4), lambda pruner: pruner.make_elastic(model)):
            with pytest.raises(UnsupportedModelError, match="OwnConfig, which transformers has not"):
                change(fake_pruner(model))
        assert torch.equal(logits(model), before)

    def test_a_repository_with_code_of_its_own_by_name(self, pruner, built, tmp_path, monkeypatch):
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
        built["gated"].save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "mine.py").write_text("raise SystemExit('was run')")
        with pytest.raises(UnsupportedModelError, match="code of its own"):
            pruner.prune(tmp_path, 0.3)

    @pytest.mark.parametrize("wrap", ["peft", "transformers"])
    def test_adapters_anywhere(self, llama, wrap):
        lora, pruner = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), fake_pruner(llama)
        if wrap == "peft":
            model = get_peft_model(llama, lora)
        else:
            model = llama
            model.add_adapter(lora)
        with pytest.raises(UnsupportedModelError, match=r"adapter at .*q_proj.*merge_and_unload"):
            pruner.prune(model, 0.4)
        assert model.config.intermediate_size == 48

    def test_an_adapter_by_name(self, pruner, llama, tmp_path):
        get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        with pytest.raises(InvalidInputError, match="holds an adapter"):
            pruner.prune(tmp_path, 0.3)

    def test_a_quantised_base_by_name_is_called_that(self, pruner, built, tmp_path):
        built["gated"].save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedModelError, match="is quantised"):
            pruner.prune(tmp_path, 0.3, output_dir=tmp_path / "out")

    def test_a_wrapper_for_several_devices(self, pruner, llama):
        with pytest.raises(InvalidInputError, match=r"model\.module"):
            pruner.prune(nn.DataParallel(llama), 0.3)


class TestNamedClass:
    @pytest.fixture
    def folder(self, built, tmp_path):
        built["gated"].save_pretrained(tmp_path / "dense")
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", num_labels=3).save_pretrained(
            tmp_path / "head"
        )
        return tmp_path / "head"

    @pytest.mark.parametrize("streamed", [False, True])
    def test_it_comes_back(self, built, folder, tmp_path, streamed):
        pruner = fake_pruner(built["gated"])
        if streamed:
            pruner.prune(folder, 0.3, recover=None, output_dir=tmp_path / "out")
        else:
            pruner.prune(folder, 0.3, recover=None).save_pretrained(tmp_path / "out")
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(found[1].values())
        dense = AutoModelForSequenceClassification.from_pretrained(folder)
        assert torch.equal(found[0].score.weight, dense.score.weight)

    def test_or_is_refused_by_its_name(self, pruner, folder):
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = ["LlavaLlamaForCausalLM"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedModelError, match="LlavaLlamaForCausalLM"):
            pruner.prune(folder, 0.3)


class Packed(nn.Linear):
    """Four bits per number, two in a byte, as bitsandbytes has them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_parameters_of_a_quantised_model_are_those_of_its_widths(llama):
    dense = sum(parameter.numel() for parameter in llama.parameters())
    assert count_parameters(llama) == dense
    llama.model.layers[0].mlp.up_proj = Packed(llama.model.layers[0].mlp.up_proj)
    assert count_parameters(llama) == dense


def test_the_card_of_a_quantised_model(llama, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    cut(llama).save_pretrained(tmp_path / "pruned")
    parameters = sum(parameter.numel() for parameter in llama.parameters())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    model.save_pretrained(tmp_path / "int8")
    card = (tmp_path / "int8/README.md").read_text()
    whole = (tmp_path / "int8/model.safetensors").read_bytes()
    stored = len(whole) - 8 - int.from_bytes(whole[:8], "little")
    assert f"| {parameters:,} |" in card
    assert "quantisation (`torchao`)" in card
    shown = next(line for line in card.splitlines() if line.startswith("| memory"))
    assert float(shown.split("|")[3].split()[0]) * 1e3 == pytest.approx(stored, rel=0.02)


class TestCardsNeverFail:
    ODD = (None, "x", "<script>", -1, 0, float("nan"), 10**30, [], {}, [None], True)

    @pytest.mark.parametrize(
        "key",
        [
            *("dense_widths", "base_model"),
            *slow("dense_parameters", "dense_bytes", "flops", "criterion", "calibration", "method", "pruner"),
            *slow("estimated_divergence", "round_to", "recovery"),
        ],
    )
    def test_odd_facts(self, built, tmp_path, key):
        model = cut(copy.deepcopy(built["gated"]))
        made = model.config.pruning_config
        for index, value in enumerate(self.ODD):
            model.config.pruning_config = {**made, key: value}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.save_pretrained(tmp_path / str(index))
            card = (tmp_path / str(index) / "README.md").read_text()
            assert "from_pretrained" in card
            assert "<script>" not in card
            assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / str(index))), logits(model))

    def test_what_is_missing_is_said(self, llama, tmp_path):
        cut(llama).config.pruning_config["dense_widths"] = None
        with pytest.warns(UserWarning, match="says only how to load it"):
            llama.save_pretrained(tmp_path)
        assert "could not be read from its config" in (tmp_path / "README.md").read_text()


class TestWhole:
    def test_a_kill_leaves_nothing_in_a_new_folder(self, llama, tmp_path, monkeypatch):
        cut(llama)
        monkeypatch.setattr("hf_lop.hub.save.methods.check_saved", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llama.save_pretrained(tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_files_of_the_user_stay(self, llama, tmp_path):
        (tmp_path / "trainer_state.json").write_text("{}")
        cut(llama).save_pretrained(tmp_path, max_shard_size="30KB")
        assert "model.safetensors.index.json" in files(tmp_path)
        llama.save_pretrained(tmp_path)
        assert {"trainer_state.json", "model.safetensors", "config.json"} <= files(tmp_path)
        assert not [name for name in files(tmp_path) if "-of-" in name or "index" in name]
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(llama))

    @pytest.mark.parametrize("moment", [0, 6, *slow(3, 9, 12)])
    def test_a_folder_that_is_half_replaced_does_not_load(self, llama, tmp_path, monkeypatch, moment):
        cut(llama).save_pretrained(tmp_path, max_shard_size="30KB")
        left, replace = [moment], os.replace

        def move(*args):
            if ".partial" in str(args[0]) and ".partial" not in str(args[1]):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(whole.os, "replace", move)
            with pytest.raises(KeyboardInterrupt):
                llama.save_pretrained(tmp_path, max_shard_size="30KB")
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        llama.save_pretrained(tmp_path, max_shard_size="30KB")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(llama))
        assert not [name for name in files(tmp_path) if "partial" in name]

    @pytest.mark.parametrize("what", ["model", "pruner", "elastic"])
    def test_a_full_disk_is_a_sentence(self, built, tmp_path, monkeypatch, what):
        from safetensors import SafetensorError
        from transformers import modeling_utils

        model = copy.deepcopy(built["gated"])
        pruner = fake_pruner(model)
        thing = {
            "model": lambda: pruner.prune(model, 0.4),
            "pruner": lambda: pruner,
            "elastic": lambda: pruner.make_elastic(model),
        }
        thing = thing[what]()

        def full(*_, **__):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        with monkeypatch.context() as patch:
            patch.setattr(modeling_utils, "safe_save_file", full)
            with pytest.raises(InvalidInputError, match=r"disk of .*out is full, so nothing was written"):
                thing.save_pretrained(tmp_path / "out")
        assert not list(tmp_path.iterdir())
        thing.save_pretrained(tmp_path / "out")


def interrupt(*_, **__):
    raise KeyboardInterrupt


class TestInterrupted:
    """An interrupt at any tensor operation or change of a module leaves each layer whole, and a model that says what it is."""

    @pytest.mark.parametrize("what", ["prune", "make_elastic"])
    def test_at_every_operation(self, built, what, tmp_path):
        dense, seen = logits(built["gated"]), set()
        for count in range(1, 400, 23):
            model = copy.deepcopy(built["gated"])
            pruner, fuse = fake_pruner(model), [10**9]

            class Fuse(torch.utils._python_dispatch.TorchDispatchMode):
                def __torch_dispatch__(self, func, types, args=(), kwargs=None, fuse=fuse):
                    fuse[0] -= 1
                    if fuse[0] == 0:
                        raise KeyboardInterrupt
                    return func(*args, **(kwargs or {}))

            try:
                with Fuse():
                    fuse[0] = count
                    pruner.prune(model, 0.4, recover=None) if what == "prune" else pruner.make_elastic(model)
            except KeyboardInterrupt:
                seen.add(self.check(model, pruner, dense, what, tmp_path))
            else:
                break
        assert {"untouched", "unfinished"} <= seen

    @pytest.mark.parametrize("what", ["prune", "make_elastic"])
    @pytest.mark.parametrize("moment", [1, 2, 3, 5, 8, 11])
    def test_between_the_tensors_of_a_layer(self, built, what, moment, tmp_path, monkeypatch):
        from hf_lop.units import unit

        model, dense = copy.deepcopy(built["gated"]), logits(built["gated"])
        pruner, left, note = fake_pruner(model), [moment], unit.note_size

        def noted(*args):
            note(*args)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(unit, "note_size", noted)
        with pytest.raises(KeyboardInterrupt):
            pruner.prune(model, 0.4, recover=None) if what == "prune" else pruner.make_elastic(model)
        monkeypatch.undo()
        assert self.check(model, pruner, dense, what, tmp_path) == "unfinished"

    def check(self, model, pruner, dense, what, folder):
        found = logits(model)  # it runs
        if what == "make_elastic":
            torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)  # sorting whole layers changes nothing
        widths = model.config.intermediate_size
        widths = widths if isinstance(widths, list) else [widths] * 4
        assert widths == [layer.mlp.up_proj.out_features for layer in model.model.layers]
        if not hasattr(model.config, "lop_unfinished"):
            if getattr(model.config, "elastic_config", None):
                return "done"
            assert torch.equal(found, dense)
            return "untouched"
        for refused in (
            lambda: model.save_pretrained(folder / "out"),
            lambda: pruner.prune(model, 0.4),
            lambda: pruner.make_elastic(model),
        ):
            with pytest.raises(UnsupportedModelError, match=rf"in the middle of {what}"):
                refused()
        assert not (folder / "out").exists()
        return "unfinished"
