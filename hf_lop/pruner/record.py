"""What the config of a model says that was just cut: how, and what it came from."""

import warnings
from typing import Any

from transformers import PreTrainedModel

from hf_lop.hub.read.names import origin
from hf_lop.learning.config import LOPConfig
from hf_lop.learning.learned import Learned
from hf_lop.planning.blocks import shown
from hf_lop.planning.plan import Plan
from hf_lop.pruner.methods import METHODS
from hf_lop.units.checks import FORMAT
from hf_lop.units.identity import check_identity, is_in_memory, read_memory
from hf_lop.units.kept import Earlier, Read, sorted_by
from hf_lop.version import __version__


def matched(
    config: LOPConfig,
    learned: Learned,
    model: PreTrainedModel,
    *,
    strict: bool = False,
    read: Read | None = read_memory,
    earlier: Earlier | None = None,
) -> str:
    """Compare a model's weights with those of the base; a warning says if they are near, see [`check_identity`].

    Returns:
        `str`: "same", "near", or "unknown": the pruner has no fingerprint, or the weights cannot be read one by one.
    """
    source, commit = origin(model)
    stored = None if read is None or (read is read_memory and not is_in_memory(model)) else learned.identity
    if stored is None and commit is not None and (source, commit) == (config.base_model, config.base_revision):
        return "same"  # what is in memory may have been trained since it was loaded
    match = check_identity(stored, model, config.base_model, strict=strict, read=read or read_memory, earlier=earlier)
    if match == "near":
        warnings.warn(
            f"The weights of this model are near those of {config.base_model or 'the base'} that this pruner was made of, not the "
            "same: orders and statistics are of the latter. Measure what comes out, or fit a pruner of its own.",
            stacklevel=5,
        )
    return match


def record(
    config: LOPConfig,
    model: Any,
    plan: Plan,
    method: str = "lop",
    recovery: str | None = None,
    match: str = "unknown",
    earlier: Earlier | None = None,
) -> None:
    """Let the config of a model that was just cut say how.

    Args:
        config (`LOPConfig`): of the pruner.
        model (`PreTrainedModel`): the model.
        plan (`Plan`): its widths.
        method (`str`): one of `METHODS`.
        recovery (`str`, *optional*): one of `RECOVERIES`.
        match (`str`): see [`matched`].
        earlier (`Earlier`, *optional*): the cut behind this one.
    """
    criterion = METHODS[method].criterion or config.criterion
    # Probes say nothing about another neuron order than the pruner's, nor, where they were recovered, about models that are not.
    judged = (config.calibration or {}).get("recovery")
    probed = criterion == config.criterion and judged in (None, recovery)
    if earlier is not None:
        probed = probed and earlier.made.get("criterion") == criterion
    estimate = config.estimate(plan.widths) if probed else None
    order = sorted_by(model.config)
    mark = vars(model.config).pop("elastic_config", None)  # a cut model is elastic no more
    if isinstance(mark, dict) and mark.get("base_match") == "near":
        match = "near"  # what an elastic model's pruner knows is of the base that this was near
    model.config.pruning_config = {
        "method": method,
        "recovery": recovery,
        "ratio": round(plan.pruning_ratio, 6),
        "criterion": criterion,
        "round_to": shown(plan.round_to) if plan.round_to else 1,
        **(provenance(config, model) if earlier is None else _continued(config, model, earlier)),
        "dense_widths": list(plan.dense.widths),
        "dense_parameters": plan.dense.parameters,
        "dense_bytes": plan.dense.num_bytes,
        "dense_flops": plan.dense.flops,
        "flops": plan.flops,
        "estimated_divergence": None if estimate is None else float(f"{estimate:.4g}"),
        "base_match": match,
        "calibration": config.calibration,
        "format": FORMAT,
        **({} if order is None else {"sorted_by": order}),
    }


def provenance(config: LOPConfig, model: Any) -> dict[str, Any]:
    """Return what a model and its pruner came from, as configs say it."""
    source, commit = origin(model)
    pruner, pruner_commit = origin(config)
    known = source in (None, config.base_model)  # another repository's commit would say nothing
    return {
        "base_model": source or config.base_model,
        "base_revision": commit or (config.base_revision if known else None),
        "pruner": pruner,
        "pruner_revision": pruner_commit,
        "hf_lop_version": __version__,
    }


def _continued(config: LOPConfig, model: Any, earlier: Earlier) -> dict[str, Any]:
    """Return what a model came from that was cut before: the base is that of the first cut."""
    found, made = provenance(config, model), earlier.made
    base = {key: made.get(key) for key in ("base_model", "base_revision")}
    before = {key: made.get(key) for key in ("method", "recovery", "ratio")}
    if found["base_model"] not in (None, base["base_model"]):
        before |= {"model": found["base_model"], "revision": found["base_revision"]}
    return {**found, **base, "cut_before": before}
