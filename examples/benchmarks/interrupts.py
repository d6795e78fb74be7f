"""Every command that writes, stopped by `kill -9` and by Ctrl-C at counted moments, then run again.

    python examples/benchmarks/interrupts.py --moments 20 --out examples/benchmarks/results/interrupts.md

A moment is a call that changes the file system, or a change of a model. Each run is a child, forked from this process after
all imports. A first run counts the moments; at least half of those that are taken lie between the first and the last change
of what the command writes. After a stop, what is there must be no result yet, or all of it; the same command, run again,
must finish with the result of an undisturbed run; and nothing else may be left, also not among temporary files.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from interrupts_cases import CASES
from interrupts_runs import SIGNALS, Bench, between, choose, hurried

from hf_lop.files import write_whole

ABOUT = """\
A signal stops a command at a counted moment after its imports: before a call that changes the file system, or a change of a
model. Then the same command is run again; `fit` with `--resume`. Moments are spread evenly; the table says how many there
are in all. A wrong load is a result that can be read and is not that of an undisturbed run; a failed rerun one that ends with an
error or another result, or after a command that did not end by its signal, with one line and exit code 130 after Ctrl-C;
leftovers are what an undisturbed run does not leave, beside the result, among temporary files, or in hf_lop's cache. The model
is a random Llama of four layers."""


def main() -> None:
    """Stop all commands, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="per command and signal")
    parser.add_argument("--command", action="append", help="one of the table's, repeatable; all by default")
    parser.add_argument("--out", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    rows = []
    with hurried(), tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work))
        for case in CASES:
            if arguments.command and case.name not in arguments.command:
                continue
            _, counted = bench.undisturbed(case)
            chosen = choose(counted.moments, counted.place, arguments.moments)
            inside = sum(index in between(counted.moments, counted.place) for index in chosen)
            for label, number in SIGNALS.items():
                start = time.perf_counter()
                stops = [bench.stop(case, number, at) for at in chosen]
                sums = [sum(stop.wrong for stop in stops), sum(stop.failed or stop.unclean for stop in stops)]
                sums.append(sum(bool(stop.left) for stop in stops))
                rows.append([case.name, label, f"{len(stops)} of {len(counted.moments)}", inside, *sums])
                print(*rows[-1], f"{time.perf_counter() - start:.0f} s", sep=" | ", file=sys.stderr)
                for stop in stops:
                    if not stop.right:
                        print(stop, file=sys.stderr)
    heads = [
        "command",
        "signal",
        "moments",
        "between first and last write",
        "wrong loads",
        "failed reruns",
        "leftovers",
    ]
    lines = [heads, ["---", "---", *["---:"] * 5], *rows]
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    text = f"# Interrupted commands\n\n{ABOUT}\n\n{table}\n"
    if arguments.out:
        write_whole(arguments.out, text.encode())
    print(text)


if __name__ == "__main__":
    main()
