"""Recovery without data on the embedded demo: the shipped pruner's sketch against none and against least squares on data.

    python examples/benchmarks/demo_sketch.py > examples/benchmarks/results/demo_sketch.md

All 1600 questions of the report split, which neither calibration nor search has seen; one pruner, so no error is stated beyond
the standard error of the questions.
"""

import tempfile

import torch

from hf_lop import demo
from hf_lop.evaluation.comparison.compare import compare

RATIOS = (0.3, 0.5, 0.7)


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model, processor = demo.load_model()
    pruner = demo.load_pruner()
    data, report = (
        list(demo.batches(processor, demo.load_data(split), 40, with_answer=True))
        for split in ("calibration", "report")
    )
    with tempfile.TemporaryDirectory() as folder:
        compared = compare(
            [pruner],
            model,
            report,
            ratios=RATIOS,
            methods=("lop", "uniform", "flap"),
            recover=(None, "bias", "sketch", "lstsq"),
            data=data,
            rewards=("accuracy", "log_likelihood"),
            folder=folder,
        )
    print(
        f"# Recovery of the demo model\n\n`python examples/benchmarks/demo_sketch.py`: {pruner.config.sketch_rows} directions\n"
    )
    print("| method | recovery | " + " | ".join(f"right, {r:.0%} | log-likelihood, {r:.0%}" for r in RATIOS) + " |")
    print("|---|---|" + "---:|---:|" * len(RATIOS))
    scores = {row.key[:3]: row.scores for row in compared.rows}
    dense = scores["dense", 0.0, None]
    print(
        f"| dense | | {dense['accuracy'].value:.2%} | {dense['log_likelihood'].value:.3f} |"
        + " | |" * (len(RATIOS) - 1)
    )
    for method, recovery in dict.fromkeys((row.method, row.recover) for row in compared.rows if row.method != "dense"):
        found = [scores[method, ratio, recovery] for ratio in RATIOS]
        cells = [f"{score['accuracy'].value:.2%} | {score['log_likelihood'].value:.3f}" for score in found]
        print(f"| {method} | {recovery or 'none'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
