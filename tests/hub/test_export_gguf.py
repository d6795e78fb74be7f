"""GGUF files in the real llama.cpp: the same log-probabilities and the same tokens as in transformers."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="the extra export is not installed")

import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lop import export
from hf_lop.errors import CheckpointMismatchError, InvalidInputError, UnsupportedModelError
from hf_lop.evaluation.comparison.bias import mark_output_biases
from hf_lop.hub.export.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer_name, write_tokenizer
from hf_lop.units.kinds import find_units
from hf_lop.units.modeling_lop import add_output_biases
from tests.tiny_models import tiny_model
from tests.tiny_pruned import PROSE, WIDTHS, prune_tiny, save, text_model, tokenizer

TEXTS = [PROSE, "a<|end|>b <tool>12", " they're  7am\n\n\n x", "it'S 1234567"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": ("llama", "gpt-2", {}),
    "llama3": (
        "llama",
        "llama-bpe",
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}, "head_dim": 32, "attention_bias": True},
    ),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": True}),
    "smollm": ("llama", "smollm", {"tie_word_embeddings": True, "mlp_bias": True}),
    "mistral": ("mistral", "gpt-2", {"sliding_window": None}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pruned models, one per case, one in bfloat16 and one with the biases that recovery can add."""
    root = tmp_path_factory.mktemp("gguf")
    models = {name: (text_model(kind, **changes), kind_of) for name, (kind, kind_of, changes) in CASES.items()}
    models["half"] = text_model("llama", torch.bfloat16), "gpt-2"
    models["biased"] = text_model("llama"), "gpt-2"
    for name, (model, kind) in models.items():
        prune_tiny(model)
        if name == "biased":
            add_output_biases(model, find_units(model))
            mark_output_biases(model)
            for unit in find_units(model):
                bias = unit.modules(model)[1].bias
                bias.data.copy_(torch.linspace(-1, 1, len(bias)))
        save(model, root / name, kind)
    return root


def run_llama_cpp(requests, tmp_path):
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    command = [
        sys.executable,
        str(Path(__file__).parents[2] / "examples/runtimes/run_llama_cpp.py"),
        str(tmp_path / "requests.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout[done.stdout.rindex("RESULT ") + 7 :])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp (xllamacpp) is not installed")
def test_llama_cpp_computes_the_same(folders, tmp_path):
    names = sorted(path.name for path in folders.iterdir())
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (1, 9, 40)]
    requests = []
    for name in names:
        written = export(folders / name, "gguf", tmp_path / name)
        assert written.widths == tuple(WIDTHS)
        assert written.files == ("README.md", f"{name}-{'BF16' if name == 'half' else 'F32'}.gguf")
        requests.append(
            {"file": str(tmp_path / name / written.files[1]), "prompts": prompts, "texts": TEXTS, "vocabulary": 320}
        )
    for name, answer in zip(names, run_llama_cpp(requests, tmp_path), strict=True):
        model, cut = (
            AutoModelForCausalLM.from_pretrained(folders / name),
            AutoTokenizer.from_pretrained(folders / name),
        )
        assert answer["tokens"] == [cut(text)["input_ids"] for text in TEXTS], name
        for prompt, found in zip(prompts, answer["logprobs"], strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
            error = (torch.tensor(found) - expected).abs().max()
            assert error < (0.1 if name == "half" else 1e-4), (name, len(prompt), float(error))


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_pre_tokenizers_are_recognised_after_saving(kind, tmp_path):
    tokenizer(kind).save_pretrained(tmp_path)
    assert pre_tokenizer_name(AutoTokenizer.from_pretrained(tmp_path)) == kind


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("qwen3", {"head_dim": 16}, "is none of llama, mistral, qwen2"),
        ("llama", {"hidden_act": "gelu"}, "has the activation gelu"),
        ("mistral", {"sliding_window": 8}, "sliding window"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "positions of type yarn",
        ),
    ],
)
def test_what_deci_cannot_compute_is_refused(kind, changes, words, tmp_path):
    save(prune_tiny(text_model(kind, **changes)), tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=words) as refusal:
        export(tmp_path / "model", "gguf", tmp_path / "out")
    assert "Export it as uniform" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_multimodal_model_is_refused(tmp_path):
    prune_tiny(tiny_model("qwen2_5_vl")).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="is multimodal"):
        export(tmp_path / "model", "gguf", tmp_path / "out")


def test_without_a_tokenizer(tmp_path):
    prune_tiny(text_model("llama")).save_pretrained(tmp_path / "model")
    with pytest.raises(InvalidInputError, match="has no tokenizer"):
        export(tmp_path / "model", "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_dtypes_are_refused(tmp_path):
    save(prune_tiny(text_model("llama", torch.float64)), tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"torch\.float64"):
        export(tmp_path / "model", "gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("widths", "words"), [(WIDTHS, "multiples of 1: "), ([96, 32, 64, 96], "multiples of 32: "), (None, None)]
)
def test_what_llama_cpp_can_quantise_is_said(widths, words, tmp_path):
    model = text_model("llama", **({} if widths else {"intermediate_size": 512}))
    save(prune_tiny(model, widths or [512, 256, 256, 512]), tmp_path / "pruned", "gpt-2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export(tmp_path / "pruned", "gguf", tmp_path / "out")
    said = [str(one.message) for one in caught if "K-quants" in str(one.message)]
    assert [words in text and "round_to=256" in text for text in said] == [True] * bool(words)


def test_several_chat_templates(tmp_path):
    writer = GGUFWriter(tmp_path / "x.gguf", "deci")
    write_tokenizer(writer, tokenizer(chat_template={"default": "a", "tool_use": "b"}), 320)
    found = {key: field.value for key, field in writer.kv_data[0].items() if "chat_template" in key}
    assert found == {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool_use": "b",
        "tokenizer.chat_templates": ["tool_use"],
    }


def test_a_vocabulary_larger_than_the_embedding(tmp_path):
    save(prune_tiny(text_model("llama", vocab_size=300)), tmp_path / "model")
    with pytest.raises(CheckpointMismatchError, match="embedding 300 rows"):
        export(tmp_path / "model", "gguf", tmp_path / "out")


def test_an_unknown_tokenizer_is_refused(tmp_path):
    folder = save(prune_tiny(text_model("llama")), tmp_path / "model")
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(UnsupportedModelError, match="BPE on \\['Whitespace'\\]"):
        export(folder, "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
