"""Learning what a pruner knows: neuron order, statistics, and a table of (target, layer ratios) pairs.

Calibration batches give the statistics; validation batches, which should be others, give the damage of single-layer cuts
and the rewards of the search.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_lop.allocation import CMAES, MCTS, Journal, additive_plans, learn_table
from hf_lop.allocation.budget import positive_integer
from hf_lop.allocation.table import MakeSearch
from hf_lop.errors import InvalidInputError
from hf_lop.ffn.discovery import prunable_ffns
from hf_lop.ffn.importance import CRITERIA, neuron_importance, neuron_order
from hf_lop.ffn.size import ModelSize, measure_size
from hf_lop.ffn.sketch import Sketch, Sketcher
from hf_lop.ffn.statistics import Statistics, collect_statistics
from hf_lop.hub.companions import write_whole
from hf_lop.modeling_lop import FFN
from hf_lop.rewards import REWARDS, Reward, probe_layers

Batches = Iterable[Mapping[str, Any]]

PROBE_RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.95)
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
        provenance (`dict`): search, reward, and a fingerprint of each set of data.
    """

    size: ModelSize
    dtype: str
    statistics: list[Statistics]
    sketches: list[Sketch]
    order: list[torch.Tensor]
    table: list[dict[str, Any]]
    provenance: dict[str, Any]


def fingerprint(batches: Sequence[Mapping[str, Any]]) -> str:
    """Return 16 hexadecimal digits that depend on every tensor of every batch."""
    digest = sha256()
    for batch in batches:
        for key in sorted(batch):
            if isinstance(value := batch[key], torch.Tensor):
                digest.update(key.encode() + str(tuple(value.shape)).encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def calibrate(
    model: PreTrainedModel, calibration: Batches, ffns: list[FFN], sketch_rows: int, seed: int
) -> tuple[list[Statistics], list[Sketch]]:
    """Collect statistics and sketches in one pass; no sketch, with a warning, of fewer tokens than neurons."""
    if not sketch_rows:
        return collect_statistics(model, calibration, ffns), []
    widths = [ffn.width for ffn in ffns]
    sketcher = Sketcher(widths, sketch_rows, seed=seed)
    statistics = collect_statistics(model, calibration, ffns, also=sketcher.add)
    if any(tokens < width for tokens, width in zip(sketcher.tokens, widths, strict=True)):
        warnings.warn(
            f"Calibration has {min(sketcher.tokens)} tokens for layers of up to {max(widths)} neurons. Least squares on so "
            "few does harm, so no sketch is kept. Calibrate on more samples.",
            stacklevel=4,
        )
        return statistics, []
    return statistics, [Sketch.of(directions) for directions in sketcher.result(statistics)]


def learn(
    model: PreTrainedModel,
    calibration: Batches,
    validation: Batches,
    *,
    criterion: str,
    search: str,
    reward: str,
    targets: Sequence[float],
    evaluations: int,
    seed: int,
    journal: str | Path | None,
    sketch_rows: int,
) -> Learned:
    """Calibrate, probe every layer, plan every target; see [`~LOPPruner.fit`] for the arguments.

    With a journal, probes and evaluations are kept there, and a killed call resumes to the same result.

    Raises:
        UnsupportedModelError: if the model cannot be pruned.
        InvalidInputError: if an argument is unknown, or the journal belongs to other data or settings.
    """
    choices = {"search": (search, SEARCHES), "criterion": (criterion, CRITERIA), "reward": (reward, REWARDS)}
    for name, (value, known) in choices.items():
        if value not in known:
            raise InvalidInputError(f"{name} is {value!r}; choose one of {', '.join(known)}.")
    positive_integer("evaluations", evaluations)
    if not len(targets) or not all(0 <= target < 1 for target in targets):
        raise InvalidInputError(f"targets is {list(targets)}; pass at least one target ratio in [0, 1).")
    ffns = prunable_ffns(model)
    size = measure_size(model, ffns)
    calibration, validation = list(calibration), list(validation)
    prints = {"calibration_sha256": fingerprint(calibration), "search_sha256": fingerprint(validation)}
    if len(set(prints.values())) == 1:
        warnings.warn("Calibration and search use the same data; plans will look better than they are.", stacklevel=3)
    statistics, sketches = calibrate(model, calibration, ffns, sketch_rows, seed)
    order = neuron_order(neuron_importance(model, ffns, criterion, statistics))
    provenance: dict[str, Any] = {"search": search, **prints}
    settings: dict[str, Any] = {
        "model": {"type": model.config.model_type, **asdict(size)},
        "order_sha256": sha256(torch.cat(order).numpy().tobytes()).hexdigest()[:16],
        "criterion": criterion,
        "probe_ratios": PROBE_RATIOS,
        **prints,
    }

    def probe() -> np.ndarray:
        return probe_layers(model, ffns, order, validation, PROBE_RATIOS)

    damage = probe() if journal is None else _kept(Path(journal) / "probes.json", settings, probe)

    def additive(goals: Sequence[float]) -> np.ndarray:
        return additive_plans(damage, PROBE_RATIOS, size.widths, goals)

    if search == "additive":
        table = [
            {"ratio": round(float(target), 5), "ratios": np.round(plan, 5).tolist()}
            for target, plan in zip(targets, additive(targets), strict=True)
        ]
    else:
        provenance |= {"reward": reward, "evaluations per target": evaluations, "seed": seed}
        scored = Reward.on(model, order, validation, reward)
        dense = np.array(size.widths)

        def worth(ratios: np.ndarray) -> float:
            return scored(np.rint(dense * (1 - ratios)).astype(int).tolist()).value

        engine: MakeSearch = partial({"mcts": MCTS, "cmaes": CMAES}[search], seed=seed)
        log = None if journal is None else Journal(journal, {**settings, "reward": reward})
        try:
            table = learn_table(
                engine,
                worth,
                size.widths,
                targets,
                starts=lambda target: list(additive([target])),
                evaluations=evaluations,
                journal=log,
                progress=True,
            )
        finally:
            if log is not None:
                log.close()
    dtype = str(ffns[0].modules(model)[1].weight.dtype).removeprefix("torch.")
    return Learned(size, dtype, statistics, sketches, order, table, provenance)


def _kept(path: Path, settings: dict[str, Any], measure: Callable[[], np.ndarray]) -> np.ndarray:
    """Return a measurement from its file, or make it and write the file."""
    wanted = json.loads(json.dumps(settings))
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["settings"] != wanted:
            different = [key for key in wanted if stored["settings"].get(key) != wanted[key]]
            raise InvalidInputError(
                f"{path} was measured with another {', '.join(different)}. Choose another journal folder, or remove it."
            )
        return np.array(stored["damage"])
    damage = measure()
    write_whole(path, json.dumps({"settings": wanted, "damage": damage.tolist()}).encode())
    return damage


def training_pairs(table: Sequence[Mapping[str, Any]], layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a table into the predictor's training set: its rows, and 256 targets interpolated between them.

    A search gives some 25 rows, too few for the paper's 64 epochs of 40 pairs; neighbouring rows differ little, so the
    line between them is what the predictor should learn there. Removing nothing, ratio 0, is known without a row.

    Args:
        table (`Sequence[Mapping]`): rows `{"ratio": R, "ratios": [L floats]}`; further keys are ignored.
        layers (`int`): L.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: targets `[N] float32` and layer ratios `[N, L] float32`.

    Raises:
        InvalidInputError: if there is no row, or one does not fit the model.
    """
    if not table:
        raise InvalidInputError("There is no table of (R, layer ratios) to train on. Pass one, or fit a pruner anew.")
    for index, row in enumerate(table):
        try:
            values = np.array([row["ratio"], *row["ratios"]], dtype=np.float64)
            fits = len(values) == 1 + layers and bool(((values >= 0) & (values <= 1)).all())
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise InvalidInputError(
                f'Row {index} of the table is {row}; it must be {{"ratio": R, "ratios": [{layers} numbers]}}, '
                "all of them fractions from 0 to 1."
            )
    rows = {0.0: [0.0] * layers} | {float(row["ratio"]): list(row["ratios"]) for row in table}
    known = np.array(sorted(rows))
    values = np.array([rows[target] for target in known.tolist()])
    targets = np.unique(np.concatenate([known, np.linspace(0.0, known[-1], 256)]))
    ratios = np.stack([np.interp(targets, known, column) for column in values.T], axis=1)
    return torch.tensor(targets, dtype=torch.float32), torch.tensor(ratios, dtype=torch.float32)


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON list of `{"ratio": R, "ratios": [L floats]}` for [`~LOPPruner.train_predictor`].

    Raises:
        InvalidInputError: if the file cannot be read, or holds something else.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read as JSON ({error}). Pass a JSON list of rows.") from error
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        raise InvalidInputError(f'{path} must hold a list of rows {{"ratio": R, "ratios": [one number per layer]}}.')
    return table
