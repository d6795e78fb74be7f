"""What the benchmarks share: steps that are measured once and kept in a folder, CPU time, and how tables show numbers."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_lop.planning.journal import check_settings


class Clock:
    """CPU seconds of this process while the context lasts."""

    def __enter__(self) -> "Clock":
        self.start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.start


class Steps:
    """One seed: every step is computed at most once and kept in its folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)

    def kept(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a step from its file, or compute it and write the file."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            result = json.dumps(measure())
            path.with_suffix(".part").write_text(result)
            path.with_suffix(".part").rename(path)
            print(f"seed {self.seed}: {name} done", file=sys.stderr)
        return json.loads(path.read_text())

    def on(self, data: dict[str, str]) -> None:
        """Note the fingerprints of the data; refuse a folder with steps on other data."""
        check_settings(self.folder, self.kept("data", lambda: data), data)


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Format mean and standard deviation between seeds."""
    if not len(values):
        return "-"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def seconds(values: Sequence[float]) -> str:
    """Format a mean time."""
    if not len(values):
        return "-"
    mean = float(np.mean(values))
    return "< 1 ms" if mean < 1e-3 else f"{1e3 * mean:.0f} ms" if mean < 1 else f"{mean:.0f} s"


def main(
    doc: str,
    script: str,
    measure: Callable[[Path, int, Path | None], dict[str, Any]],
    markdown: Callable[[Sequence[dict[str, Any]], str], str],
    settings: dict[str, Any],
) -> None:
    """Measure what is missing of some seeds, print the table, and write it with the numbers if asked to."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is measured on the way")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", type=Path, help="folder for the book")
    parser.add_argument("--out", type=Path, help="results without suffix, printed only by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    runs = [measure(arguments.work / f"seed-{seed}", seed, arguments.data) for seed in arguments.seeds]
    text = markdown(
        runs, f"python examples/benchmarks/{script} --work work --seeds {' '.join(map(str, arguments.seeds))}"
    )
    print(text)
    if arguments.out:
        machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text(text)
        content = {"settings": settings, **machine, "runs": runs}
        arguments.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
