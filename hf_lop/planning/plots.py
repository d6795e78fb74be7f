"""Bar plots of the width of every layer. They use matplotlib's figure objects: pyplot's state is never touched."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT, REMOVED, INK, FAINT = "#2f6f8f", "#e3e8ec", "#22303a", "#6b7a86"


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
        figure.savefig(path, format="png")
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
