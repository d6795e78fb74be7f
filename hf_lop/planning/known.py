"""What the config of a pruner says about planning: read from its JSON, so that a plan needs neither torch nor transformers."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_lop.errors import CheckpointMismatchError
from hf_lop.planning.blocks import AUTO, Blocks, read_blocks, shown
from hf_lop.planning.budget import Budget, Floats
from hf_lop.planning.plan import MeasureSeconds, Plan, plan_budget
from hf_lop.units.checks import DEEPEST, WIDEST
from hf_lop.units.size import ModelSize

LARGEST = 2**63  # of a size: no model has so many parameters, bytes or FLOPs per token


@dataclass(frozen=True, slots=True)
class Known:
    """The sizes of a base model, and the blocks that its pruner plans in.

    Attributes:
        size (`ModelSize`): of the dense model.
        blocks (`tuple[int, ...]`, *optional*): `[L]` what `round_to="auto"` is; None where that is up to the widths.
    """

    size: ModelSize
    blocks: Blocks | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Known":
        """Read the config of a pruner.

        A size of an elastic repository must not change under its card: one that says nothing about blocks keeps single neurons.

        Raises:
            CheckpointMismatchError: if it is damaged.
        """
        size, stored = read_size(config.get("base_size")), config.get("round_to")
        layers = len(size.widths)
        if stored is None:
            return cls(size, (1,) * layers if config.get("sorted_by") else None)
        blocks = read_blocks(stored, layers)
        if blocks is None:
            raise CheckpointMismatchError(
                f"round_to is {str(stored)[:100]}; it must be a positive integer, or {layers} of them. Take the pruner from its "
                "repository again."
            )
        return cls(size, blocks)

    def plan(
        self,
        predict: Callable[[float], Floats],
        budget: Budget,
        size: ModelSize | None = None,
        *,
        measure: MeasureSeconds | None = None,
        at_most: Sequence[int] | None = None,
    ) -> Plan:
        """Plan the widths for a budget in the blocks of the pruner, of a model of another size if given; see [`plan_budget`].

        A pruner of before there were blocks gets those that the widths allow, and a warning says so.
        """
        plan = plan_budget(predict, size or self.size, budget, measure=measure, at_most=at_most, blocks=self.blocks)
        if budget.round_to == AUTO and self.blocks is None and max(plan.round_to) > 1:
            warnings.warn(
                f"This pruner was made before plans came in blocks; round_to is {shown(plan.round_to)} now. round_to=1 gives the plans "
                "of before.",
                stacklevel=4,
            )
        return plan


def format_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what [`check_format`][hf_lop.units.configs.check_format] reads, of the config of a pruner."""
    made = config.get("calibration") or {}
    versions = made.get("versions") if isinstance(made, dict) else None
    version = versions.get("hf_lop") if isinstance(versions, dict) else None
    return {"format": config.get("format", 0), "hf_lop_version": version}


def read_size(stored: Any) -> ModelSize:
    """Read what `ModelSize.to_dict` gave, from a config.

    Raises:
        CheckpointMismatchError: if it is something else.
    """
    try:
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in (stored or {}).items()}
        size = ModelSize(**values)
    except (TypeError, AttributeError) as error:
        raise CheckpointMismatchError(
            f"This LOPConfig does not describe a base model ({error}). Load it from a pruner repository."
        ) from error
    widths: Any = size.widths
    listed = isinstance(widths, tuple) and 1 <= len(widths) <= DEEPEST
    if not listed or not all(type(width) is int and 1 <= width <= WIDEST for width in widths):
        raise CheckpointMismatchError(
            f"base_size.widths is {str(widths)[:100]}; it must be a list of 1 to {DEEPEST} integers from 1 to {WIDEST}. "
            "Take the pruner from its repository again."
        )
    numbers = (size.hidden_size, size.projections, size.parameters, size.num_bytes, size.flops, size.block)
    lists = [size.neuron_parameters, size.neuron_bytes, *([size.piece_flops] if size.piece_flops else [])]
    counted = all(isinstance(values, tuple) and len(values) == len(widths) for values in lists)
    if not counted or not all(type(n) is int and 0 <= n <= LARGEST for values in (numbers, *lists) for n in values):
        raise CheckpointMismatchError(
            f"base_size is {str(stored)[:200]}; it must hold integers, and for every layer one. Take the pruner from its "
            "repository again."
        )
    return size
