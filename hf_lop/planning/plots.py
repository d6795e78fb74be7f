"""Plots of the width of every layer, and of the quality to expect. They use matplotlib's figure objects: pyplot's state is never touched."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_lop.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT, REMOVED, INK, FAINT = "#2f6f8f", "#e3e8ec", "#22303a", "#6b7a86"
SEARCHED = "#d1603d"


def plot_widths(
    widths: Sequence[int], dense_widths: Sequence[int], path: str | Path | None = None, *, title: str | None = None
) -> "Figure":
    """Draw the kept neurons of every layer over its dense width.

    Args:
        widths (`Sequence[int]`): `[L]` neurons kept in each decoder layer.
        dense_widths (`Sequence[int]`): `[L]` neurons before pruning.
        path (`str` or `Path`, *optional*): PNG file to write.
        title (`str`, *optional*): says how many neurons were removed by default.

    Returns:
        `Figure`: the figure, with one panel.
    """
    return _plot([(title or _title(widths, dense_widths), widths)], dense_widths, path, height=3.6)


def plot_plans(
    plans: Mapping[float, Sequence[int]], dense_widths: Sequence[int], path: str | Path | None = None
) -> "Figure":
    """Draw the widths of several plans of one model, one panel each.

    Args:
        plans (`Mapping[float, Sequence[int]]`): widths `[L]` by pruning ratio.
        dense_widths (`Sequence[int]`): `[L]` neurons before pruning.
        path (`str` or `Path`, *optional*): PNG file to write.

    Returns:
        `Figure`: the figure, with one panel per plan.
    """
    panels = [(_title(widths, dense_widths), widths) for widths in plans.values()]
    return _plot(panels, dense_widths, path, height=2.1)


def _title(widths: Sequence[int], dense_widths: Sequence[int]) -> str:
    removed = 1 - sum(widths) / sum(dense_widths)
    return f"{removed:.1%} of {sum(dense_widths):,} FFN neurons removed"


def _plot(
    panels: Sequence[tuple[str, Sequence[int]]], dense: Sequence[int], path: str | Path | None, *, height: float
) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inches = min(13.0, max(6.4, 1.6 + 0.3 * len(dense)))
    figure = Figure(figsize=(inches, height * len(panels)), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr, call-arg]
    per_bar = 72 * (inches - 1.2) / len(dense)  # points of paper per layer
    axes: list[Axes] = list(figure.subplots(len(panels), 1, squeeze=False)[:, 0])
    for index, (axis, (title, widths)) in enumerate(zip(axes, panels, strict=True)):
        _draw(axis, title, widths, dense, per_bar, legend=index == 0)
    axes[-1].set_xlabel("decoder layer", color=INK)
    if path is not None:
        save_figure(figure, path)
    return figure


def _draw(
    axis: "Axes", title: str, widths: Sequence[int], dense: Sequence[int], per_bar: float, *, legend: bool
) -> None:
    """Fill one panel; `per_bar` (points) decides whether and how the percentages fit."""
    layers = range(len(dense))
    top = max(dense)
    axis.bar(layers, dense, width=0.82, color=REMOVED, label="removed")
    axis.bar(layers, widths, width=0.82, color=KEPT, label="kept (% of the layer)")
    size = min(9.0, 0.62 * per_bar) if per_bar < 20 else min(9.0, 0.35 * per_bar)
    for layer, (kept, full) in enumerate(zip(widths, dense, strict=True)):
        inside = kept / top > 0.22  # a low bar carries its number above, on the grey
        axis.annotate(
            f"{kept / full:.0%}",
            (layer, kept),
            xytext=(0, -3 if inside else 3),
            textcoords="offset points",
            ha="center",
            va="top" if inside else "bottom",
            rotation=90 if per_bar < 20 else 0,
            fontsize=size,
            color="white" if inside else INK,
        )
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * per_bar > 16 or step == 100)
    axis.set_xticks(range(0, len(dense), step))
    axis.set_xlim(-0.6, len(dense) - 0.4)
    axis.set_ylim(0, top * 1.02)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_ylabel("FFN neurons", color=INK)
    axis.tick_params(colors=FAINT, length=0, labelsize=9)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(FAINT)
    axis.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
    if legend:
        axis.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1.0),
            ncols=2,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            borderpad=0.2,
        )


def plot_estimate(
    curve: Mapping[float, float], searched: Mapping[float, float], reward: str | None, path: str | Path | None = None
) -> "Figure":
    """Draw what a pruner's search data say about quality: the estimated divergence over the share of neurons removed.

    Args:
        curve (`Mapping[float, float]`): estimated divergence in nats per prediction, by pruning ratio.
        searched (`Mapping[float, float]`): reward of the best plan that a search found, by target ratio; may be empty.
        reward (`str`, *optional*): its name. A divergence is drawn beside the estimate, anything else in a second panel.
        path (`str` or `Path`, *optional*): PNG file to write.

    Returns:
        `Figure`: the figure.
    """
    same = reward == "divergence"
    figure = new_figure(6.4, 3.6 if same or not searched else 6.6)
    axes: list[Axes] = list(figure.subplots(1 if same or not searched else 2, 1, squeeze=False, sharex=True)[:, 0])
    axes[0].plot(
        list(curve), list(curve.values()), color=KEPT, linewidth=2.6, label="estimate from single-layer probes"
    )
    axes[0].set_title(
        "Divergence from the dense model, nats per prediction", loc="left", fontsize=11, color=INK, pad=8
    )
    if searched:
        values = [-value if same else value for value in searched.values()]
        label = "best plan of the search, measured on the search data"
        axes[-1].plot(
            list(searched), values, "o", color=SEARCHED, markersize=4.5, markeredgecolor="white", label=label
        )
        if not same:
            axes[1].set_title(f"Reward of the search: {reward}", loc="left", fontsize=11, color=INK, pad=8)
    for axis in axes:
        tidy(axis)
        axis.legend(loc="upper left" if axis is axes[0] else "lower left", frameon=False, fontsize=9, labelcolor=INK)
    axes[0].set_ylim(bottom=0)
    axes[-1].set_xlabel("FFN neurons removed", color=INK)
    axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if path is not None:
        save_figure(figure, path)
    return figure


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)  # type: ignore[union-attr, call-arg]
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as a PNG file that appears whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(Path(path), buffer.getvalue())


def tidy(axis: "Axes") -> None:
    """Give an axis the look of all plots."""
    axis.grid(axis="y", color=REMOVED, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=FAINT, length=0, labelsize=9, labelleft=True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(FAINT)
