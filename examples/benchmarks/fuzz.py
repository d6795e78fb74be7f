"""Damage what hf_lop reads, thousands of times, and count how that ends: refused with a sentence, equal, or failed.

    python examples/benchmarks/fuzz.py --count 1000 --out examples/benchmarks/results/fuzz.md

Needs a checkout with the development dependencies, since the targets are those of `tests/fuzz`; no model and no network.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
    os.environ.setdefault(name, "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fuzz.table import TARGETS, run_target  # noqa: E402


def main() -> None:
    """Run the targets and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="cases of each target")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--targets", nargs="*", default=[], help="names that those to run begin with; all by default")
    parser.add_argument("--out", type=Path, help="file to write the table to, after every target")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = [
        "# Fuzz of what is read",
        "",
        f"`python examples/benchmarks/fuzz.py --count {options.count} --seed {options.seed}`: {options.count} cases of each target. Refused: a "
        "`LOPError` (for `-plain`, also an error of transformers' own). Equal: no key missing or left over, and logits, files or "
        "plans as without damage; where a damaged config asks transformers for something else, as those of a dense model with "
        "that config and zeros for what was cut. Failed: anything else.",
        "",
        "| target | refused | equal | failed | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for target in TARGETS:
        if options.targets and not target.name.startswith(tuple(options.targets)):
            continue
        start = time.perf_counter()
        seen = run_target(target, options.seed, options.count)
        counts = " | ".join(str(seen.counts[kind]) for kind in ("refused", "equal", "failed"))
        lines.append(f"| {target.name} | {counts} | {time.perf_counter() - start:.0f} |")
        print(lines[-1], flush=True)
        for seed, outcome in seen.failed:
            print(f"    {seed}: {outcome.reason}", flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
