"""The dense demo model, and any size of it: planned, cut and recovered when it is first asked for."""

import copy
import time
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from hf_lop import LOPPruner, Plan, demo

QUESTIONS = 200  # about 50 pictures that the model was not trained on, four in a row about the same one


@dataclass(frozen=True)
class Pruned:
    """A pruned model, its plan, and the seconds that planning, cutting and recovery took."""

    model: Any
    plan: Plan
    seconds: float


@cache
def dense() -> tuple[Any, Any]:
    """The dense model and its processor."""
    return demo.load_model()


@cache
def pruner() -> LOPPruner:
    """The pruner of the dense model."""
    return demo.load_pruner()


@cache
def questions() -> Any:
    """Rows with `image`, `question`, `answer`."""
    return demo.load_data("report", QUESTIONS)


@lru_cache(maxsize=16)
def pruned(percent: int) -> Pruned:
    """The model with this percentage of its FFN neurons removed."""
    model, plan = copy.deepcopy(dense()[0]), pruner().plan(percent / 100)
    start = time.perf_counter()
    if percent:
        pruner().prune(model, percent / 100)  # plans by itself
    return Pruned(model, plan, time.perf_counter() - start)


@lru_cache(maxsize=1024)
def answer(percent: int, row: int) -> str:
    """What the model of a size says to a question."""
    return demo.answer(pruned(percent).model, dense()[1], questions().select([row]))[0]


@lru_cache(maxsize=128)
def right_answers(percent: int) -> int:
    """How many of all questions the model of a size answers right."""
    data = questions()
    return round(len(data) * demo.accuracy(demo.answer(pruned(percent).model, dense()[1], data, 50), data)["all"])
