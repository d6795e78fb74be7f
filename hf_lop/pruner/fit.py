"""Learning what a pruner knows: neuron order, statistics, and a table of (target, layer ratios) pairs.

Calibration batches give the statistics; validation batches, which should be others, give the damage of single-layer cuts
and the rewards of the search.
"""

import contextlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_lop.errors import InvalidInputError
from hf_lop.hub.read.load import load_model, load_processor
from hf_lop.learning.data import fingerprint, fitting_parts, part_batches
from hf_lop.learning.importance import CRITERIA, neuron_order, unit_importance
from hf_lop.learning.probes import probe_layers
from hf_lop.learning.processes import Processes, launched
from hf_lop.learning.rewards import Judge, reward_name, scorer
from hf_lop.learning.sketch import Sketch, Sketcher
from hf_lop.learning.statistics import Statistics, collect_statistics
from hf_lop.planning.additive import additive_plans
from hf_lop.planning.budget import positive_integer
from hf_lop.planning.cmaes import CMAES
from hf_lop.planning.journal import Journal
from hf_lop.planning.mcts import MCTS
from hf_lop.planning.table import MakeSearch, learn_table
from hf_lop.pruner.kept import Clock, kept_array
from hf_lop.recovery.solve import solve_sketch
from hf_lop.units.measure import measure_size
from hf_lop.units.size import ModelSize
from hf_lop.units.slice import output_weight, prunable_units
from hf_lop.units.unit import Unit
from hf_lop.units.views import OutputWeights

Batches = Iterable[Mapping[str, Any]]

PROBE_RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.95)
CONTEXT = 0.5  # layers are also probed where all others are cut to this
SEARCHES = ("additive", "mcts", "cmaes")


@dataclass(frozen=True, slots=True)
class Learned:
    """What fitting found out about a model.

    Attributes:
        size (`ModelSize`): of the dense model.
        dtype (`str`): of its FFN weights.
        statistics (`list[Statistics]`): one per layer.
        sketches (`list[Sketch]`): one per layer; empty if none was asked for, or there were fewer tokens than neurons.
        order (`list[torch.Tensor]`): neurons of each layer from most to least important, `[n] int64`.
        table (`list[dict]`): rows `{"ratio": R, "ratios": [L floats]}`, those of a search with their `reward`.
        probes (`dict`): what single-layer cuts cost, see [`LOPConfig`].
        provenance (`dict`): search, reward, a fingerprint of each set of data, and seconds per phase.
    """

    size: ModelSize
    dtype: str
    statistics: list[Statistics]
    sketches: list[Sketch]
    order: list[torch.Tensor]
    table: list[dict[str, Any]]
    probes: dict[str, Any]
    provenance: dict[str, Any]


def check_arguments(
    search: str,
    criterion: str,
    reward: str | Judge,
    targets: Sequence[float],
    evaluations: int,
    recover: str | None,
    sketch_rows: int,
) -> None:
    """Refuse what cannot be fitted, before any work; see [`~LOPPruner.fit`] for the arguments.

    Raises:
        InvalidInputError: if an argument is unknown or out of its range.
    """
    for name, value, known in (("search", search, SEARCHES), ("criterion", criterion, CRITERIA)):
        if value not in known:
            raise InvalidInputError(f"{name} is {value!r}; choose one of {', '.join(known)}.")
    if reward_name(reward) != "divergence" and search == "additive":
        raise InvalidInputError(
            f'reward is {reward_name(reward)}, which search="additive" never looks at: its plans come from the divergence of '
            'single-layer probes. Use search="mcts" or "cmaes", or leave the reward out.'
        )
    if recover not in (None, "sketch"):
        raise InvalidInputError(f'recover is {recover!r}; candidates can be judged after "sketch" or None.')
    if recover and not sketch_rows:
        raise InvalidInputError('recover="sketch" needs a sketch, and sketch_rows is 0. Leave one of the two out.')
    positive_integer("evaluations", evaluations)
    if not len(targets) or not all(0 <= target < 1 for target in targets):
        raise InvalidInputError(f"targets is {list(targets)}; pass at least one target ratio in [0, 1).")


def prepare(
    model: PreTrainedModel | str | Path,
    data: Any,
    validation: Batches | None,
    *,
    processor: Any,
    samples: int,
    search_samples: int,
    report_samples: int | None,
    batch_size: int,
    max_length: int | None,
    seed: int,
) -> tuple[PreTrainedModel, Batches, Batches, dict[str, Any]]:
    """Return the model, calibration and validation batches, and what to record of the samples they are made of.

    See [`~LOPPruner.fit`] for the arguments.

    Raises:
        UnsupportedModelError: if the model cannot be pruned.
        InvalidInputError: if there are too few samples, or they are of another kind.
    """
    parts: dict[str, list[Any]] = {}
    facts: dict[str, Any] = {}
    if validation is None:
        parts, facts = fitting_parts(data, samples, search_samples, report_samples, seed)
    if isinstance(model, str | Path):
        processes, model = launched(), load_model(model)
        model = model.to(processes.device) if processes.count > 1 else model  # type: ignore[arg-type]
    prunable_units(model)  # refuses a model before its data is prepared
    if validation is not None:
        return model, data, validation, facts
    processor = load_processor(str(model.name_or_path)) if processor is None else processor
    batches = {
        part: part_batches(processor, part, rows, batch_size=batch_size, max_length=max_length)
        for part, rows in parts.items()
    }
    if "report" in batches:
        facts["report_sha256"] = fingerprint(batches["report"])
    return model, batches["calibration"], batches["search"], facts


def calibrate(
    model: PreTrainedModel, calibration: Batches, units: list[Unit], sketch_rows: int, seed: int, processes: Processes
) -> tuple[list[Statistics], list[Sketch]]:
    """Collect statistics and sketches in one pass; no sketch, with a warning, of fewer tokens than neurons."""
    if not sketch_rows:
        return collect_statistics(model, calibration, units, processes), []
    widths = [unit.count for unit in units]
    sketcher = Sketcher(widths, sketch_rows, seed=seed)
    statistics = collect_statistics(model, calibration, units, processes, also=sketcher.add)
    sketcher.join(processes)
    if any(tokens < width for tokens, width in zip(sketcher.tokens, widths, strict=True)):
        warnings.warn(
            f"Calibration has {min(sketcher.tokens)} tokens for layers of up to {max(widths)} neurons. Least squares on so "
            "few does harm, so no sketch is kept. Calibrate on more samples.",
            stacklevel=4,
        )
        return statistics, []
    return statistics, [Sketch.of(directions) for directions in sketcher.result(statistics)]


def sketched_outputs(
    model: PreTrainedModel,
    units: Sequence[Unit],
    order: Sequence[torch.Tensor],
    sketches: Sequence[Sketch],
    statistics: Sequence[Statistics],
) -> OutputWeights:
    """Return what gives a layer's output projection at any width, recovered from its sketch.

    Raises:
        InvalidInputError: if there is no sketch.
    """
    if not sketches:
        raise InvalidInputError(
            'recover="sketch" needs a sketch, which takes more calibration tokens than a layer has neurons. Calibrate on more '
            "samples, or leave recover out."
        )
    directions = [sketch.directions() for sketch in sketches]
    weights = [output_weight(model, unit) for unit in units]

    def output(layer: int, width: int) -> torch.Tensor:
        return solve_sketch(weights[layer], directions[layer], statistics[layer].square, order[layer][:width])

    return output


def learn(
    model: PreTrainedModel,
    calibration: Batches,
    validation: Batches,
    *,
    criterion: str,
    search: str,
    reward: str | Judge,
    targets: Sequence[float],
    evaluations: int,
    seed: int,
    journal: str | Path | None,
    sketch_rows: int,
    recover: str | None,
) -> Learned:
    """Calibrate, probe every layer, plan every target; see [`~LOPPruner.fit`] and `check_arguments` for the arguments.

    With a journal, probes and evaluations are kept there, and a killed call resumes to the same result. Several processes,
    which all call this with the same arguments, split every batch-wise measurement; the main one runs the search and keeps
    the journal.

    Raises:
        UnsupportedModelError: if the model cannot be pruned.
        InvalidInputError: if there is no data, the journal belongs to other data or settings, or processes were given
            different data.
        ProcessError: if another process failed.
    """
    units = prunable_units(model)
    size = measure_size(model, units)
    calibration, validation = list(calibration), list(validation)
    prints = {"calibration_sha256": fingerprint(calibration), "search_sha256": fingerprint(validation)}
    if len(set(prints.values())) == 1:
        warnings.warn("Calibration and search use the same data; plans will look better than they are.", stacklevel=3)
    processes = launched()
    processes.agree("The fingerprints of data or model", {**prints, "parameters": size.parameters})
    clock = Clock(journal, processes)
    statistics, sketches = calibrate(model, calibration, units, sketch_rows, seed, processes)
    order = processes.from_main(lambda: neuron_order(unit_importance(model, units, criterion, statistics)))
    clock.stop("calibration")
    provenance: dict[str, Any] = {"search": search, **prints}
    outputs = None
    if recover:
        outputs = sketched_outputs(model, units, order, sketches, statistics)
        provenance["recovery"] = recover
    settings: dict[str, Any] = {
        "model": {"type": model.config.model_type, **size.to_dict()},
        "order_sha256": sha256(torch.cat(order).numpy().tobytes()).hexdigest()[:16],
        "criterion": criterion,
        "probe_ratios": PROBE_RATIOS,
        "context": CONTEXT,
        **prints,
        **({"recovery": recover} if recover else {}),
    }

    def probe() -> np.ndarray:
        return probe_layers(model, units, order, validation, PROBE_RATIOS, (0.0, CONTEXT), processes, outputs)

    damage = probe() if journal is None else kept_array(Path(journal) / "probes.json", settings, probe, processes)
    clock.stop("probes")
    damage = np.vectorize(lambda value: float(f"{value:.6g}"))(damage)  # what the config can hold, so that plans agree

    def additive(goals: Sequence[float]) -> np.ndarray:
        alone, around = damage
        return additive_plans(alone, PROBE_RATIOS, size.widths, goals, around=around, context=CONTEXT)

    if search == "additive":
        table = [
            {"ratio": round(float(target), 5), "ratios": np.round(plan, 5).tolist()}
            for target, plan in zip(targets, additive(targets), strict=True)
        ]
    else:
        provenance |= {"reward": reward_name(reward), "evaluations per target": evaluations, "seed": seed}
        scored = scorer(model, order, validation, reward, processes, outputs)
        dense = np.array(size.widths)

        def worth(ratios: np.ndarray) -> float:
            return processes.together(scored, np.rint(dense * (1 - ratios)).astype(int).tolist()).value

        engine: MakeSearch = partial({"mcts": MCTS, "cmaes": CMAES}[search], seed=seed)

        def searched() -> tuple[list[dict[str, Any]], float]:
            kept = (
                Journal(journal, {**settings, "reward": reward_name(reward)}) if journal else contextlib.nullcontext()
            )
            with kept as log:
                known = 0 if log is None else len(log)
                found = learn_table(
                    engine,
                    worth,
                    size.widths,
                    targets,
                    starts=lambda target: list(additive([target])),
                    evaluations=evaluations,
                    journal=log,
                    progress=True,
                )
                # A resumed search measured a part of its evaluations only; the others took as long.
                whole = 1.0 if log is None or known == len(log) else len(log) / (len(log) - known)
            return found, whole

        table, whole = processes.from_main(searched, serve=scored)
        clock.stop(search, whole)
    dtype = str(output_weight(model, units[0]).dtype).removeprefix("torch.")
    provenance["seconds"] = clock.seconds
    alone, around = damage.tolist()
    probes = {"ratios": PROBE_RATIOS, "damage": alone, "context": CONTEXT, "around": around}
    return Learned(size, dtype, statistics, sketches, order, table, probes, provenance)
