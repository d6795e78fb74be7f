"""Cutting a model to a budget with what a pruner knows."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lop.errors import InvalidInputError, UnsupportedModelError
from hf_lop.hub.read.checkpoint import open_shards
from hf_lop.hub.read.load import load_model, read_config
from hf_lop.hub.read.names import hub_id
from hf_lop.hub.read.skeleton import load_skeleton
from hf_lop.hub.write.pruned_tensors import pruned_tensors, stored_output_weight
from hf_lop.hub.write.stream import write_pruned
from hf_lop.hub.write.whole import check_new
from hf_lop.learning.data import fingerprint
from hf_lop.planning.plan import Plan, plan_budget, read_budget
from hf_lop.pruner.methods import METHODS, check_method, choose
from hf_lop.pruner.sorting import twin_for
from hf_lop.recovery.by_layer import set_output_weights
from hf_lop.recovery.choose import check_by_rows, choose_recovery, recovered_weights, row_solver
from hf_lop.units.configs import FORMAT
from hf_lop.units.measure import measure_size
from hf_lop.units.slice import check_kept, output_weight, prunable_units, slice_units
from hf_lop.version import __version__

if TYPE_CHECKING:
    from hf_lop.pruner.pruner import LOPPruner


def prune_model(
    pruner: "LOPPruner",
    model: PreTrainedModel | str | Path,
    budgets: dict[str, Any],
    *,
    round_to: int,
    method: str,
    recover: str | None,
    data: Iterable[Mapping[str, Any]] | None,
    strict: bool,
) -> PreTrainedModel:
    """Cut a model in place; see [`~LOPPruner.prune`] for arguments and errors.

    Args:
        pruner (`LOPPruner`): of this model.
        model (`PreTrainedModel`, `str` or `Path`): the dense model.
        budgets (`dict`): value or None by kind of budget, one of them given.
        round_to (`int`): see `prune`, as for the others.
        method (`str`): see `prune`.
        recover (`str`, *optional*): see `prune`.
        data (`Iterable[Mapping]`, *optional*): see `prune`.
        strict (`bool`): see `prune`.

    Returns:
        `PreTrainedModel`: the same object.
    """
    asked, named = recover, isinstance(model, str | Path)
    recover = _check(
        pruner, budgets, round_to=round_to, method=method, recover=recover, data=data is not None, by_name=named
    )
    if isinstance(model, str | Path):
        model = load_model(model, **_revision(pruner, model))
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a {type(model).__name__}; pass a model, a Hub id or a folder.")
    pruner = twin_for(pruner, model)
    units = prunable_units(model)
    size = measure_size(model, units)
    pruner.config.check_fits(model, size, strict=strict)
    weight = output_weight(model, units[0])
    ratios, order = choose(method, pruner, model, units)
    plan = plan_budget(ratios, size, budgets, round_to=round_to, device=weight.device, dtype=weight.dtype)
    kept = [neurons[:width] for neurons, width in zip(order, plan.widths, strict=True)]
    recover = recover if plan.neurons_removed else None
    batches = list(data or ())

    def recovered(name: str | None) -> list[torch.Tensor] | None:
        return recovered_weights(name, model, units, kept, pruner.statistics(), pruner.directions_of, batches)

    try:
        weights = recovered(recover)
    except UnsupportedModelError:
        if asked != "auto" or recover != "sequential":
            raise
        recover = "lstsq"
        weights = recovered(recover)
    cut = slice_units(model, kept)
    if weights is not None:
        set_output_weights(model, cut, weights)
    record(pruner, model, plan, method=method, recovery=recover, round_to=round_to)
    return model


def prune_files(
    pruner: "LOPPruner",
    name: str | Path,
    out: str | Path,
    budgets: dict[str, Any],
    *,
    round_to: int,
    method: str,
    recover: str | None,
    strict: bool,
) -> PreTrainedModel:
    """Cut a model from file to file; see [`~LOPPruner.prune`] for arguments and errors.

    Args:
        pruner (`LOPPruner`): of this model.
        name (`str` or `Path`): Hub id or folder of the dense model.
        out (`str` or `Path`): folder to write; must be new or empty.
        budgets (`dict`): value or None by kind of budget, one of them given.
        round_to (`int`): see `prune`, as for the others.
        method (`str`): see `prune`.
        recover (`str`, *optional*): see `prune`.
        strict (`bool`): see `prune`.

    Returns:
        `PreTrainedModel`: the pruned model on the meta device; its weights are in the folder only.
    """
    recover = _check(pruner, budgets, round_to=round_to, method=method, recover=recover, data=False, by_name=True)
    check_by_rows(recover)
    check_new(Path(out))
    revision = _revision(pruner, name)
    config = read_config(name, **revision)
    commit = {"revision": found} if (found := getattr(config, "_commit_hash", None)) else revision
    with open_shards(name, **commit) as shards:
        skeleton = load_skeleton(name, config, shards, **commit)
        model, units = skeleton.model, prunable_units(skeleton.model, on_meta=True)
        size, pruner = measure_size(model, units), twin_for(pruner, model)
        pruner.config.check_fits(model, size, strict=strict)
        ratios, order = choose(method, pruner, model, units, partial(stored_output_weight, skeleton, shards))
        dtype = output_weight(model, units[0]).dtype
        plan = plan_budget(ratios, size, budgets, round_to=round_to, device=torch.device("cpu"), dtype=dtype)
        recover = recover if plan.neurons_removed else None
        kept = check_kept(units, [neurons[:width] for neurons, width in zip(order, plan.widths, strict=True)])
        columns = [unit.columns(indices) for unit, indices in zip(units, kept, strict=True)]
        solver = row_solver(recover, columns, pruner.statistics(), pruner.directions_of)
        tensors = pruned_tensors(skeleton, units, kept, solver)
        record(pruner, model, plan, method=method, recovery=recover, round_to=round_to)
        write_pruned(
            model, tensors, shards, Path(out), recovery=fingerprint([dict(pruner.named_buffers())]) if recover else ""
        )
    model.name_or_path = str(out)
    return model


def _check(
    pruner: "LOPPruner",
    budgets: dict[str, Any],
    *,
    round_to: int,
    method: str,
    recover: str | None,
    data: bool,
    by_name: bool,
) -> str | None:
    """Refuse arguments before any work, and return the recovery to use."""
    kind, _ = read_budget(budgets)
    check_method(method, pruner.config)
    recover = choose_recovery(recover, data=data, sketch=pruner.config.sketch_rows > 0)
    if by_name and kind not in ("memory", "latency"):  # those depend on the dtype of the model
        pruner.plan(**budgets, round_to=round_to)  # refuses before the model is fetched
    return recover


def _revision(pruner: "LOPPruner", name: str | Path) -> dict[str, Any]:
    return {"revision": pruner.config.base_revision} if str(name) == pruner.config.base_model else {}


def record(
    pruner: "LOPPruner", model: Any, plan: Plan, *, method: str = "lop", recovery: str | None = None, round_to: int = 1
) -> None:
    """Let the config of a model that was just cut say how."""
    criterion = METHODS[method].criterion or pruner.config.criterion
    # Probes say nothing about another neuron order than the pruner's, nor, where they were recovered, about models that are not.
    judged = (pruner.config.calibration or {}).get("recovery")
    probed = criterion == pruner.config.criterion and judged in (None, recovery)
    estimate = pruner.config.estimate(plan.widths) if probed else None
    vars(model.config).pop("elastic_config", None)  # a cut model is elastic no more
    model.config.pruning_config = {
        "method": method,
        "recovery": recovery,
        "ratio": round(plan.pruning_ratio, 6),
        "criterion": criterion,
        "round_to": round_to,
        **provenance(pruner, model),
        "dense_widths": list(plan.dense.widths),
        "dense_parameters": plan.dense.parameters,
        "dense_bytes": plan.dense.num_bytes,
        "dense_flops": plan.dense.flops,
        "flops": plan.flops,
        "estimated_divergence": None if estimate is None else float(f"{estimate:.4g}"),
        "calibration": pruner.config.calibration,
        "format": FORMAT,
    }


def provenance(pruner: "LOPPruner", model: Any) -> dict[str, Any]:
    """Return what a model and its pruner came from, as configs say it."""
    source, commit = hub_id(model.name_or_path), getattr(model.config, "_commit_hash", None)
    known = source in (None, pruner.config.base_model)  # another repository's commit would say nothing
    return {
        "base_model": source or pruner.config.base_model,
        "base_revision": commit or (pruner.config.base_revision if known else None),
        "pruner": hub_id(pruner.name_or_path),
        "pruner_revision": getattr(pruner.config, "_commit_hash", None),
        "hf_lop_version": __version__,
    }
