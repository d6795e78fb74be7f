"""Cutting a model to a budget with what a pruner knows."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

import hf_lop
from hf_lop.errors import InvalidInputError
from hf_lop.ffn.discovery import prunable_ffns
from hf_lop.ffn.moments import second_moments
from hf_lop.ffn.size import measure_size
from hf_lop.ffn.slicing import slice_ffns
from hf_lop.hub.loading import load_model
from hf_lop.methods import METHODS, check_method, choose
from hf_lop.plan import plan_budget, read_budget
from hf_lop.recoveries import choose_recovery, fit_recovery

if TYPE_CHECKING:
    from hf_lop.pruner import LOPPruner


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
    kind, _ = read_budget(budgets)
    check_method(method, pruner.config)
    recover = choose_recovery(recover, data=data is not None, sketch=pruner.config.sketch_rows > 0)
    if isinstance(model, str | Path):
        if kind not in ("memory", "latency"):  # those depend on the dtype of the model
            pruner.plan(**budgets, round_to=round_to)  # refuses before the model is fetched
        at_base = {"revision": pruner.config.base_revision} if str(model) == pruner.config.base_model else {}
        model = load_model(model, **at_base)
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a {type(model).__name__}; pass a model, a Hub id or a folder.")
    ffns = prunable_ffns(model)
    size = measure_size(model, ffns)
    pruner.config.check_fits(model, size, strict=strict)
    weight = ffns[0].modules(model)[1].weight
    ratios, order = choose(method, pruner, model, ffns)
    plan = plan_budget(ratios, size, budgets, round_to=round_to, device=weight.device, dtype=weight.dtype)
    kept = [neurons[:width] for neurons, width in zip(order, plan.widths, strict=True)]
    write = fit_recovery(recover, pruner, model, ffns, kept, lambda: second_moments(model, data or (), ffns))
    write(model, slice_ffns(model, kept))
    source, commit = hub_id(model.name_or_path), getattr(model.config, "_commit_hash", None)
    known = source in (None, pruner.config.base_model)  # another repository's commit would say nothing
    model.config.pruning_config = {
        "method": method,
        "recovery": recover,
        "ratio": round(plan.pruning_ratio, 6),
        "criterion": METHODS[method].criterion or pruner.config.criterion,
        "round_to": round_to,
        "base_model": source or pruner.config.base_model,
        "base_revision": commit or (pruner.config.base_revision if known else None),
        "pruner": hub_id(pruner.name_or_path),
        "pruner_revision": getattr(pruner.config, "_commit_hash", None),
        "dense_widths": list(size.widths),
        "dense_parameters": size.parameters,
        "dense_bytes": size.num_bytes,
        "hf_lop_version": hf_lop.__version__,
    }
    return model


def hub_id(name: str | None) -> str | None:
    """Return a Hub id, or None for a path of this machine: that must not end up on the Hub."""
    return name if name and not Path(name).exists() and not Path(name).is_absolute() else None
