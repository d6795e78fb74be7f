"""What users do with a pruned checkpoint, on both routes: with hf_lop as the stock class, and without it as remote code.

Each check gets a `Loader`, which knows the route. The package route runs each as a test; the other route runs all of them
in one child Python that cannot import hf_lop, so nothing here may import it at the top.
"""

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    TorchAoConfig,
    pipeline,
)

from tests.tiny_repo import WIDTHS, build_repo, picture, question

PROJECTIONS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
CHECKS = {}


@dataclass
class Loader:
    folder: Path
    expected: torch.Tensor
    trust: bool

    def __post_init__(self):
        self.processor = AutoProcessor.from_pretrained(self.folder, **self.route)
        self.inputs = question(self.processor)

    @property
    def route(self):
        return {"trust_remote_code": True} if self.trust else {}

    def load(self, folder=None, auto=AutoModelForImageTextToText, **kwargs):
        """Load, and refuse any weight that is missing, unexpected or of another shape."""
        model, info = auto.from_pretrained(folder or self.folder, output_loading_info=True, **self.route, **kwargs)
        if auto is AutoModel:  # the part without the head, as for any model
            info["unexpected_keys"] -= {"lm_head.weight"}
        assert not any(info.values()), info
        assert model.config.text_config.intermediate_size == WIDTHS
        return model.eval()

    def logits(self, model):
        with torch.no_grad():
            return model(**{key: value.to(model.device) for key, value in self.inputs.items()}).logits

    def generate(self, model, **kwargs):
        return model.generate(**self.inputs, max_new_tokens=4, do_sample=False, **kwargs)


def check(function):
    CHECKS[function.__name__] = function
    return function


def layers(model):
    return model.get_decoder().layers


def widths(model):
    return [layer.mlp.down_proj.in_features for layer in layers(model)]


# -- Loading -----------------------------------------------------------------------------------------------------------


@check
def plain(loader, tmp):
    model = loader.load()
    assert widths(model) == WIDTHS
    assert torch.equal(loader.logits(model), loader.expected)


@check
def device_maps(loader, tmp):
    for device_map in ("auto", "cpu"):
        assert torch.equal(loader.logits(loader.load(device_map=device_map)), loader.expected)


@check
def other_auto_classes(loader, tmp):
    config = AutoConfig.from_pretrained(loader.folder, **loader.route)
    assert config.text_config.intermediate_size == WIDTHS
    assert widths(loader.load(auto=AutoModel)) == WIDTHS
    assert AutoTokenizer.from_pretrained(loader.folder, **loader.route)("picture")["input_ids"]


@check
def bfloat16(loader, tmp):
    model, reference = loader.load(dtype=torch.bfloat16), loader.load()
    for parameter in reference.parameters():  # only parameters: `.to` would also cast the rotary buffers
        parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(loader.logits(model), loader.logits(reference))
    model.save_pretrained(tmp)
    again = loader.load(tmp, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(loader.logits(again), loader.logits(model))


@check
def empty_weights(loader, tmp):
    config = AutoConfig.from_pretrained(loader.folder, **loader.route)
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config, **loader.route)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert widths(model) == WIDTHS
    assert "Qwen2_5_VLDecoderLayer" in model._no_split_modules


@check
def attention_implementations(loader, tmp):
    eager = loader.load(attn_implementation="eager")
    torch.testing.assert_close(loader.logits(eager), loader.expected)
    assert torch.equal(loader.logits(loader.load(attn_implementation="sdpa")), loader.expected)
    switched = loader.load()
    switched.set_attn_implementation("eager")
    assert all(layer.self_attn.config._attn_implementation == "eager" for layer in layers(switched))
    assert torch.equal(loader.logits(switched), loader.logits(eager))


# -- Saving ------------------------------------------------------------------------------------------------------------


@check
def sharded(loader, tmp):
    loader.load().save_pretrained(tmp, max_shard_size="100KB")
    assert len(list(tmp.glob("*.safetensors"))) > 1
    assert torch.equal(loader.logits(loader.load(tmp)), loader.expected)


@check
def saved_again(loader, tmp):
    """Everything a repository needs is there again, and the config says the same."""
    loader.load().save_pretrained(tmp)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (loader.folder, tmp))
    for config in (before, after):
        for part in (config, config["text_config"], config["vision_config"]):
            part.pop("dtype", None)
    assert after == before
    assert (tmp / "modeling_lop.py").read_bytes() == (loader.folder / "modeling_lop.py").read_bytes()
    if not loader.trust:  # without hf_lop, transformers saves the processor only when told to
        assert {path.name for path in tmp.iterdir()} == {path.name for path in loader.folder.iterdir()}
    assert torch.equal(loader.logits(loader.load(tmp)), loader.expected)


@check
def copies(loader, tmp):
    model = copy.deepcopy(loader.load())
    assert torch.equal(loader.logits(model), loader.expected)
    assert copy.deepcopy(model.config).text_config.intermediate_size == WIDTHS


@check
def offloaded(loader, tmp):
    place = dict.fromkeys(("model.visual", "model.language_model.embed_tokens", "model.language_model.norm"), "cpu")
    place |= {"model.language_model.rotary_emb": "cpu", "lm_head": "cpu"}
    place |= {f"model.language_model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    model = loader.load(device_map=place, offload_folder=tmp / "offload")
    assert torch.equal(loader.logits(model), loader.expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of the memory that saving takes
        model.save_pretrained(tmp / "saved")
    assert torch.equal(loader.logits(loader.load(tmp / "saved")), loader.expected)


# -- Using -------------------------------------------------------------------------------------------------------------


@check
def generation(loader, tmp):
    model = loader.load()
    tokens = loader.generate(model)
    assert torch.equal(loader.generate(model, cache_implementation="static"), tokens)
    asked = [{"type": "image", "image": picture()}, {"type": "text", "text": "what colour is the picture?"}]
    pipe = pipeline("image-text-to-text", model=str(loader.folder), **loader.route)
    answer = pipe(
        text=[{"role": "user", "content": asked}],
        return_full_text=False,
        generate_kwargs={"max_new_tokens": 4, "do_sample": False},
    )
    new = tokens[0, loader.inputs["input_ids"].shape[1] :]
    assert answer[0]["generated_text"] == loader.processor.decode(new, skip_special_tokens=True)


@check
def training(loader, tmp):
    model = loader.load().train()
    older = not hasattr(model, "activation_checkpointing_enable")  # an older transformers calls it otherwise
    (model.gradient_checkpointing_enable if older else model.activation_checkpointing_enable)()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(**labelled(loader)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@check
def lora(loader, tmp):
    from peft import LoraConfig, PeftModel, get_peft_model

    tuned = get_peft_model(loader.load(), LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False))
    expected = loader.logits(tuned)
    assert not torch.equal(expected, loader.expected)
    tuned.save_pretrained(tmp / "adapter")
    assert not (tmp / "adapter" / "modeling_lop.py").exists()
    again = PeftModel.from_pretrained(loader.load(), tmp / "adapter").eval()
    assert torch.equal(loader.logits(again), expected)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp / "merged")
    assert torch.equal(loader.logits(loader.load(tmp / "merged")), loader.logits(merged))
    added = loader.load()
    added.add_adapter(LoraConfig(r=2, target_modules=PROJECTIONS))
    added.save_pretrained(tmp / "added")
    assert {path.name for path in (tmp / "added").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp / "added" / "modeling_lop.py").exists() or loader.trust


@check
def int8(loader, tmp):
    from torchao.quantization import Int8WeightOnlyConfig

    model = loader.load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)))
    assert tuple(layers(model)[1].mlp.gate_proj.weight.shape) == (WIDTHS[1], 64)
    assert type(layers(model)[1].mlp.gate_proj.weight).__name__ != "Parameter"
    model.save_pretrained(tmp)
    assert torch.equal(loader.logits(loader.load(tmp)), loader.logits(model))


@check
def compiled(loader, tmp):
    model = loader.load()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    torch.testing.assert_close(loader.logits(model), loader.expected)


# -- Running the checks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    from hf_lop.units.slice import slice_units

    root = tmp_path_factory.mktemp("round_trips")
    (root / "base").mkdir()
    build_repo(root / "base")
    model = AutoModelForImageTextToText.from_pretrained(root / "base").eval()
    facts = {"dense_parameters": model.num_parameters(), "dense_bytes": 4 * model.num_parameters()}
    generator = torch.Generator().manual_seed(0)
    slice_units(model, [torch.randperm(96, generator=generator)[:width] for width in WIDTHS])
    model.config.pruning_config = {
        "method": "lop",
        "criterion": "l2",
        "round_to": 1,
        "dense_widths": [96] * 4,
        **facts,
    }
    processor = AutoProcessor.from_pretrained(root / "base")
    with torch.no_grad():
        expected = model(**question(processor)).logits
    model.save_pretrained(root / "pruned")
    torch.save(expected, root / "expected.pt")
    return Loader(root / "pruned", expected, trust=False)


SLOW = {"compiled", "int8", "bfloat16", "offloaded", "attention_implementations"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CHECKS])
def test_with_hf_lop(loader, name, tmp_path):
    CHECKS[name](loader, tmp_path)


def test_the_concrete_class_and_the_stock_class_load(loader):
    model = loader.load(auto=Qwen2_5_VLForConditionalGeneration)
    assert type(model) is type(loader.load()) is Qwen2_5_VLForConditionalGeneration
    assert torch.equal(loader.logits(model), loader.expected)


def test_the_other_spelling_loads_and_is_saved_as_a_list(loader, tmp_path):
    """`per_layer_config` is transformers' own spelling; its models do not read it yet."""
    for path in loader.folder.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"]
    text = config["text_config"]
    text["intermediate_size"] = 96
    text["per_layer_config"] = {str(i): {"intermediate_size": w} for i, w in enumerate(WIDTHS) if w != 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for auto in (AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration):
        model = loader.load(tmp_path, auto=auto)
        assert torch.equal(loader.logits(model), loader.expected)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["text_config"]
    assert saved["intermediate_size"] == WIDTHS
    assert not saved.get("per_layer_config")
    assert torch.equal(loader.logits(loader.load(tmp_path / "again")), loader.expected)


def test_other_processes_write_nothing_beyond_transformers(loader, tmp_path):
    loader.load().save_pretrained(tmp_path, is_main_process=False)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors"}


@pytest.mark.slow
def test_trainer_checkpoints_load(loader, tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(loader.load(), arguments, train_dataset=[{}], data_collator=lambda _: labelled(loader))
    trainer.train()
    model = loader.load(tmp_path / "checkpoint-1")
    assert torch.equal(loader.logits(model), loader.logits(trainer.model.eval()))
    assert not torch.equal(loader.logits(model), loader.expected)


def labelled(loader):
    return {**loader.inputs, "labels": loader.inputs["input_ids"]}


def test_a_source_that_is_gone_is_a_warning(loader, tmp_path):
    model = loader.load()
    model.config._name_or_path = model.name_or_path = str(tmp_path / "gone")
    model.config.pruning_config = {**model.config.pruning_config, "base_model": "org/unreachable"}
    with pytest.warns(UserWarning, match="org/unreachable"):
        model.save_pretrained(tmp_path / "out")
    assert "AutoProcessor" not in (tmp_path / "out" / "README.md").read_text()
    assert torch.equal(loader.logits(loader.load(tmp_path / "out")), loader.expected)


@pytest.mark.slow
def test_without_hf_lop(loader, tmp_path):
    from tests.hub_server import run_python

    code = f"""
from pathlib import Path
import torch
from tests.hub.test_round_trips import CHECKS, Loader
torch.set_num_threads(1)
loader = Loader(Path({str(loader.folder)!r}), torch.load({str(loader.folder.parent / "expected.pt")!r}), trust=True)
failed = []
for name, check in CHECKS.items():
    folder = Path({str(tmp_path)!r}, name)
    folder.mkdir()
    try:
        check(loader, folder)
    except Exception as error:
        import traceback
        traceback.print_exc()
        failed.append(name)
assert not failed, failed
"""
    run_python(code, home=tmp_path / "home", block=("hf_lop",))
