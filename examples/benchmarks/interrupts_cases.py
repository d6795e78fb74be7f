"""Commands to interrupt: tiny inputs, arguments, and what a finished result is apart from dates and times."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = ("red", "green", "circle", "square", "north", "centre", "the", "cats", "nap", "at", "seven", "and", "they")
TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
# What differs between two runs that nobody disturbed.
TIMES = ("seconds", "cold_seconds", "date", "check")  # a checksum is of times as well


@dataclass(frozen=True, slots=True)
class Case:
    """One command.

    Attributes:
        name (`str`): what the table calls it.
        arguments (`Callable`): given the folder of inputs and the one to write to, the command's arguments.
        loads (`Callable`): given what was written, reads it as a user would; an error means that it is no result.
        again (`tuple[str, ...]`): what the same command needs besides, to go on.
        single (`bool`): whether every file that it writes is a result by itself, not all together.
    """

    name: str
    arguments: Callable[[Path, Path], list[str]]
    loads: Callable[[Path], Any]
    again: tuple[str, ...] = ()
    single: bool = False


def make_inputs(folder: Path) -> Path:
    """Write a tiny random Llama, a pruner of it, its pruned and its elastic model, texts, and a task with questions."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from hf_lop import LOPPruner

    cut = Tokenizer(models.BPE())
    cut.pre_tokenizer, cut.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    cut.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=cut, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_key_value_heads=2, **sizes, **tokens)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    texts = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(1, 21)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    questions = [{"question": "the cats", "choices": [" nap", " red", " are"], "answer": i % 3} for i in range(4)]
    (folder / "tasks").mkdir()
    (folder / "questions.json").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "tasks" / "colours.yaml").write_text(TASK.format(data=folder / "questions.json"))
    batches = [dict(tokenizer(texts[i : i + 8], return_tensors="pt", padding=True)) for i in (0, 8)]
    for batch in batches:
        batch.pop("token_type_ids", None)
    pruner = LOPPruner.fit(model, batches[:1], batches[1:], predictor="mlp", sketch_rows=8)
    pruner.save_pretrained(folder / "pruner")
    pruner.prune(folder / "dense", 0.4).save_pretrained(folder / "pruned")
    pruner.make_elastic(folder / "dense").save_pretrained(folder / "elastic")
    return folder


def _model(out: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(out)


def _pruner(out: Path) -> Any:
    from hf_lop import LOPPruner

    return LOPPruner.from_pretrained(out)


def _gguf(out: Path) -> Any:
    from gguf import GGUFReader

    (file,) = out.glob("*.gguf")
    return GGUFReader(file)


def _elastic(out: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(out, lop_ratio=0.4)


def _compared(out: Path) -> Any:
    return json.loads((out / "comparison.json").read_text())


def _evaluated(out: Path) -> Any:
    from hf_lop.evaluation.results import Results

    return Results.load(out / "results.json")


def _pruning(inputs: Path, out: Path, *more: str) -> list[str]:
    return ["prune", f"{inputs}/dense", "--pruner", f"{inputs}/pruner", "--ratio", "0.4", "--out", f"{out}", *more]


def _export(to: str) -> Callable[[Path, Path], list[str]]:
    return lambda inputs, out: ["export", f"{inputs}/pruned", "--to", to, "--out", f"{out}"]


def _fit(inputs: Path, out: Path) -> list[str]:
    counts = ["--samples", "8", "--search-samples", "4", "--report-samples", "2"]
    search = ["--search", "mcts", "--evaluations", "2", "--predictor", "mlp", "--sketch-rows", "0"]
    return ["fit", f"{inputs}/dense", "--data", f"{inputs}/texts.jsonl", *counts, *search, "--out", f"{out}"]


def _compare(inputs: Path, out: Path) -> list[str]:
    counts = ["--samples", "6", "--search-samples", "3", "--report-samples", "3", "--seeds", "1", "--ratio", "0.4"]
    chosen = ["--method", "lop", "--method", "uniform", "--search", "additive", "--search", "cmaes"]
    options = [*counts, *chosen, "--evaluations", "2"]
    return ["compare", f"{inputs}/dense", "--data", f"{inputs}/texts.jsonl", *options, "--out", f"{out}"]


def _evaluate(inputs: Path, out: Path) -> list[str]:
    where = ["--include-path", f"{inputs}/tasks", "--cache", f"{out}/cache", "--out", f"{out}/results.json"]
    return ["evaluate", f"{inputs}/pruned", "--tasks", "colours", "--device", "cpu", *where]


CASES = [
    Case("prune", _pruning, _model),
    Case("prune --stream", lambda inputs, out: _pruning(inputs, out, "--stream"), _model),
    Case("fit", _fit, _pruner, again=("--resume",)),
    Case(
        "make-elastic",
        lambda inputs, out: ["make-elastic", f"{inputs}/dense", "--pruner", f"{inputs}/pruner", "--out", f"{out}"],
        _elastic,
    ),
    Case("export --to uniform", _export("uniform"), _model),
    Case("export --to per_layer_config", _export("per_layer_config"), _model),
    Case("export --to gguf", _export("gguf"), _gguf),
    Case("pull", lambda inputs, out: ["pull", f"{inputs}/elastic", "--ratio", "0.4", "--out", f"{out}"], _model),
    Case("compare", _compare, _compared, single=True),
    Case("evaluate", _evaluate, _evaluated, single=True),
]


def contents(folder: Path) -> dict[str, str]:
    """Return what is in a folder: a digest of every file, of those with dates and times without these."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = "folder" if path.is_dir() else hashlib.sha256(_timeless(path)).hexdigest()[:16]
    return found


def _timeless(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name == "seconds.json" or path.suffix in (".db", ".lock"):
        return b""  # times alone; and SQLite's pages, which hold the same rows in any order
    if path.name == "comparison.md":  # the last two columns are times
        return re.sub(rb"\|[^|\n]*\|[^|\n]*\|$", b"|", data, flags=re.MULTILINE)
    if path.name == "README.md":  # of a pruner says what its phases took
        return re.sub(rb"^\| seconds \|.*$", b"", data, flags=re.MULTILINE)
    if path.suffix in (".json", ".jsonl"):
        lines = [data] if path.suffix == ".json" else data.splitlines()
        return b"\n".join(json.dumps(_without_times(json.loads(line)), sort_keys=True).encode() for line in lines)
    return data


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(entry) for key, entry in value.items() if key not in TIMES}
    return [_without_times(entry) for entry in value] if isinstance(value, list) else value
