"""Cutting a model to a budget with what a pruner knows, in memory or from file to file."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.hub.read.checkpoint import open_shards
from hf_lop.hub.read.kept import earlier_cut
from hf_lop.hub.read.load import load_model, read_config
from hf_lop.hub.read.skeleton import load_skeleton
from hf_lop.hub.write.check import check_classes
from hf_lop.hub.write.pruned_tensors import pruned_tensors, stored_entries, stored_output_weight
from hf_lop.hub.write.stream import write_pruned
from hf_lop.hub.write.whole import check_new
from hf_lop.learning.config import LOPConfig
from hf_lop.learning.decoder.sound import check_weights
from hf_lop.learning.learned import Learned
from hf_lop.planning.budget import Budget, Floats
from hf_lop.planning.plan import Plan, check_feasible
from hf_lop.pruner.methods import check_method, choose
from hf_lop.pruner.record import matched, record
from hf_lop.recovery.by_layer import set_output_weights
from hf_lop.recovery.choose import FROM_DATA, check_by_rows, choose_recovery, recovered_weights, row_solver
from hf_lop.recovery.held_out import HeldOut, split, too_few
from hf_lop.units.identity import read_memory
from hf_lop.units.kept import Earlier, Read
from hf_lop.units.measure import ffn_seconds, measure_size
from hf_lop.units.size import ModelSize
from hf_lop.units.slice import changing, check_kept, is_cut, output_weight, prunable_units, slice_units
from hf_lop.units.unit import Unit


class Planned(NamedTuple):
    """What a cut will be.

    Attributes:
        plan (`Plan`): its widths.
        kept (`list[torch.Tensor]`): `[L]`, the pieces of the model that stay, `[k] int64`.
        match (`str`): how its weights compare with those of the base, see [`check_identity`].
        learned (`Learned`): what is known of the pieces that the model has.
    """

    plan: Plan
    kept: list[torch.Tensor]
    match: str
    learned: Learned


@dataclass(frozen=True, slots=True)
class Cut:
    """What is asked of a pruner; see [`~LOPPruner.prune`].

    Attributes:
        budget (`Budget`): what the model may cost.
        method (`str`): one of `METHODS`.
        recover (`str`, *optional*): "auto", one of `RECOVERIES`, or None.
        strict (`bool`): refuse another commit of the base model.
    """

    budget: Budget
    method: str
    recover: str | None
    strict: bool

    def recovery(self, config: LOPConfig, *, data: bool, by_name: bool) -> str | None:
        """Refuse what cannot be done before any work, and return the recovery to use.

        Raises:
            InvalidInputError: if method or recovery is unknown, or needs what is not there.
            InfeasibleBudgetError: if the model of this name cannot be that small.
        """
        check_method(self.method, config)
        recovery = choose_recovery(self.recover, data=data, sketch=config.sketch_rows > 0)
        if by_name:
            check_feasible(config.size, replace(self.budget, memory=None))  # memory depends on the dtype of the model
        return recovery

    def plan(
        self,
        config: LOPConfig,
        learned: Learned,
        predict: Callable[[float], Floats],
        model: PreTrainedModel,
        units: Sequence[Unit],
        earlier: Earlier | None = None,
        weights: Callable[[Unit], torch.Tensor] | None = None,
        read: Read | None = read_memory,
    ) -> Planned:
        """Plan the counts of a model, and choose the pieces that stay, of those that an earlier cut has left.

        Its weights are compared with those of the base by the way, see [`check_identity`]; not where `read` is None.

        Raises:
            CheckpointMismatchError: if the pruner was made for another model.
            InfeasibleBudgetError: if the budget is below the smallest possible model.
            InvalidInputError: if a model that was cut before is within the budget already.
        """
        size, counts = measure_size(model, units), None
        if earlier is not None:
            size, counts = size.before(earlier.dense), earlier.counts
        learned = learned.of_model(model.config)
        compared = learned.identity is not None and read is not None
        config.check_fits(model, size, strict=self.strict, sorted_by=learned.sorted_by, compared=compared)
        match = matched(config, learned, model, strict=self.strict, read=read, earlier=earlier)
        learned = learned if earlier is None else learned.of_kept(earlier.kept)
        ratios, order = choose(self.method, config, learned, predict, model, units, weights)
        weight = output_weight(model, units[0])
        device = torch.device("cpu") if weight.is_meta else weight.device
        plan = config.known.plan(ratios, self.budget, size, measure=seconds_on(device, weight.dtype), at_most=counts)
        if list(plan.widths) == counts:
            raise InvalidInputError(
                f"This model is within the budget already: it keeps {sum(counts)} of {sum(size.widths)} pieces. Ask for less."
            )
        return Planned(
            plan, [pieces[:width] for pieces, width in zip(order, plan.widths, strict=True)], match, learned
        )


def prune_model(
    config: LOPConfig,
    learned: Learned,
    predict: Callable[[float], Floats],
    model: PreTrainedModel | str | Path,
    cut: Cut,
    data: Iterable[Mapping[str, Any]] | None,
    loading: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Cut a model in place; see [`~LOPPruner.prune`] for errors.

    Args:
        config (`LOPConfig`): of the pruner.
        learned (`Learned`): what the pruner knows.
        predict (`Callable`): its predictor, from a target ratio to layer ratios `[L]`.
        model (`PreTrainedModel`, `str` or `Path`): the dense model, or one that was cut from it.
        cut (`Cut`): what to do.
        data (`Iterable[Mapping]`, *optional*): batches for the recovery.
        loading (`Mapping`, *optional*): arguments of `from_pretrained`, for a model that is given by name.

    Returns:
        `PreTrainedModel`: the same object.
    """
    recovery = cut.recovery(config, data=data is not None, by_name=isinstance(model, str | Path))
    model = given_model(config, model, loading)
    units = prunable_units(model, cut_before=True)
    check_classes(model)
    check_weights(model, units)
    earlier = earlier_cut(model, units) if is_cut(model) else None
    plan, kept, match, learned = cut.plan(config, learned, predict, model, units, earlier)
    batches: Sequence[Mapping[str, Any]] = list(data or ())
    judge = None
    recovery = recovery if plan.neurons_removed else None
    if recovery in FROM_DATA:
        recovery = enough_data(recovery, cut, config, batches, max(len(pieces) * units[0].block for pieces in kept))
    if recovery in FROM_DATA and cut.recover == "auto":
        batches, held = split(model, batches)
        judge = HeldOut(model, held) if held else None

    def recovered(name: str | None) -> list[torch.Tensor] | None:
        return recovered_weights(name, model, units, kept, learned.statistics, learned.directions, batches)

    try:
        weights = recovered(recovery)
    except UnsupportedModelError:
        if cut.recover != "auto" or recovery != "sequential":
            raise
        recovery = "lstsq"
        weights = recovered(recovery)
    with changing(model, "prune"):
        narrow = slice_units(model, kept, units)
        if weights is not None and judge is not None:
            recovery = recovery if judge.set_if_better(model, narrow, weights) else None
        elif weights is not None:
            set_output_weights(model, narrow, weights)
        record(config, model, plan, cut.method, recovery, match, earlier)
    return model


def given_model(config: LOPConfig, model: Any, loading: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Return the model to prune, loaded if it is a name.

    Raises:
        InvalidInputError: if it is no model.
    """
    if isinstance(model, str | Path):
        return load_model(model, **{**at_base(config, model), **(loading or {})})
    if loading:
        raise InvalidInputError("loading is for a model given by name; this one is loaded already. Leave it out.")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InvalidInputError(
            f"model is a {type(model).__name__} around a model. Prune what is in it, model.module."
        )
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a {type(model).__name__}; pass a model, a Hub id or a folder.")
    return cast(PreTrainedModel, model)


def enough_data(
    recovery: str | None, cut: Cut, config: LOPConfig, batches: Sequence[Mapping[str, Any]], widest: int
) -> str | None:
    """Return the recovery to use where data may be too little for least squares: "auto" does without it then."""
    if few := too_few(batches, widest):
        if cut.recover == "auto":
            recovery = "sketch" if config.sketch_rows else None
        warnings.warn(f"{few}. Recovery is {recovery}; give more data.", stacklevel=4)
    return recovery


def prune_files(
    config: LOPConfig,
    learned: Learned,
    predict: Callable[[float], Floats],
    name: str | Path,
    out: Path,
    cut: Cut,
) -> PreTrainedModel:
    """Cut a model from file to file; see [`~LOPPruner.prune`] for errors.

    Args:
        config (`LOPConfig`): see [`prune_model`], as for `learned` and `predict`.
        learned (`Learned`): see `prune_model`.
        predict (`Callable`): see `prune_model`.
        name (`str` or `Path`): Hub id or folder of the dense model, or of one that was cut from it.
        out (`Path`): folder to write; must be new or empty.
        cut (`Cut`): what to do.

    Returns:
        `PreTrainedModel`: the pruned model on the meta device; its weights are in the folder only.
    """
    recovery = cut.recovery(config, data=False, by_name=True)
    check_by_rows(recovery)
    check_new(out)
    revision = at_base(config, name)
    base = read_config(name, **revision)
    commit = {"revision": found} if (found := getattr(base, "_commit_hash", None)) else revision
    with open_shards(name, **commit) as shards:
        skeleton = load_skeleton(name, base, shards, **commit)
        model, units = skeleton.model, prunable_units(skeleton.model, on_meta=True, cut_before=True)
        check_classes(model)
        earlier = earlier_cut(model, units) if is_cut(model) else None
        read = partial(stored_entries, skeleton, shards) if Path(name).is_dir() else None
        weights = partial(stored_output_weight, skeleton, shards)
        plan, kept, match, learned = cut.plan(config, learned, predict, model, units, earlier, weights, read)
        recovery = recovery if plan.neurons_removed else None
        kept = check_kept(units, kept)
        columns = [unit.columns(indices) for unit, indices in zip(units, kept, strict=True)]
        solver = row_solver(recovery, columns, learned.statistics, learned.directions)
        tensors = pruned_tensors(skeleton, units, kept, solver)
        record(config, model, plan, cut.method, recovery, match, earlier)
        write_pruned(model, tensors, shards, out, recovery=learned.digest() if recovery else "")
    model.name_or_path = str(out)
    return model


def seconds_on(device: torch.device, dtype: torch.dtype) -> Callable[[ModelSize], tuple[Any, Any]]:
    """Return what measures how long a unit takes for one token at several widths."""
    return partial(ffn_seconds, device=device, dtype=dtype)


def at_base(config: LOPConfig, name: str | Path) -> dict[str, Any]:
    """Return which revision of a model to load: the pruner's, where it is the very model that it was made for."""
    return {"revision": config.base_revision} if str(name) == config.base_model else {}
