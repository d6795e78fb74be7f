"""What a comparison of methods found: one row per pruned model, tables and plots of them, and the file that keeps them."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_lop.evaluation.comparison.plots import Point, plot_layers, plot_quality, plot_searches
from hf_lop.files import write_whole
from hf_lop.learning.rewards import REWARDS, Score
from hf_lop.planning.journal import add_entry, merge_journals, open_entries, read_entries
from hf_lop.planning.plan import Plan
from hf_lop.units.size import ModelSize

Key = tuple[str, float, str | None, int | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One pruned model.

    Attributes:
        method (`str`): one of `METHODS`, or "dense".
        ratio (`float`): target ratio R.
        recover (`str`, *optional*): recovery of the output projections.
        seed (`int`, *optional*): which pruner, counted from 0; None for the dense model.
        scores (`dict[str, Score]`): by reward; higher is better.
        neurons_removed (`float`): fraction of all FFN neurons.
        parameters (`int`): of the whole model.
        parameters_removed (`float`): fraction of all parameters.
        widths (`tuple[int, ...]`): `[L]` kept neurons.
        ratios (`tuple[float, ...]`): `[L]` layer ratios.
        seconds (`float`, *optional*): to plan a new target and choose its neurons, with everything loaded; recovery is
            not in it.
        cold_seconds (`float`, *optional*): before that, for all targets together: calibration, probes, search and the
            predictor's training, as far as the method needs them.
    """

    method: str
    ratio: float
    recover: str | None
    seed: int | None
    scores: dict[str, Score]
    neurons_removed: float
    parameters: int
    parameters_removed: float
    widths: tuple[int, ...]
    ratios: tuple[float, ...]
    seconds: float | None
    cold_seconds: float | None = None

    @property
    def key(self) -> Key:
        """What tells the row from all others of a comparison."""
        return self.method, self.ratio, self.recover, self.seed

    @classmethod
    def of(
        cls,
        key: Key,
        scores: dict[str, Score],
        widths: Sequence[int],
        size: ModelSize,
        seconds: float | None = None,
        cold_seconds: float | None = None,
    ) -> "Row":
        """Add to a score what the widths remove."""
        plan = Plan(tuple(widths), size)
        removed = plan.parameters_removed / size.parameters
        size_of = (plan.pruning_ratio, plan.parameters, removed)
        return cls(*key, scores, *size_of, plan.widths, plan.ratios, seconds, cold_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types; the standard error of a single sample is None."""
        values = asdict(self)
        for score in values["scores"].values():
            score["standard_error"] = None if math.isnan(score["standard_error"]) else score["standard_error"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Row":
        """Read what `to_dict` wrote."""
        scores = {
            kind: Score(s["value"], math.nan if s["standard_error"] is None else s["standard_error"], s["samples"])
            for kind, s in values["scores"].items()
        }
        return cls(
            **{**values, "scores": scores, "widths": tuple(values["widths"]), "ratios": tuple(values["ratios"])}
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows of a comparison, the dense model's first. Printing it shows the tables.

    Attributes:
        rows (`tuple[Row, ...]`): dense, then by seed, method, ratio and recovery.
        settings (`dict`): model, fingerprints of data and pruners, rewards.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any]

    @property
    def points(self) -> list[Point]:
        """The rows without the dense one, joined over seeds: means, and standard deviations between seeds."""
        joined: dict[tuple[str, float, str | None], list[Row]] = {}
        for row in self.rows[1:]:
            joined.setdefault(row.key[:3], []).append(row)
        return [_join(rows) for rows in joined.values()]

    def to_markdown(self) -> str:
        """Return one table per reward: methods as lines, ratios as columns, the best of each column in bold."""
        points, dense = self.points, self.rows[0]
        seeds = len({row.seed for row in self.rows[1:]})
        spread = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed, so no spread is known"
        parts = []
        for kind in self.settings["rewards"]:
            errors = [row.scores[kind].standard_error for row in self.rows]
            samples = f"{dense.scores[kind].samples} samples"
            if not any(map(math.isnan, errors)):
                samples += f", which leave every single score a standard error of up to {max(errors):.2g}"
            parts += [
                f"### {kind}",
                f"{REWARDS[kind].formula}; higher is better. {spread}; {samples}.",
                _table(kind, points, dense),
            ]
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> str:
        """Return settings and rows as JSON, one row a line."""
        rows = ",\n".join(json.dumps(row.to_dict(), allow_nan=False) for row in self.rows)
        return f'{{"settings": {json.dumps(self.settings)},\n"rows": [\n{rows}\n]}}\n'

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw quality against ratio, quality against parameters, and the layer ratios; return the PNG files."""
        paths = [Path(folder) / f"{name}.png" for name in ("quality_ratio", "quality_parameters", "layer_ratios")]
        Path(folder).mkdir(parents=True, exist_ok=True)
        dense = {kind: score.value for kind, score in self.rows[0].scores.items()}
        plot_quality(self.points, dense, paths[0])
        plot_quality(self.points, dense, paths[1], dense_parameters=self.rows[0].parameters)
        plot_layers(self.points, paths[2])
        return paths

    def plot_searches(self, journals: Mapping[str, Sequence[str | Path]], path: str | Path) -> bool:
        """Draw the best reward against evaluations at every ratio, as journals tell it; return whether there was any.

        Args:
            journals (`Mapping[str, Sequence]`): by search, a journal folder per seed.
            path (`str` or `Path`): PNG file to write.
        """
        ratios = sorted({row.ratio for row in self.rows[1:]})
        curves: dict[float, dict[str, list[Sequence[float]]]] = {}
        for search, folders in journals.items():
            for folder in folders:
                found = merge_journals(folder)
                targets = {entry.target for entry in found}
                for target in {min(targets, key=lambda t: abs(t - ratio)) for ratio in ratios if targets}:
                    rewards = [entry.reward for entry in found if entry.target == target]
                    curve = np.maximum.accumulate(rewards).tolist()
                    curves.setdefault(target, {}).setdefault(search, []).append(curve)
        if curves:
            plot_searches(curves, path)
        return bool(curves)

    def save(self, folder: str | Path, journals: Mapping[str, Sequence[str | Path]] | None = None) -> list[Path]:
        """Write comparison.md, comparison.json and the plots, those of searches from their journals; return the files."""
        texts = {"comparison.md": self.to_markdown(), "comparison.json": self.to_json()}
        for name, text in texts.items():
            write_whole(Path(folder) / name, text.encode())
        files = [*(Path(folder) / name for name in texts), *self.plot(folder)]
        if self.plot_searches(journals or {}, Path(folder) / "searches.png"):
            files.append(Path(folder) / "searches.png")
        return files

    def __str__(self) -> str:
        return self.to_markdown()


class Rows:
    """The rows that are known already, and the file that keeps them: its first line holds the settings.

    Args:
        folder (`str` or `Path`, *optional*): where `rows.jsonl` is or will be; None keeps rows in memory only.
        settings (`dict`): everything that scores depend on, as JSON types.

    Raises:
        InvalidInputError: if the file was written under other settings or is damaged.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.path = None if folder is None else Path(folder) / "rows.jsonl"
        self.known: dict[Key, Row] = {}
        if self.path is not None:
            self.known = {row.key: row for row in read_entries(self.path, settings, Row.from_dict)}

    def add(self, row: Row) -> None:
        """Keep a row; with a file it survives whatever happens next."""
        self.known[row.key] = row
        if self.path is not None:
            with open_entries(self.path, self.settings) as file:
                add_entry(file, row.to_dict())


def _join(rows: Sequence[Row]) -> Point:
    """Join the rows of all seeds."""
    values = {kind: [row.scores[kind].value for row in rows] for kind in rows[0].scores}
    times = [row.seconds for row in rows if row.seconds is not None]
    cold = [row.cold_seconds for row in rows if row.cold_seconds is not None]
    return Point(
        method=rows[0].method,
        recover=rows[0].recover,
        ratio=rows[0].ratio,
        mean={kind: statistics.fmean(found) for kind, found in values.items()},
        spread={kind: statistics.stdev(found) if len(found) > 1 else math.nan for kind, found in values.items()},
        neurons_removed=statistics.fmean(row.neurons_removed for row in rows),
        parameters=statistics.fmean(row.parameters for row in rows),
        parameters_removed=statistics.fmean(row.parameters_removed for row in rows),
        ratios=tuple(np.mean([row.ratios for row in rows], axis=0).tolist()),
        seconds=statistics.median(times) if times else math.nan,
        cold_seconds=statistics.median(cold) if cold else math.nan,
    )


def _table(kind: str, points: Sequence[Point], dense: Row) -> str:
    """One Markdown table: ratios as columns."""
    ratios = sorted({point.ratio for point in points})
    at = {(point.method, point.recover, point.ratio): point for point in points}
    columns = [[point for point in points if point.ratio == ratio] for ratio in ratios]
    best = [f"{max(p.mean[kind] for p in column):.3f}" for column in columns]
    lines = [
        ["method", "recovery", *(f"R = {ratio:g}" for ratio in ratios), "cold (s)", "plan (ms)"],
        ["---", "---", *("---:" for _ in [*ratios, 0, 0])],
        ["*neurons removed*", "", *(_range([p.neurons_removed for p in column]) for column in columns), "", ""],
        ["*parameters removed*", "", *(_range([p.parameters_removed for p in column]) for column in columns), "", ""],
        ["dense", "", *(f"{dense.scores[kind].value:.3f}" for _ in ratios), "", ""],
    ]
    for method, recover in dict.fromkeys((point.method, point.recover) for point in points):
        cells = []
        for ratio, top in zip(ratios, best, strict=True):
            point = at[method, recover, ratio]
            mean, spread = f"{point.mean[kind]:.3f}", point.spread[kind]
            mean = f"**{mean}**" if mean == top else mean
            cells.append(mean if math.isnan(spread) else f"{mean} ± {spread:.3f}")
        plan, cold = (
            statistics.median(found)
            for found in zip(*((p.seconds, p.cold_seconds) for p in points if p.method == method), strict=True)
        )
        lines.append(
            [method, recover or "none", *cells, "" if math.isnan(cold) else f"{cold:.1f}", f"{plan * 1e3:.1f}"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _range(shares: Sequence[float]) -> str:
    """One percentage, or the lowest and the highest where methods differ."""
    texts = dict.fromkeys(f"{share:.1%}" for share in (min(shares), max(shares)))
    return " to ".join(texts)
