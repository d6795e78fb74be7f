"""Compare all methods on the embedded demo model: three seeds, judged on questions that no pruner has seen.

    python examples/benchmarks/demo_compare.py

Every seed draws its own 240 of the 400 calibration questions, and as many of the search split, and fits its own pruner to
them: additive plans, from which the predictor learns, and the plans of MCTS and CMA-ES with 24 candidates per target. Writes
results/demo_compare.md and .json; journals, finished rows and plots are kept in the folder `--work`, so that a stopped run goes
on where it was.
"""

import argparse
from pathlib import Path

import torch

from hf_lop import demo
from hf_lop.evaluation.comparison.compare import compare
from hf_lop.evaluation.comparison.fit import fit_pruners

RESULTS = Path(__file__).parent / "results"
DRAWN, REPORT, EVALUATIONS = 240, 400, 24
SEARCHES = ("additive", "mcts", "cmaes")


def main() -> None:
    """Fit a pruner per seed and compare the methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("demo_compare"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model, processor = demo.load_model()

    def draw(split: str, seed: int) -> list[dict[str, torch.Tensor]]:
        rows = demo.load_data(split).shuffle(seed=seed).select(range(DRAWN))
        return list(demo.batches(processor, rows, 40, with_answer=True))

    draws = [(draw("calibration", seed), draw("search", seed)) for seed in range(arguments.seeds)]
    pruners = fit_pruners(model, draws, SEARCHES, arguments.work, evaluations=EVALUATIONS)
    report = demo.batches(processor, demo.load_data("report", REPORT), 40, with_answer=True)
    compared = compare(
        pruners,
        model,
        report,
        recover=(None, "fold", "lstsq", "sequential"),
        data=draw("calibration", arguments.seeds),
        rewards=("accuracy", "log_likelihood"),
        folder=arguments.work,
    )
    journals = {search: sorted(arguments.work.glob(f"fit-*-{search}")) for search in SEARCHES}
    compared.save(arguments.work, journals)  # with the plots
    title = (
        f"# Methods on the demo model\n\n`python examples/benchmarks/demo_compare.py`: {arguments.seeds} seeds, each with "
        f"{DRAWN} of 400 questions for calibration and {DRAWN} of 400 others for probes and searches ({EVALUATIONS} candidates per target; the predictor learns from the additive plans); {REPORT} questions of the report split. "
        "`fold`, `lstsq` and `sequential` recover the output projections, the last two with "
        f"{DRAWN} calibration questions.\n\n"
    )
    (RESULTS / "demo_compare.md").write_text(title + compared.to_markdown(), encoding="utf-8")
    (RESULTS / "demo_compare.json").write_text(compared.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
