"""Plots of quality over size and of layer ratios, of one pruner and of several methods. Pyplot's state is never touched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_lop.planning.plots import FAINT, INK, KEPT, REMOVED, SEARCHED, new_figure, save_figure, tidy
from hf_lop.planning.show import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (SEARCHED, "#8a6fb0", "#c99a1e", "#4f9d69", "#c2478a", "#7a8794", "#4fb3c9", "#8c6d4f")
MARKERS = "os^Dvp<>"


@dataclass(frozen=True, slots=True)
class Point:
    """One method at one ratio, over all seeds.

    Attributes:
        method (`str`): its name.
        recover (`str`, *optional*): recovery of the output projections.
        ratio (`float`): target ratio R.
        mean (`dict[str, float]`): by reward, the mean over seeds; higher is better.
        spread (`dict[str, float]`): by reward, the standard deviation between seeds; nan for a single one.
        neurons_removed (`float`): fraction of all FFN neurons.
        parameters (`float`): of the whole model.
        parameters_removed (`float`): fraction of all parameters.
        ratios (`tuple[float, ...]`): `[L]` layer ratios, mean over seeds.
        seconds (`float`): to plan a new target, median over seeds.
        cold_seconds (`float`): of calibration, probes, search and training before that, median over seeds; nan where that is
            not known.
    """

    method: str
    recover: str | None
    ratio: float
    mean: dict[str, float]
    spread: dict[str, float]
    neurons_removed: float
    parameters: float
    parameters_removed: float
    ratios: tuple[float, ...]
    seconds: float
    cold_seconds: float


def plot_quality(
    points: Sequence[Point], dense: Mapping[str, float], path: str | Path, *, dense_parameters: int | None = None
) -> None:
    """Draw rewards over the share of neurons removed, or over parameters: a panel per reward and recovery.

    Args:
        points (`Sequence[Point]`): all points.
        dense (`Mapping[str, float]`): the dense model's value by reward.
        path (`str` or `Path`): PNG file to write.
        dense_parameters (`int`, *optional*): the dense model's parameters; given, the x axis shows parameters.
    """
    recoveries = list(dict.fromkeys(point.recover for point in points))
    methods = list(dict.fromkeys(point.method for point in points))
    figure = new_figure(1.2 + 5.2 * len(recoveries), 0.6 + 3.7 * len(dense))
    grid = figure.subplots(len(dense), len(recoveries), squeeze=False, sharex=True, sharey="row")
    for row, kind in zip(grid, dense, strict=True):
        floor = _floor([point.mean[kind] for point in points], dense[kind], points, kind)
        for axis, recover in zip(row, recoveries, strict=True):
            axis.axhline(dense[kind], color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="dense", zorder=1)
            below = []
            for index, method in enumerate(methods):
                line = sorted((p for p in points if (p.method, p.recover) == (method, recover)), key=lambda p: p.ratio)
                _line(axis, line, kind, index, parameters=dense_parameters is not None)
                below += [method] if any(p.mean[kind] < floor for p in line) else []
            if below:
                note = f"below the panel: {', '.join(below)}"
                axis.text(0.02, 0.03, note, transform=axis.transAxes, fontsize=8, color=FAINT)
            axis.set_title(f"{kind}, {_name(recover)}", loc="left", fontsize=11, color=INK, pad=8)
            tidy(axis)
        margin = 0.05 * (dense[kind] - floor or 1.0)
        row[0].set_ylim(floor - margin, max([dense[kind], *(p.mean[kind] for p in points)]) + margin)
    for axis in grid[-1]:
        if dense_parameters is None:
            axis.set_xlabel("FFN neurons removed", color=INK)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        else:
            axis.set_xlabel(f"parameters (dense: {si(dense_parameters, number='.3g')})", color=INK)
            axis.xaxis.set_major_formatter(lambda value, _: si(value, number="g"))
    handles, labels = grid[0][0].get_legend_handles_labels()
    _legend(figure, handles, labels)
    save_figure(figure, path)


def plot_layers(points: Sequence[Point], path: str | Path) -> None:
    """Draw which share of each layer every method removes: a panel per target ratio, a row per method.

    Args:
        points (`Sequence[Point]`): all points; recovery changes no width, so only its first kind is drawn.
        path (`str` or `Path`): PNG file to write.
    """
    from matplotlib.colors import LinearSegmentedColormap

    shown = [point for point in points if point.recover == points[0].recover]
    methods = list(dict.fromkeys(point.method for point in shown))
    ratios = sorted({point.ratio for point in shown})
    layers = len(shown[0].ratios)
    inches = min(14.0, max(7.0, 2.2 + 0.36 * layers))
    figure = new_figure(inches, 0.9 + (0.75 + 0.3 * len(methods)) * len(ratios))
    colours = LinearSegmentedColormap.from_list("removed", ["#f4f6f8", REMOVED, KEPT, "#14323f"])
    per_cell = 72 * (inches - 2.2) / layers  # points of paper
    image = None
    axes: list[Axes] = list(figure.subplots(len(ratios), 1, squeeze=False, sharex=True)[:, 0])
    for axis, ratio in zip(axes, ratios, strict=True):
        values = [next(p.ratios for p in shown if (p.method, p.ratio) == (method, ratio)) for method in methods]
        image = axis.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        size = min(8.5, 0.4 * per_cell)
        for index, line in enumerate(values):
            axis.axhline(index + 0.5, color="white", linewidth=1.5)
            for layer, value in enumerate(line if size >= 5 else []):
                colour = "white" if value > 0.5 else INK
                axis.text(layer, index, f"{100 * value:.0f}", ha="center", va="center", fontsize=size, color=colour)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_xticks(range(0, layers, next(s for s in (1, 2, 5, 10, 20, 50) if s * per_cell > 16 or s == 50)))
        axis.tick_params(colors=INK, length=0, labelsize=9)
        axis.spines[:].set_visible(False)
        axis.set_title(
            f"{ratio:.1%} of all FFN neurons removed".replace(".0%", "%"), loc="left", fontsize=11, color=INK
        )
    axes[-1].set_xlabel("decoder layer, and the % of its neurons removed", color=INK)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.015, format=lambda value, _: f"{value:.0%}")
        bar.ax.tick_params(colors=FAINT, length=0, labelsize=8)
        bar.outline.set_visible(False)
    save_figure(figure, path)


def plot_searches(curves: Mapping[float, Mapping[str, Sequence[Sequence[float]]]], path: str | Path) -> None:
    """Draw the best reward so far over the number of evaluated candidates: a panel per target, a line per search.

    Args:
        curves (`Mapping`): by target ratio and search, the best reward after each evaluation, once per seed. Seeds are thin
            lines, their mean (as far as all go) is a thick one.
        path (`str` or `Path`): PNG file to write.
    """
    figure = new_figure(1.0 + 4.2 * len(curves), 3.9)
    axes: list[Axes] = list(figure.subplots(1, len(curves), squeeze=False)[0])
    searches = list(dict.fromkeys(search for lines in curves.values() for search in lines))
    for axis, (target, lines) in zip(axes, sorted(curves.items()), strict=True):
        for search, seeds in lines.items():
            colour = COLOURS[searches.index(search)]
            shortest = min(map(len, seeds))
            for seed in seeds:
                axis.plot(range(1, len(seed) + 1), seed, color=colour, linewidth=0.8, alpha=0.4)
            mean = [sum(values) / len(seeds) for values in zip(*(seed[:shortest] for seed in seeds), strict=True)]
            axis.plot(range(1, shortest + 1), mean, color=colour, linewidth=2.2, label=search)
        axis.set_title(
            f"{target:.1%} of all FFN neurons removed".replace(".0%", "%"), loc="left", fontsize=11, color=INK
        )
        axis.set_xlabel("evaluated candidates", color=INK)
        tidy(axis)
    axes[0].set_ylabel("best reward on the search data", color=INK)
    _legend(figure, *axes[0].get_legend_handles_labels())
    save_figure(figure, path)


def _floor(values: Sequence[float], dense: float, points: Sequence[Point], kind: str) -> float:
    """Where a panel ends below: a ruined model (perplexity in the thousands) must not flatten all other lines."""
    hardest = max(point.ratio for point in points)
    last = sorted(point.mean[kind] for point in points if point.ratio == hardest)
    return max(min(values), dense - 2.5 * (dense - last[len(last) // 2]))


def _line(axis: "Axes", points: Sequence[Point], kind: str, index: int, *, parameters: bool) -> None:
    """Draw one method; the first one, the pruner's own, stands out."""
    axis.errorbar(
        [point.parameters if parameters else point.neurons_removed for point in points],
        [point.mean[kind] for point in points],
        yerr=[point.spread[kind] for point in points],
        color=KEPT if index == 0 else COLOURS[(index - 1) % len(COLOURS)],
        linewidth=2.6 if index == 0 else 1.4,
        marker=MARKERS[index % len(MARKERS)],
        markersize=7 if index == 0 else 5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        capsize=2.5,
        elinewidth=1,
        label=points[0].method,
        zorder=4 if index == 0 else 3,
    )


def _legend(figure: "Figure", handles: Sequence[object], labels: Sequence[str]) -> None:
    options = {"loc": "outside upper center", "ncols": min(len(labels), 7), "frameon": False, "fontsize": 9}
    figure.legend(handles, labels, labelcolor=INK, **options)  # type: ignore[call-overload]


def _name(recover: str | None) -> str:
    names = {
        None: "no recovery",
        "sequential": "least squares in turn",
        "lstsq": "least squares",
        "sketch": "least squares, sketch",
        "fold": "folded means",
    }
    return names.get(recover, str(recover))
