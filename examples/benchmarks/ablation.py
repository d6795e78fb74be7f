"""Predictors compared: Transformer, Bi-LSTM and MLP, at targets that were left out of their training.

    python examples/benchmarks/ablation.py --work work

Demo: for each of three seeds, which draw the data too, CMA-ES searches plans for 13 targets from 0.1 to 0.7 (its journal is
kept in the folder `--work`). 135M: the plans that smollm.py found for five targets, from results/smollm.json. Of each table
every second target is left out; each predictor learns the others, with three seeds of its own. At the left-out targets this
measures the error of the ratios (root mean square, in percentage points) and, on the demo, how far predicted plans, projected
onto the exact budget, diverge from the dense model on 200 questions that no search saw (nats per answer token). Straight
lines between the trained rows stand for no predictor at all. Writes results/ablation.md and .json.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_lop import LOPPruner, demo
from hf_lop.learning.predictors import PREDICTORS, build_predictor, train_predictor
from hf_lop.learning.rewards import Reward
from hf_lop.planning.search.space import SearchSpace
from hf_lop.planning.table import target_grid, training_pairs

RESULTS = Path(__file__).parent / "results"
DRAWN, REPORT, EVALUATIONS, SEEDS = 100, 200, 24, 3
Table = list[dict[str, Any]]
Plans = Callable[[float], np.ndarray]


def straight_lines(table: Table) -> Plans:
    """Interpolate between the rows, and between the first one and nothing at all."""
    targets, ratios = training_pairs(table, len(table[0]["ratios"]))
    return lambda target: np.array([np.interp(target, targets, column) for column in ratios.T])


def trained(name: str, table: Table, seed: int) -> Plans:
    """Train one predictor on the rows."""
    layers = len(table[0]["ratios"])
    predictor = build_predictor(name, layers, seed=seed)
    train_predictor(predictor, *training_pairs(table, layers), seed=seed)
    predictor.eval()

    def predict(target: float) -> np.ndarray:
        with torch.inference_mode():
            return predictor(torch.tensor([target]))[0].double().numpy()

    return predict


def error(plans: Plans, rows: Table) -> float:
    """Root mean square of the ratios' error, in percentage points."""
    return 100 * float(np.sqrt(np.mean([np.square(plans(row["ratio"]) - row["ratios"]) for row in rows])))


def compare(table: Table, worth: Callable[[np.ndarray, float], float] | None) -> dict[str, Any]:
    """Measure every predictor on one table; `worth` rewards layer ratios at a target."""
    learned, left_out = table[::2], table[1::2]

    def measure(plans: Plans) -> dict[str, float]:
        found = {"trained targets": error(plans, learned), "left-out targets": error(plans, left_out)}
        if worth is not None:
            found["divergence"] = -statistics.fmean(worth(plans(row["ratio"]), row["ratio"]) for row in left_out)
        return found

    result: dict[str, Any] = {"straight lines": [measure(straight_lines(learned))]}
    if worth is not None:
        found = {row["ratio"]: np.array(row["ratios"]) for row in table}
        result["searched plans"] = [measure(found.__getitem__)]
    for name in PREDICTORS:
        result[name] = [measure(trained(name, learned, seed)) for seed in range(SEEDS)]
    return result


def on_demo(seed: int, work: Path) -> dict[str, Any]:
    """Search one table on the demo, and judge the predictors trained on half of it."""
    model, processor = demo.load_model()

    def draw(split: str, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
        rows = demo.load_data(split).shuffle(seed=seed).select(range(count))
        return list(demo.batches(processor, rows, 50, with_answer=True))

    pruner = LOPPruner.fit(
        model,
        draw("calibration", DRAWN, seed),
        draw("search", DRAWN, seed),
        search="cmaes",
        targets=target_grid(0.1, 0.7, 0.05),
        evaluations=EVALUATIONS,
        predictor="mlp",
        seed=seed,
        journal=work / f"ablation-{seed}",
    )
    reward = Reward.on(model, pruner.order(), draw("report", REPORT, 0), "divergence")
    widths = pruner.config.size.widths

    def worth(ratios: np.ndarray, target: float) -> float:
        space = SearchSpace(widths, target)
        return reward(space.widths(space.project(ratios))).value

    return compare(pruner.config.search_table or [], worth)


def lines(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Put the runs of one model into a table: mean and standard deviation over all seeds."""
    digits = {name: 4 if name == "divergence" else 2 for name in runs[0]["mlp"][0]}
    rows = [f"| plans from | {' | '.join(digits)} |", "|---|" + "---:|" * len(digits)]
    for name in runs[0]:
        cells = []
        for column, places in digits.items():
            values = [found[column] for run in runs for found in run[name]]
            cells.append(f"{statistics.fmean(values):.{places}f} ± {statistics.stdev(values):.{places}f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Measure all and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the journals of the searches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    stored = json.loads((RESULTS / "smollm.json").read_text(encoding="utf-8"))
    result = {
        "demo": [on_demo(seed, arguments.work) for seed in range(SEEDS)],
        "135M": [compare(run["table"]["found"], None) for run in stored["runs"] if "table" in run],
    }
    (RESULTS / "ablation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = ["# Predictors at targets left out of their training", "", (__doc__ or "").split("\n\n", 1)[1].strip(), ""]
    text += ["`±` is the standard deviation over tables and seeds of the predictor.", ""]
    for name, runs in result.items():
        text += [f"## {name}", "", *lines(runs), ""]
    (RESULTS / "ablation.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
