"""All targets of the fuzz, and a run of one."""

import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import torch
from transformers.utils import logging

from tests.fuzz import configs, headers, journals, numbers, records
from tests.fuzz.target import Outcome, Target, damage_of, judge
from tests.fuzz.world import quick, world

TARGETS: list[Target] = [*configs.TARGETS, *headers.TARGETS, *records.TARGETS, *journals.TARGETS, *numbers.TARGETS]


@dataclass(slots=True)
class Seen:
    """What a run of a target saw."""

    counts: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[int, Outcome]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def run_target(target: Target, first: int, cases: int | None = None, seconds: float | None = None) -> Seen:
    """Run seeds from `first` on: so many cases, or as many as there is time for, but at least one."""
    torch.set_num_threads(1)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    seen, end = Seen(), time.perf_counter() + (seconds or 0)
    try:
        for seed in count(first) if cases is None else range(first, first + cases):
            with quick():
                outcome = judge(target, world(), damage_of(target, world(), seed))
            seen.counts[outcome.kind] += 1
            if outcome.kind == "refused":
                seen.refused.append(outcome.reason)
            if outcome.kind == "failed":
                seen.failed.append((seed, outcome))
            if seconds is not None and time.perf_counter() > end:
                break
    finally:
        logging.set_verbosity(verbosity)
    return seen
