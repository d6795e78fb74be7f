"""What one candidate costs: elastic widths and replay, against the dense decoder and against cutting a copy.

    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 \
        python examples/benchmarks/elastic.py > examples/benchmarks/results/elastic.json

Two models: the embedded demo MLLM on its own questions, and a text model of the shape of SmolLM2-135M with random weights
on random words (time does not depend on values). Candidates remove the given share of all neurons, by unequal widths,
odd ones unless said, another draw every round. All are run in turn, round by round, on one thread; times are CPU seconds
of it, medians over the rounds, and ratios medians of the ratios within a round. In bfloat16 on a CPU, PyTorch builds
kernels for every shape it has not seen: whoever comes first with new widths, here the candidate, pays for it. Multiples
of 16 avoid that.

* candidate: `Reward` "divergence" of new widths: setting them, replaying all batches, scoring every answer token
* dense decoder: the same at the dense widths, on the original weights
* pruned decoder: the recorded batches replayed on a model that was really cut, already there
* naive: deep copy, `slice_units`, forward of the whole model on all batches, divergence of its logits at the answers
* naive, answers (demo only): deep copy, `slice_units`, images and questions prepared, answered by `generate`, compared
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama import LlamaConfig

from hf_lop import demo
from hf_lop.learning.rewards import Reward
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import slice_units

Batches = Sequence[dict[str, Any]]


def smol(layers: int = 30, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Build a model of the shape of SmolLM2-135M with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def words(samples: int, tokens: int = 128, batch_size: int = 8) -> Batches:
    """Draw random words, the last 16 of which are the answer."""
    ids = torch.randint(3, 49152, (samples, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(tokens) < tokens - 16, -100)
    return [
        {"input_ids": ids[start : start + batch_size], "labels": labels[start : start + batch_size]}
        for start in range(0, samples, batch_size)
    ]


def draw(dense: Sequence[int], ratio: float, seed: int, round_to: int) -> list[int]:
    """Draw unequal widths that remove the given share of the neurons."""
    ratios = ratio * np.random.default_rng(seed).uniform(0.5, 1.5, len(dense))
    ratios *= ratio / ratios.mean()
    return [max(1, round(n * (1 - r) / round_to)) * round_to for n, r in zip(dense, ratios, strict=True)]


@torch.inference_mode()
def naive(model: Any, dense: Sequence[torch.Tensor], batches: Batches, kept: list[torch.Tensor]) -> float:
    """Score a candidate by cutting a copy and running all of it."""
    pruned = cut(model, kept)
    total = 0.0
    for batch, log_p in zip(batches, dense, strict=True):
        log_q = answers(pruned, batch)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total


@torch.inference_mode()
def answers(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Run a whole model and return the log-probabilities before every answer token."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
    chosen: torch.Tensor = logits[:, :-1][batch["labels"][:, 1:] != -100]
    return chosen.float().log_softmax(-1)


def seconds(run: Callable[[], object]) -> float:
    """Measure the CPU time of one call in this thread."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def cut(model: Any, kept: list[torch.Tensor]) -> Any:
    """Prune a copy."""
    pruned = copy.deepcopy(model)
    slice_units(pruned, kept)
    return pruned


def measure(
    model: Any,
    batches: Batches,
    ratio: float,
    rounds: int,
    *,
    round_to: int = 1,
    with_naive: bool = True,
    answer: Callable[[Any], object] | None = None,
) -> dict[str, Any]:
    """Compare all on one model."""
    units = find_units(model)
    widths = [unit.count for unit in units]
    generator = torch.Generator().manual_seed(0)
    order = [torch.randperm(width, generator=generator) for width in widths]
    made: list[Reward] = []
    preparation = seconds(lambda: made.append(Reward.on(model, order, batches, "divergence")))
    reward = made[0]
    dense = [answers(model, batch) for batch in batches] if with_naive else []
    times: dict[str, list[float]] = {}

    def clock(name: str, run: Callable[[], object]) -> None:
        times.setdefault(name, []).append(seconds(run))

    for seed in range(rounds + 1):  # the first round warms up
        candidate = draw(widths, ratio, seed, round_to)
        kept = [indices[:width] for indices, width in zip(order, candidate, strict=True)]
        pruned = cut(model, kept)
        reward.elastic.set_widths(widths)
        clock("dense decoder", lambda: reward(widths))
        clock("candidate", lambda c=candidate: reward(c))
        clock("pruned decoder", lambda p=pruned: [entry.logits(p).log_softmax(-1) for entry in reward.recorded])
        reward.elastic.set_widths(widths)
        clock("setting widths", lambda c=candidate: reward.elastic.set_widths(c))
        if with_naive:
            clock("naive", lambda k=kept: naive(model, dense, batches, k))
        if answer is not None:
            clock("naive, answers", lambda k=kept: answer(cut(model, k)))

    def against(name: str, other: str) -> float:
        pairs = zip(times[name][1:], times[other][1:], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    compared = [("candidate", "dense decoder"), ("candidate", "pruned decoder"), ("pruned decoder", "dense decoder")]
    compared += [(name, "candidate") for name in ("naive", "naive, answers") if name in times]
    ffn_bytes = sum(
        p.numel() * p.element_size() for f in units for m in _projections(model, f) for p in m.parameters()
    )
    all_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "layers": len(units),
        "samples": sum(len(batch["input_ids"]) for batch in batches),
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "way": reward.recorded[0].way,
        "preparation, s": round(preparation, 3),
        "sorted copy / all weights": round(ffn_bytes / all_bytes, 3),
        "ms": {name: round(1e3 * statistics.median(values[1:]), 2) for name, values in times.items()},
    } | {f"{name} / {other}": against(name, other) for name, other in compared}


def _projections(model: Any, unit: Any) -> list[Any]:
    inputs, output = unit.modules(model)
    return [*inputs, output]


def main() -> None:
    """Run all comparisons and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = arguments.rounds
    mllm, processor = demo.load_model()
    data = demo.load_data("search", 256)
    questions = [dict(batch) for batch in demo.batches(processor, data, 64, with_answer=True)]
    model, samples = smol(), words(8)

    def answer(pruned: Any) -> dict[str, float]:
        return demo.accuracy(demo.answer(pruned, processor, data, 64), data)

    result = {
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "demo MLLM": {f"{r:.0%}": measure(mllm, questions, r, rounds, answer=answer) for r in (0.3, 0.5)},
        "135M shape, float32": {f"{r:.0%}": measure(model, samples, r, rounds) for r in (0.3, 0.5)},
        "135M shape, bfloat16, 30%": {
            name: measure(smol(dtype=torch.bfloat16), samples, 0.3, rounds, round_to=step)
            for name, step in (("odd widths", 1), ("multiples of 16", 16))
        },
        "growth with layers, 30%": [measure(smol(n), words(8), 0.3, rounds, with_naive=False) for n in (6, 12, 24)],
        "growth with samples, 30%": [measure(smol(6), words(n), 0.3, rounds, with_naive=False) for n in (8, 16, 32)],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
