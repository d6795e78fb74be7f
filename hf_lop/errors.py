"""The errors of hf_lop: each is a `LOPError` and the builtin a caller would expect."""

from hf_lop.modeling_lop import CheckpointMismatchError, LOPError, UnsupportedModelError

__all__ = [
    "CheckpointMismatchError",
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
