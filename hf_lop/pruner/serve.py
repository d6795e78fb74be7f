"""One model, every size: sorting a model for good, and a loaded one that changes its size while it serves."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.hub.elastic.write import keep_pruner
from hf_lop.hub.read.load import load_model
from hf_lop.planning.plan import Plan
from hf_lop.pruner.prune import provenance, record
from hf_lop.pruner.sorting import sorted_twin, twin_for
from hf_lop.units.measure import measure_size
from hf_lop.units.slice import output_weight, prunable_units
from hf_lop.units.unit import take
from hf_lop.units.views import ElasticModel

if TYPE_CHECKING:
    from hf_lop.pruner.pruner import LOPPruner


def make_elastic(pruner: "LOPPruner", model: PreTrainedModel | str | Path) -> PreTrainedModel:
    """Sort the neurons of a dense model in place; see [`~LOPPruner.make_elastic`] for arguments and errors."""
    model = _loaded(pruner, model)
    if getattr(model.config, "elastic_config", None):
        raise CheckpointMismatchError(
            "This model is elastic already: its neurons are sorted. Load the repository that it was made from."
        )
    units = prunable_units(model)
    size = measure_size(model, units)
    pruner.config.check_fits(model, size, strict=False)
    order, twin = pruner.order(), sorted_twin(pruner)
    twin.config.base_size = size.to_dict()  # budgets of memory count in the dtype that is stored
    twin.config.base_dtype = str(output_weight(model, units[0]).dtype).removeprefix("torch.")
    for unit, indices in zip(units, order, strict=True):
        take(model, unit, indices)
    model.config.elastic_config = {"order": twin.config.sorted_by, **provenance(pruner, model)}
    keep_pruner(model, twin)
    return model


def _loaded(pruner: "LOPPruner", model: PreTrainedModel | str | Path) -> PreTrainedModel:
    if not isinstance(model, str | Path):
        return model
    at_base: dict[str, Any] = (
        {"revision": pruner.config.base_revision} if str(model) == pruner.config.base_model else {}
    )
    return load_model(model, **at_base)


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

    def __init__(self, pruner: "LOPPruner", model: PreTrainedModel | str | Path) -> None:
        """Prepare a model; see [`~LOPPruner.elastic`] for arguments and errors."""
        model = _loaded(pruner, model)
        self._pruner = twin_for(pruner, model)
        self._size = size = measure_size(model, prunable_units(model))
        self._pruner.config.check_fits(model, size, strict=False)
        self._elastic = ElasticModel(model, self._pruner.order())
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
        plan = plan if isinstance(plan, Plan) else self._pruner.plan(plan)
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
        record(self._pruner, cut, Plan(self.plan.widths, self._size))
        return cut
