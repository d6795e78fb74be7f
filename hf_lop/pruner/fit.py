"""Making a pruner, the paper in five steps: calibrate, order, probe, plan the targets, train.

Calibration batches give the statistics; validation batches, which should be others, give the damage of single-layer cuts
and the rewards of the search.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_lop.errors import InvalidInputError
from hf_lop.learning.bench import Bench
from hf_lop.learning.data import fingerprint
from hf_lop.learning.importance import neuron_order, unit_importance
from hf_lop.learning.learned import Learned
from hf_lop.learning.predictors import RatioPredictor, build_predictor, train_predictor
from hf_lop.learning.probes import probe_layers, probed_width
from hf_lop.learning.rewards import reward_name, scorer
from hf_lop.learning.sketch import Sketch, Sketcher
from hf_lop.learning.statistics import Statistics, collect_statistics
from hf_lop.planning.additive import additive_plans
from hf_lop.planning.blocks import Blocks, resolve
from hf_lop.planning.budget import Floats
from hf_lop.planning.journal import Journal
from hf_lop.planning.search.space import SearchSpace
from hf_lop.planning.table import learn_table, training_pairs
from hf_lop.pruner.kept import Run
from hf_lop.pruner.recipe import ENGINES, Recipe
from hf_lop.recovery.solve import solve_sketch
from hf_lop.units.identity import is_in_memory, sample_weights
from hf_lop.units.measure import measure_size
from hf_lop.units.size import ModelSize
from hf_lop.units.slice import output_weight, prunable_units
from hf_lop.units.unit import Unit
from hf_lop.units.views import OutputWeights

Batches = Iterable[Mapping[str, Any]]
Table = list[dict[str, Any]]

PROBE_RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.95)
CONTEXT = 0.5  # layers are also probed where all others are cut to this


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit gives.

    Attributes:
        learned (`Learned`): order, statistics and sketches.
        blocks (`tuple[int, ...]`): `[L]` what the widths of probes and candidates are multiples of.
        table (`list[dict]`): rows `{"ratio": R, "ratios": [L floats]}`, those of a search with their `reward`.
        probes (`dict`): what single-layer cuts cost, see [`LOPConfig`].
        predictor (`RatioPredictor`): trained on the table.
        loss (`float`): mean squared error of its layer ratios.
        provenance (`dict`): search, reward, a fingerprint of each set of data, and seconds per phase.
    """

    learned: Learned
    blocks: Blocks
    table: Table
    probes: dict[str, Any]
    predictor: RatioPredictor
    loss: float
    provenance: dict[str, Any]


def fit(model: PreTrainedModel, calibration: Batches, validation: Batches, recipe: Recipe, run: Run) -> Fitted:
    """Make what a pruner is made of; the model is only read.

    With a journal, probes and evaluations are kept there, and a killed call resumes to the same result. Several processes,
    which all call this with the same arguments, split every batch-wise measurement; the main one runs the search and keeps
    the journal.

    Args:
        model (`PreTrainedModel`): the dense model.
        calibration (`Iterable[Mapping]`): batches for statistics.
        validation (`Iterable[Mapping]`): other batches, on which plans are judged.
        recipe (`Recipe`): how.
        run (`Run`): keeps the results of every phase.

    Raises:
        UnsupportedModelError: if the model cannot be pruned.
        InvalidInputError: if there is no data, the journal belongs to other data or settings, or processes were given
            different data.
        ProcessError: if another process failed.
    """
    units = prunable_units(model)
    size = measure_size(model, units)
    blocks, notes = resolve(recipe.round_to, size.widths)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    ratios = probe_ratios(size.widths, blocks)
    calibration, validation = list(calibration), list(validation)
    prints = check_data(calibration, validation, size, run)

    with run.phase("calibration"):
        statistics, sketches = calibrate(model, units, calibration, recipe, run)
        order = run.processes.from_main(
            lambda: neuron_order(unit_importance(model, units, recipe.criterion, statistics))
        )
    run.settings = settings_of(model, size, order, recipe, blocks, ratios) | prints
    bench = judge_of(model, units, order, statistics, sketches, validation, recipe, run)
    with run.phase("probes"):
        shape = (2, len(units), len(ratios))
        damage = run.array("probes", shape, lambda: probe_layers(bench, ratios, (0.0, CONTEXT), blocks))
    table = plan_targets(damage, ratios, size, blocks, bench, recipe, run)
    with run.phase("predictor"):
        predictor, loss = train(table, len(units), recipe)

    dtype = str(output_weight(model, units[0]).dtype).removeprefix("torch.")
    identity = sample_weights(model) if is_in_memory(model) else None
    learned = Learned(size, dtype, order, statistics, sketches, identity=identity)
    alone, around = _stored(damage).tolist()
    probes = {"ratios": ratios, "damage": alone, "context": CONTEXT, "around": around}
    provenance: dict[str, Any] = {
        "search": recipe.search,
        **prints,
        **({"recovery": recipe.recover} if recipe.recover else {}),
    }
    if recipe.search in ENGINES:
        provenance |= {"reward": reward_name(recipe.reward), "evaluations per target": recipe.evaluations}
        provenance |= {"seed": recipe.seed}
    return Fitted(learned, blocks, table, probes, predictor, loss, {**provenance, "seconds": run.seconds})


def check_data(
    calibration: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], size: ModelSize, run: Run
) -> dict[str, str]:
    """Return the fingerprints of the data; warn where both sets are the same.

    Raises:
        InvalidInputError: if processes were given different data.
    """
    prints = {"calibration_sha256": fingerprint(calibration), "search_sha256": fingerprint(validation)}
    if len(set(prints.values())) == 1:
        warnings.warn("Calibration and search use the same data; plans will look better than they are.", stacklevel=4)
    run.processes.agree("The fingerprints of data or model", {**prints, "parameters": size.parameters})
    return prints


def calibrate(
    model: PreTrainedModel, units: Sequence[Unit], calibration: Batches, recipe: Recipe, run: Run
) -> tuple[list[Statistics], list[Sketch]]:
    """Collect statistics and sketches in one pass; no sketch, with a warning, of fewer tokens than neurons.

    Source: LOP (arXiv 2506.12826), Eq. 25.
    """
    if not recipe.sketch_rows:
        return collect_statistics(model, calibration, list(units), run.processes), []
    widths = [unit.features for unit in units]
    sketcher = Sketcher(widths, recipe.sketch_rows, seed=recipe.seed)
    statistics = collect_statistics(model, calibration, list(units), run.processes, also=sketcher.add)
    sketcher.join(run.processes)
    if any(tokens < width for tokens, width in zip(sketcher.tokens, widths, strict=True)):
        warnings.warn(
            f"Calibration has {min(sketcher.tokens)} tokens for layers of up to {max(widths)} neurons. Least squares on so "
            "few does harm, so no sketch is kept. Calibrate on more samples.",
            stacklevel=4,
        )
        return statistics, []
    return statistics, [Sketch.of(directions) for directions in sketcher.result(statistics)]


def settings_of(
    model: PreTrainedModel,
    size: ModelSize,
    order: Sequence[torch.Tensor],
    recipe: Recipe,
    blocks: Blocks,
    ratios: Sequence[float],
) -> dict[str, Any]:
    """Return what probes and rewards depend on."""
    return {
        "model": {"type": model.config.model_type, **size.to_dict()},
        "order_sha256": sha256(torch.cat(list(order)).numpy().tobytes()).hexdigest()[:16],
        "criterion": recipe.criterion,
        "probe_ratios": ratios,
        "context": CONTEXT,
        **({"round_to": blocks} if max(blocks) > 1 else {}),
        **({"recovery": recipe.recover} if recipe.recover else {}),
    }


def judge_of(
    model: PreTrainedModel,
    units: Sequence[Unit],
    order: Sequence[torch.Tensor],
    statistics: Sequence[Statistics],
    sketches: Sequence[Sketch],
    validation: Batches,
    recipe: Recipe,
    run: Run,
) -> Bench:
    """Return the model ready to judge its plans, recovered from the sketch where candidates shall be.

    Raises:
        InvalidInputError: if they shall be, and there is no sketch.
    """
    outputs: OutputWeights | None = None
    if recipe.recover:
        if not sketches:
            raise InvalidInputError(
                'recover="sketch" needs a sketch, which takes more calibration tokens than a layer has neurons. Calibrate on '
                "more samples, or leave recover out."
            )
        directions = [sketch.directions() for sketch in sketches]
        weights = [output_weight(model, unit) for unit in units]

        def outputs(layer: int, width: int) -> torch.Tensor:
            kept = units[layer].columns(order[layer][:width])
            return solve_sketch(weights[layer], directions[layer], statistics[layer].square, kept)

    return Bench(model, order, validation, run.processes, outputs, units)


def _stored(damage: np.ndarray) -> np.ndarray:
    """Round probes to what a config holds, so that plans made before and after saving agree."""
    rounded: np.ndarray = np.vectorize(lambda value: float(f"{value:.6g}"))(damage)
    return rounded


def probe_ratios(widths: Sequence[int], blocks: Blocks) -> tuple[float, ...]:
    """Return the ratios at which layers are probed: where blocks are alike, those that whole blocks give."""
    if max(blocks) == 1 or len(set(widths)) > 1:
        return PROBE_RATIOS
    found = {1 - probed_width(widths[0], ratio, blocks[0]) / widths[0] for ratio in PROBE_RATIOS}
    return tuple(sorted(ratio for ratio in found if ratio > 0))


def plan_targets(
    damage: np.ndarray,
    ratios: Sequence[float],
    size: ModelSize,
    blocks: Blocks,
    bench: Bench,
    recipe: Recipe,
    run: Run,
) -> Table:
    """Plan every target in whole blocks: from the probes alone, or by a search that starts there.

    Source: LOP (arXiv 2506.12826), section 4.2.
    """
    alone, around = _stored(damage)

    def additive(goals: Sequence[float]) -> Floats:
        return additive_plans(alone, ratios, size.widths, goals, around=around, context=CONTEXT)

    if recipe.search not in ENGINES:
        return [
            {
                "ratio": round(float(target), 5),
                "ratios": np.round(in_blocks(plan, float(target), size, blocks), 5).tolist(),
            }
            for target, plan in zip(recipe.targets, additive(recipe.targets), strict=True)
        ]
    dense = np.array(size.widths)

    def search(score: Any, journal: Journal | None) -> Table:
        return learn_table(
            partial(ENGINES[recipe.search], seed=recipe.seed),
            lambda ratios: score(np.rint(dense * (1 - ratios)).astype(int).tolist()).value,
            size.widths,
            recipe.targets,
            starts=lambda target: list(additive([target])),
            evaluations=recipe.evaluations,
            round_to=blocks,
            journal=journal,
            progress=True,
        )

    with run.phase(recipe.search):
        table: Table = run.search(scorer(bench, recipe.reward), search, reward=reward_name(recipe.reward))
    return table


def in_blocks(plan: Floats, target: float, size: ModelSize, blocks: Blocks) -> Floats:
    """Return layer ratios `[L]` in whole blocks, as they are cut; single neurons are left to the projection of a budget."""
    return plan if max(blocks) == 1 else SearchSpace(size.widths, target, round_to=blocks).project(plan)


def train(table: Table, layers: int, recipe: Recipe) -> tuple[RatioPredictor, float]:
    """Train a predictor on the pairs of a table, and return it with its last loss.

    Source: LOP (arXiv 2506.12826), section 4.3.
    """
    predictor = build_predictor(recipe.predictor, layers, seed=recipe.seed)
    losses = train_predictor(predictor, *training_pairs(table, layers), seed=recipe.seed, progress=True)
    return predictor, losses[-1]
