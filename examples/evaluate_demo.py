"""The embedded demo model, dense and pruned at three ratios, through lmms-eval: a Markdown table.

    python examples/evaluate_demo.py > examples/benchmarks/results/evaluate_demo.md

Each model is loaded by its id, cut by the demo's pruner while it is loaded, and asked the questions of the report split as
lmms-eval's task `lop_demo`. The pruner's sketch recovers what it can; nothing is trained. The same for one ratio, on the
command line:

    hf-lop evaluate org/demo --pruner org/lop-demo --ratio 0.3 --tasks lop_demo --include-path tasks
"""

import argparse
import sys
import tempfile

import torch
from demo_benchmarks import write_benchmarks

from hf_lop import demo, evaluate


def main() -> None:
    """Evaluate all models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400, help="each has four questions")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is tiny: threads would only wait for each other
    print("| neurons removed | parameters removed | accuracy | perception | cognition |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        write_benchmarks(folder, arguments.pictures)
        dense = None
        for ratio in [None, *arguments.ratios]:
            cut = {} if ratio is None else {"pruner": demo.PRUNER_DIR, "ratio": ratio}
            found = evaluate(demo.MODEL_DIR, "lop_demo", include_path=folder, dtype="float32", batch_size=64, **cut)
            dense = dense or found
            task = found["lop_demo"]
            cells = [f"{task.metrics[name]:.1%}" for name in ("accuracy", "perception", "cognition")]
            cells[0] += f" ± {task.standard_errors['accuracy']:.1%}"
            name = "none (dense)" if ratio is None else f"{ratio:.0%}"
            print(f"| {name} | {1 - found.parameters / dense.parameters:.1%} | {' | '.join(cells)} |", flush=True)
            print(f"{name} done", file=sys.stderr)
    print(
        f"\n{task.samples} questions of the report split, {task.harness} {task.harness_version}, greedy generation, float32; "
        "± is the standard error."
    )


if __name__ == "__main__":
    main()
