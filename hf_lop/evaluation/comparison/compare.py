"""All methods on one model at the same ratios, judged on data that neither calibration nor search has seen."""

import copy
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_lop.errors import InvalidInputError
from hf_lop.evaluation.comparison.bias import add_to_output_biases, removed_means
from hf_lop.evaluation.comparison.table import Comparison, Key, Row, Rows
from hf_lop.learning.data import IGNORED, fingerprint
from hf_lop.learning.decoder.replay import record_batches
from hf_lop.learning.divergence import DenseTop
from hf_lop.learning.rewards import REWARDS, Score, by_sample, joined
from hf_lop.planning.blocks import AUTO, resolve, shown
from hf_lop.planning.budget import Budget
from hf_lop.planning.plan import Plan
from hf_lop.pruner.fit import Batches
from hf_lop.pruner.methods import METHODS, check_method, cold_seconds, usable_methods
from hf_lop.pruner.prune import Cut
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.recovery.by_layer import set_output_weights
from hf_lop.recovery.choose import FROM_DATA, RECOVERIES, choose_recovery, recovered_weights
from hf_lop.recovery.moments import second_moments
from hf_lop.units.measure import measure_size
from hf_lop.units.slice import output_weight, prunable_units, slice_units
from hf_lop.units.unit import Unit
from hf_lop.units.views import shadow

MOMENTS_BYTES = 2**32  # second moments of all layers that wait in memory for the next row


def compare(
    pruners: Sequence[LOPPruner],
    model: PreTrainedModel,
    report: Batches,
    *,
    ratios: Sequence[float] = (0.2, 0.3, 0.5, 0.7),
    methods: Sequence[str] | None = None,
    recover: Sequence[str | None] = (None,),
    data: Batches | None = None,
    rewards: Sequence[str] = ("perplexity",),
    round_to: int | Literal["auto"] = AUTO,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Prune a model by every method at every ratio, with every recovery, and judge each result on the report batches.

    Every row is a really pruned copy of the model; vision towers run once per batch in all, as the decoder's inputs are
    recorded. Memory: the model twice, and with "lstsq" up to 4 GB of second moments.

    Args:
        pruners (`Sequence[LOPPruner]`): one per seed, fitted to this model on different draws of data; the spread over
            them is the error that the tables state.
        model (`PreTrainedModel`): the dense model; only read.
        report (`Iterable[Mapping]`): batches that no pruner was calibrated or searched on. With `labels` only answers count.
        ratios (`Sequence[float]`): target ratios R, in (0, 1).
        methods (`Sequence[str]`, *optional*): of `METHODS`; by default all that every pruner can cut by.
        recover (`Sequence`): of None and `RECOVERIES`, "sequential", "lstsq", "sketch", "fold", and "bias", FLAP's own. None is the default, so that
            methods are compared as they are. Biases are not among the parameters counted.
        data (`Iterable[Mapping]`, *optional*): batches for "sequential" and "lstsq", none of them a report batch.
        rewards (`Sequence[str]`): of `REWARDS`.
        round_to (`int` or `str`): what the widths of all methods are multiples of, see [`~LOPPruner.plan`].
        folder (`str` or `Path`, *optional*): keeps finished rows in `rows.jsonl`; the same call resumes there, and a call
            with more methods, ratios or recoveries adds to them.
        progress (`bool`): show a progress bar on stderr.

    Returns:
        `Comparison`: the dense row, and one per seed, method, ratio and recovery.

    Raises:
        UnsupportedModelError: if the model cannot be pruned.
        CheckpointMismatchError: if a pruner was made for another model.
        InvalidInputError: if an argument is unknown, a pruner or the recovery has seen the report batches, or the folder
            belongs to another comparison.
    """
    pruners, report, data = list(pruners), list(report), list(data or [])
    methods = methods or _common_methods(pruners)
    units = prunable_units(model)
    size = measure_size(model, units)
    check_arguments(pruners, ratios, methods, recover, rewards, data)
    for pruner, method in itertools.product(pruners, methods):
        check_method(method, pruner.config)
    for pruner in pruners:
        pruner.config.check_fits(model, size, strict=False)
        if "sketch" in recover:
            choose_recovery("sketch", data=False, sketch=pruner.config.sketch_rows > 0)
    report_print = fingerprint(report)
    _check_unseen(pruners, report, report_print, data)
    settings: dict[str, Any] = {
        "model": {"type": model.config.model_type, **size.to_dict()},
        "weights": fingerprint([{"last output projection": output_weight(model, units[-1])}]),
        "report_sha256": report_print,
        "recovery_sha256": fingerprint(data) if data else None,
        "pruners": [_identity(pruner) for pruner in pruners],
        "rewards": list(rewards),
    }
    blocks = [resolve(round_to, size.widths, pruner.config.known.blocks)[0] for pruner in pruners]
    if max(map(max, blocks)) > 1:
        settings["round_to"] = [shown(own) for own in blocks]
    rows = Rows(folder, json.loads(json.dumps(settings)))
    wanted: list[Key] = [("dense", 0.0, None, None)] + [
        (method, float(ratio), recovery, seed)
        for seed in range(len(pruners))
        for method in dict.fromkeys(methods)
        for ratio in sorted({*ratios})
        for recovery in dict.fromkeys(recover)
    ]
    missing = [key for key in wanted if key not in rows.known]
    if not missing:
        return Comparison(tuple(rows.known[key] for key in wanted), rows.settings)
    twin = shadow(model)
    judge = _Judge(twin, report, rewards)

    @functools.cache
    def kept_moments() -> list[torch.Tensor]:
        return list(second_moments(model, data, units, memory=MOMENTS_BYTES))

    def moments() -> Iterable[torch.Tensor]:
        fit = sum(4 * width**2 for width in size.widths) <= MOMENTS_BYTES
        return kept_moments() if fit else second_moments(model, data, units)

    for key in tqdm(missing, desc="comparing", unit="row", disable=not progress):
        method, ratio, recovery, seed = key
        if seed is None:
            rows.add(Row.of(key, judge(twin), size.widths, size))
            continue
        pruner = pruners[seed]
        _prepare(
            pruner, model, units, method, ratio, round_to
        )  # the first call allocates and loads; the second is timed
        start = time.perf_counter()
        plan, kept = _prepare(pruner, model, units, method, ratio, round_to)
        seconds = time.perf_counter() - start
        pruned = _pruned(recovery, pruner, model, units, kept, data, moments)
        rows.add(Row.of(key, judge(pruned), plan.widths, size, seconds, cold_seconds(method, pruner.config)))
    return Comparison(tuple(rows.known[key] for key in wanted), rows.settings)


def _common_methods(pruners: Sequence[LOPPruner]) -> list[str]:
    usable = [usable_methods(pruner.config) for pruner in pruners]
    return [name for name in METHODS if all(name in names for names in usable)]


def _identity(pruner: LOPPruner) -> str:
    """Fingerprint of everything that a pruner plans with."""
    tables = {"search_table": pruner.config.search_table, **(pruner.config.other_tables or {})}
    values = {name: [[row["ratio"], *row["ratios"]] for row in table or []] for name, table in tables.items()}
    probes = pruner.config.probes or {}
    values |= {f"probes {name}": probes.get(name, []) for name in ("damage", "around")}
    plans = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in values.items()}
    return fingerprint([{**pruner.state_dict(), **plans}])


def _prepare(
    pruner: LOPPruner,
    model: PreTrainedModel,
    units: Sequence[Unit],
    method: str,
    ratio: float,
    round_to: int | Literal["auto"],
) -> tuple[Plan, list[torch.Tensor]]:
    """Plan one target and choose the pieces that stay."""
    cut = Cut(Budget.of(ratio, round_to=round_to), method, None, strict=False)
    planned = cut.plan(pruner.config, pruner.learned(), pruner.predict, model, units)
    return planned.plan, planned.kept


def _pruned(
    recovery: str | None,
    pruner: LOPPruner,
    model: PreTrainedModel,
    units: Sequence[Unit],
    kept: Sequence[torch.Tensor],
    data: Sequence[Mapping[str, Any]],
    moments: Callable[[], Iterable[torch.Tensor]],
) -> PreTrainedModel:
    """Cut a copy of the model, and recover it."""
    learned, weights, biases = pruner.learned(), None, None
    if recovery == "bias":
        biases = removed_means(model, units, kept, learned.statistics)
    else:
        weights = recovered_weights(
            recovery, model, units, kept, learned.statistics, learned.directions, data, moments
        )
    pruned: PreTrainedModel = copy.deepcopy(model).eval()
    cut = slice_units(pruned, kept)
    if weights is not None:
        set_output_weights(pruned, cut, weights)
    if biases is not None:
        add_to_output_biases(pruned, cut, biases)
    return pruned


class _Judge:
    """Several rewards at once, of any model that was cut from the recorded one: one run of its decoder gives them all."""

    def __init__(self, dense: nn.Module, report: Batches, kinds: Sequence[str]) -> None:
        self.kinds, self.recorded = kinds, record_batches(dense, report)
        if not all(entry.labelled for entry in self.recorded) and any(REWARDS[kind].needs_labels for kind in kinds):
            raise InvalidInputError(
                f"Of the rewards {', '.join(kinds)} one needs to know the answers, and a report batch has no labels. Pass "
                'labels (-100 outside of the answers), or use the rewards "divergence" and "perplexity".'
            )
        if not any(bool((entry.target != IGNORED).any()) for entry in self.recorded):
            raise InvalidInputError("No prediction has a known target. Pass report samples of at least two tokens.")
        self._dense: list[DenseTop | None] = [None] * len(self.recorded)
        if "divergence" in kinds:
            self._dense = [DenseTop.of(entry.logits(dense).float().log_softmax(-1)) for entry in self.recorded]

    def __call__(self, model: nn.Module) -> dict[str, Score]:
        shares: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {kind: [] for kind in self.kinds}
        for entry, dense in zip(self.recorded, self._dense, strict=True):
            log_q = entry.logits(model).float().log_softmax(-1)
            known = entry.target != IGNORED
            for kind, found in shares.items():
                counts = torch.ones_like(known) if kind == "divergence" else known
                values = REWARDS[kind].values(log_q, entry.target.clamp_min(0), dense)[counts]
                found.append(by_sample(values, entry.sample[counts], REWARDS[kind].join))
        return {kind: joined(found) for kind, found in shares.items()}


def check_arguments(
    pruners: Sequence[Any],
    ratios: Sequence[float],
    methods: Sequence[str],
    recover: Sequence[str | None],
    rewards: Sequence[str],
    data: Sequence[Any] | None,
) -> None:
    """Refuse what cannot be compared, before anything is measured; see [`compare`]."""
    known: dict[str, tuple[Sequence[Any], Iterable[Any] | None]] = {
        "pruners": (pruners, None),
        "ratios": (ratios, None),
        "methods": (methods, METHODS),
        "recover": (recover, (None, *RECOVERIES, "bias")),
        "rewards": (rewards, REWARDS),
    }
    for name, (values, choices) in known.items():
        if not values:
            raise InvalidInputError(f"{name} is empty, so there is nothing to compare. Pass at least one.")
        if choices is not None and (unknown := [value for value in values if value not in choices]):
            raise InvalidInputError(f"{name} has {unknown[0]!r}; choose from {', '.join(map(str, choices))}.")
    if wrong := [ratio for ratio in ratios if not 0 < ratio < 1]:
        raise InvalidInputError(f"ratios has {wrong[0]}; each must be in (0, 1), the dense model is always compared.")
    for name in FROM_DATA:
        if name in recover and not data:
            raise InvalidInputError(
                f'recover="{name}" needs data, batches of model inputs. Pass data=..., or use "sketch".'
            )


def _check_unseen(
    pruners: Sequence[LOPPruner],
    report: Sequence[Mapping[str, Any]],
    report_print: str,
    data: Sequence[Mapping[str, Any]],
) -> None:
    """Refuse report batches, given with their fingerprint, that calibration, search or recovery used."""
    for seed, pruner in enumerate(pruners):
        for use in ("calibration", "search"):
            if (pruner.config.calibration or {}).get(f"{use}_sha256") == report_print:
                raise InvalidInputError(
                    f"The report batches are the {use} data of pruner {seed} (fingerprint {report_print}), so they would flatter "
                    "it. Pass data that no pruner has seen."
                )
    if {fingerprint([batch]) for batch in report} & {fingerprint([batch]) for batch in data}:
        raise InvalidInputError(
            "A report batch is among the batches for recovery, so it would flatter it. Pass other batches as data."
        )
