"""All targets of the fuzz, and a run of one."""

import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from transformers.utils import logging

from tests.fuzz import configs, headers, journals, numbers, records
from tests.fuzz.target import Outcome, Target, damage_of, judge
from tests.fuzz.world import quick, world

TARGETS: list[Target] = [
    *configs.TARGETS,
    *headers.TARGETS,
    *records.TARGETS,
    *journals.TARGETS,
    *numbers.TARGETS,
]
FOUND = Path(__file__).parent / "found"  # what failed once, as `<target>.<seed>`


@dataclass(slots=True)
class Seen:
    """What a run of a target saw: how many cases ended how, and the seeds of those that failed."""

    counts: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[int, Outcome]] = field(default_factory=list)


def run_case(target: Target, damage: bytes) -> Outcome:
    """Run damage of a target."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    try:
        with quick():
            return judge(target, world(), damage)
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)


def run_target(
    target: Target, first: int, cases: int | None = None, seconds: float | None = None, keep: Path | None = None
) -> Seen:
    """Run seeds from `first` on: so many cases, or as many as there is time for, but at least one.

    Args:
        target: what is damaged and read.
        first: the first seed.
        cases: how many.
        seconds: or how long.
        keep: folder to write the damage of cases that failed to.
    """
    damage_of(target, world(), first)  # what it damages is made before the clock runs
    seen, end = Seen(), time.perf_counter() + (seconds or 0)
    for seed in count(first) if cases is None else range(first, first + cases):
        damage = damage_of(target, world(), seed)
        outcome = run_case(target, damage)
        seen.counts[outcome.kind] += 1
        if outcome.kind == "failed":
            seen.failed.append((seed, outcome))
            if keep is not None:
                keep.mkdir(exist_ok=True)
                (keep / f"{target.name}.{seed}").write_bytes(damage)
        if seconds is not None and time.perf_counter() > end:
            break
    return seen
