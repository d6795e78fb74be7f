"""The errors of hf_lop: each is a `LOPError` and the builtin a caller would expect."""

from typing import Any

from hf_lop.units.modeling_lop import CheckpointMismatchError, LOPError, UnsupportedModelError

__all__ = [
    "CheckpointMismatchError",
    "EvaluationError",
    "InfeasibleBudgetError",
    "InvalidInputError",
    "LOPError",
    "MissingDependencyError",
    "ProcessError",
    "UnsupportedModelError",
]


class InvalidInputError(LOPError, ValueError):
    """An argument is outside its domain."""


class InfeasibleBudgetError(LOPError, ValueError):
    """No plan meets the budget: it is below the smallest possible model."""


class MissingDependencyError(LOPError, ImportError):
    """An optional package is needed for this call; the message names the extra to install."""


class ProcessError(LOPError, RuntimeError):
    """Another of several processes failed or is gone."""


class EvaluationError(LOPError, RuntimeError):
    """A benchmark could not be run or scored. `results` holds those of the tasks that could, or None."""

    results: Any = None
