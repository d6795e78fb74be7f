"""The errors of hf_lop: each is a `LOPError` and the builtin a caller would expect.

Every repository of a pruned model carries a copy of this file beside `modeling_lop.py`.
"""

from typing import Any


class LOPError(Exception):
    """Base of all errors raised by hf_lop."""


class UnsupportedModelError(LOPError, ValueError):
    """The model has nothing of a kind that can be pruned."""


class CheckpointMismatchError(LOPError, ValueError):
    """A checkpoint, config or pruner does not fit the model it is used with."""


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
