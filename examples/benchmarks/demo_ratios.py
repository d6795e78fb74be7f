"""How the embedded demo model answers held-out questions after pruning, by method and ratio: a Markdown table.

    python examples/benchmarks/demo_ratios.py > examples/benchmarks/results/demo_ratios.md

Every method cuts the same dense model and nothing is trained afterwards. "uniform" takes the same share from every layer,
in the pruner's neuron order, by magnitude, or in random order (three draws); "first layer kept" is a control that removes
everything from the other layers; "additive" is the table the predictor was trained on; "LOP" is the predicted plan.
"""

import argparse
import copy
import math
import sys

import torch

from hf_lop import demo
from hf_lop.learning.importance import neuron_order, unit_importance
from hf_lop.planning.budget import project
from hf_lop.units.kinds import find_units
from hf_lop.units.slice import slice_units


def main() -> None:
    """Measure all methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1600)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5, 0.7])
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is tiny: threads would only wait for each other
    model, processor = demo.load_model()
    pruner = demo.load_pruner()
    report = demo.load_data("report", arguments.questions)
    size = pruner.config.size
    layers, neurons = len(size.widths), sum(size.widths)
    units = find_units(model)
    learned = pruner.order()
    by_magnitude = neuron_order(unit_importance(model, units, "magnitude"))

    def shuffled(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randperm(width, generator=generator) for width in size.widths]

    def right(order: list[torch.Tensor], widths: list[int]) -> float:
        pruned = copy.deepcopy(model)
        slice_units(pruned, [o[:w] for o, w in zip(order, widths, strict=True)])
        return demo.accuracy(demo.answer(pruned, processor, report, 64), report)["all"]

    def widths_for(layer_ratios: list[float], ratio: float) -> list[int]:
        return project(layer_ratios, size.widths, math.floor(round(neurons * (1 - ratio), 6))).tolist()

    dense = demo.accuracy(demo.answer(model, processor, report, 64), report)["all"]
    rows: dict[str, list[str]] = {}
    for ratio in arguments.ratios:
        uniform = widths_for([ratio] * layers, ratio)
        rest = min(1.0, ratio * neurons / (neurons - size.widths[0]))
        table = min(pruner.config.search_table or [], key=lambda row, ratio=ratio: abs(row["ratio"] - ratio))
        draws = [right(shuffled(seed), uniform) for seed in range(3)]
        spread = max(draws) - min(draws)
        results = {
            "uniform, random order": sum(draws) / 3,
            "uniform, magnitude": right(by_magnitude, uniform),
            "uniform, pruner's order": right(learned, uniform),
            "first layer kept, rest uniform": right(learned, widths_for([0.0] + [rest] * (layers - 1), ratio)),
            "additive plan": right(learned, widths_for(table["ratios"], ratio)),
            "**LOP (predicted plan)**": right(learned, list(pruner.plan(ratio).widths)),
        }
        best = max(results.values())
        for name, value in results.items():
            text = f"**{value:.1%}**" if value == best else f"{value:.1%}"
            more = f" (range {spread:.1%})" if name == "uniform, random order" else ""
            rows.setdefault(name, []).append(text + more)
        print(f"ratio {ratio} done", file=sys.stderr)
    removed = [1 - size.parameters_at(pruner.plan(ratio).widths) / size.parameters for ratio in arguments.ratios]
    error = math.sqrt(dense * (1 - dense) / len(report))
    print("| neurons removed | " + " | ".join(f"{ratio:.0%}" for ratio in arguments.ratios) + " |")
    print("|---|" + "---:|" * len(arguments.ratios))
    print("| parameters removed | " + " | ".join(f"{share:.1%}" for share in removed) + " |")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(values) + " |")
    print(
        f"\nDense: {dense:.1%} of {len(report)} held-out questions (standard error {error:.1%}; at 90 % it is", end=" "
    )
    print(f"{math.sqrt(0.09 / len(report)):.1%}). Greedy generation, float32.")


if __name__ == "__main__":
    main()
