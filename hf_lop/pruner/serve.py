"""One model, every size: sorting a model for good, and a loaded one that changes its size while it serves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.hub.read.load import load_model
from hf_lop.hub.write.check import check_classes
from hf_lop.learning.config import LOPConfig
from hf_lop.learning.decoder.sound import check_weights
from hf_lop.learning.learned import Learned
from hf_lop.planning.plan import Plan
from hf_lop.pruner.prune import at_base
from hf_lop.pruner.record import matched, provenance, record
from hf_lop.units.identity import is_in_memory, sample_weights
from hf_lop.units.kept import note_kept
from hf_lop.units.measure import measure_size
from hf_lop.units.slice import changing, output_weight, prunable_units
from hf_lop.units.unit import take
from hf_lop.units.views import ElasticModel


def make_elastic(
    config: LOPConfig, learned: Learned, model: PreTrainedModel | str | Path
) -> tuple[PreTrainedModel, Learned]:
    """Sort the pieces of a dense model in place; see [`~LOPPruner.make_elastic`] for errors.

    Args:
        config (`LOPConfig`): of the pruner.
        learned (`Learned`): what it knows.
        model (`PreTrainedModel`, `str` or `Path`): the dense model.

    Returns:
        `tuple`: the same object, and what is known of it now.
    """
    model = load_base(config, model)
    if getattr(getattr(model, "config", None), "elastic_config", None):
        raise CheckpointMismatchError(
            "This model is elastic already: its neurons are sorted. Load the repository that it was made from."
        )
    units = prunable_units(model)
    check_classes(model)
    check_weights(model, units)
    size = measure_size(model, units)
    config.check_fits(model, size, strict=False, compared=learned.identity is not None)
    # Budgets of memory count in the dtype that is stored.
    dtype = str(output_weight(model, units[0]).dtype).removeprefix("torch.")
    known = replace(learned.sorted(), size=size, dtype=dtype)
    match = matched(config, learned, model)
    with changing(model, "make_elastic"):
        for unit, order in zip(units, learned.order, strict=True):
            take(model, unit, order)
        model.config.elastic_config = {"order": known.sorted_by, **provenance(config, model), "base_match": match}
    return model, replace(known, identity=sample_weights(model) if is_in_memory(model) else None)


def load_base(config: LOPConfig, model: PreTrainedModel | str | Path) -> PreTrainedModel:
    """Return a model, loaded if it is a name."""
    return load_model(model, **at_base(config, model)) if isinstance(model, str | Path) else model


class Elastic:
    """A model that changes its size in microseconds, so that a server can trade quality for load.

    Attributes:
        model: the model to run, in evaluation mode; all sizes share its weights, so it must not be trained. Its config lists
            the current widths. A forward pass that is under way while the size changes may see both.
        plan (`Plan`): the current one; that of the dense model at first.

    Example:
        ```python
        pruner = LOPPruner.from_pretrained("org/elastic")
        elastic = pruner.elastic("org/elastic")
        elastic.set_plan(pruner.plan(0.5))
        answer = elastic.model.generate(**inputs)
        ```
    """

    def __init__(
        self,
        config: LOPConfig,
        learned: Learned,
        plan: Callable[[float], Plan],
        model: PreTrainedModel | str | Path,
    ) -> None:
        """Prepare a model; see [`~LOPPruner.elastic`] for errors.

        Args:
            config (`LOPConfig`): of the pruner.
            learned (`Learned`): what it knows.
            plan (`Callable`): the pruner's plan for a pruning ratio.
            model (`PreTrainedModel`, `str` or `Path`): the dense model, or the elastic one.
        """
        model = load_base(config, model)
        learned, units = learned.of_model(model.config), prunable_units(model)
        self._config, self._plan_ratio = config, plan
        self._size = size = measure_size(model, units)
        compared = learned.identity is not None
        config.check_fits(model, size, strict=False, sorted_by=learned.sorted_by, compared=compared)
        self._match = matched(config, learned, model)
        self._order = learned.checked_order()
        self._elastic = ElasticModel(model, self._order, units=units)
        self.model: Any = self._elastic.model
        self.plan = Plan(size.widths, size)
        self._elastic.set_widths([1] * len(size.widths))  # the first time prepares the config's class: milliseconds
        self._elastic.set_widths(size.widths)

    def set_plan(self, plan: Plan | float) -> None:
        """Change the size: no weight is copied, but for fused gate-up projections, whose rows are gathered.

        Args:
            plan (`Plan` or `float`): from the pruner's `plan`; a number is a pruning ratio to plan for.

        Raises:
            InvalidInputError: if the plan is of another model, or the ratio is out of range; then nothing changes.
            InfeasibleBudgetError: if the ratio leaves less than a neuron per layer.
        """
        plan = plan if isinstance(plan, Plan) else self._plan_ratio(plan)
        if plan.dense.widths != self.plan.dense.widths:
            raise InvalidInputError(
                "The plan is of another model: its dense widths differ. Plan with this model's pruner."
            )
        self._elastic.set_widths(plan.widths)
        self.plan = plan

    def materialize(self) -> PreTrainedModel:
        """Copy the model at its current size: what `prune(..., recover=None)` gives, with neurons sorted by importance.

        Returns:
            `PreTrainedModel`: an ordinary pruned model with weights of its own; it saves, pushes and trains.
        """
        cut: PreTrainedModel = self._elastic.materialize()
        note_kept(
            cut, self._elastic.units, [pieces[:n] for pieces, n in zip(self._order, self.plan.widths, strict=True)]
        )
        record(self._config, cut, replace(self.plan, dense=self._size), match=self._match)
        return cut
