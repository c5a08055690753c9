"""Common style of all pictures: colours, axes, lines and labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bdistil.reporting.tables import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]
# Name: colour on a light page, on a dark one. Okabe and Ito's blue and vermilion are distinct in any colour vision.
COLOURS = {
    "blue": ("#0072b2", "#56b4e9"), "orange": ("#d55e00", "#f0a04b"), "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9aa4ae"), "line": ("#d8dee4", "#2f363d"), "paper": ("#ffffff", "#0d1117"),
}  # fmt: skip
BLUE, ORANGE, INK, MUTED, LINE, PAPER = (light for light, _ in COLOURS.values())


def panels_figure(width: float, height: float, panels: Mapping[str, int]) -> tuple[Figure, list[Axes]]:
    """A figure of stacked panels, given as title and share of the height; independent of pyplot."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure((width, height), facecolor=PAPER, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=list(panels.values()))[:, 0]
    for axes, title in zip(all_axes, panels, strict=True):
        axes.set(facecolor="none", axisbelow=True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.grid(color=LINE, linewidth=0.7)
        axes.tick_params(which="both", colors=MUTED, labelsize=9, length=0)
        axes.set_title(title, color=INK, fontsize=10.5, loc="left", parse_math=False)
    return figure, list(all_axes)


def log_ticks(axis: Axis, steps: Sequence[int], label: Callable[[float], str]) -> None:
    """Sets the ticks of a logarithmic axis to multiples (`steps`) of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def draw(axes: Axes, points: Points, style: str, colour: str, size: float = 5.5) -> None:
    """Draws a line through points, or marks at them."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, style, color=colour, linewidth=1.8, markersize=size, markeredgecolor=PAPER)


def note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], colour: str, **kw: Any) -> None:
    """Writes text beside a point, with a halo that keeps it readable over lines."""
    from matplotlib.patheffects import withStroke

    kw = {"fontsize": 9.5, "weight": "bold", "path_effects": [withStroke(linewidth=3, foreground=PAPER)], **kw}
    axes.annotate(text, at, offset, textcoords="offset points", color=colour, in_layout=False, **kw)


def cost_axis(axes: Axes, costs: Sequence[float], last: float) -> None:
    """Sets up a logarithmic axis of MACs, with room for labels to the right of the last prefix."""
    low, high = math.log10(min(costs)), math.log10(max(costs))
    pad, room = 0.06 * (high - low) + max(0.0, 0.25 - (high - low) / 2), 0.3
    low, high = low - pad, max(high + pad, (math.log10(last) - room * (low - pad)) / (1 - room))
    axes.set(xscale="log", xlim=(10**low, 10**high))
    axes.set_xlabel("multiply-adds of one prediction (MACs)", color=MUTED, fontsize=9.5)
    log_ticks(axes.xaxis, (1, 2, 5) if high - low < 3 else (1,), format_count)
