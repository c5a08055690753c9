"""Pictures of a run: accuracy of the prefixes against their MACs, error to the teacher by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bdistil.reporting.axes import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    Points,
    cost_axis,
    draw,
    log_ticks,
    note,
    panels_figure,
)
from bdistil.reporting.tables import Curve, Row, number, plain
from bdistil.storage.files import atomic
from bdistil.utils.drawing import default_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _points(rows: Sequence[Row], x: str, y: str) -> Points:
    """Points of two columns, restricted to x > 0 for a logarithmic axis."""
    pairs = ((number(row, x), number(row, y)) for row in rows)
    return [(a, b) for a, b in pairs if a is not None and b is not None and a > 0]


def _number_stages(axes: Axes, stages: Sequence[Row]) -> None:
    """Labels the prefixes with their numbers, from the last one backwards; skips numbers that would overlap."""
    low, high = axes.get_xlim()
    limit = math.inf
    for row in reversed(stages):
        for macs, top in sorted(_points([row], "macs", "val_accuracy") + _points([row], "macs", "test_accuracy"))[-1:]:
            if macs < limit:
                note(axes, row["stage"], (macs, top), (-3, 5), MUTED, fontsize=8.5, ha="right", weight="normal")
                limit = macs / (high / low) ** max(0.03, 0.0125 * len(str(row["stage"])))


def curve_figure(curve: Curve, size: tuple[float, float], title: str = "") -> Figure:
    """Validation and test accuracy (or R²) of every prefix against its cumulative MACs, with the teacher as reference.

    Args:
        curve: curve of the run.
        size: width and height in inches.
        title: title of the figure.
    """
    from matplotlib.ticker import PercentFormatter

    teacher, stages = curve.teacher, curve.stages
    figure, (axes,) = panels_figure(*size, {title: 1})
    validation, test = (_points(stages, "macs", f"{part}_accuracy") for part in ("val", "test"))
    goal = number(teacher, "val_accuracy") or number(teacher, "test_accuracy")
    star = [(macs, goal)] if goal and (macs := number(teacher, "macs")) else []
    points = validation + test or star or [(1.0, 1.0)]
    heights = [y for _, y in points] + ([goal] if goal else [])
    span = max(max(heights) - min(heights), 0.02)
    axes.set_ylim(min(heights) - 0.12 * span, max(heights) + 0.14 * span)
    if not curve.regression:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    cost_axis(axes, [x for x, _ in points + star], max(points)[0])
    curves = [c for c in ((validation, "o-", BLUE, "validation"), (test, "s--", ORANGE, "test")) if c[0]]
    beaten = bool(goal and curves) and max(points[-1][1] for points, *_ in curves) > (goal or 0.0)
    below = goal if goal and not beaten else math.inf
    for points, style, colour, name in sorted(curves, key=lambda drawn: -drawn[0][-1][1]):
        macs, accuracy = points[-1]
        below = min(accuracy, below - 0.075 * span)  # labels are stacked below each other and the teacher's line
        draw(axes, points, style, colour)
        note(axes, f"{name} {curve.score(accuracy, 1)}", (macs, below), (9, 0), colour, va="center")
    _number_stages(axes, stages)
    if goal:
        axes.axhline(goal, color=INK, linewidth=1, linestyle=":")
        draw(axes, star, "*", INK, 13)
        part = "validation" if number(teacher, "val_accuracy") else "test"
        text = f"teacher {curve.score(goal, 1)} ({part})" + (f", {curve.cell(teacher, 'macs')} MACs" if star else "")
        place = {"ha": "left" if beaten else "right", "xycoords": axes.get_yaxis_transform()}
        note(axes, text, (0.01 if beaten else 0.99, goal), (0, 7), INK, **place)
    return figure


def error_figure(curve: Curve, size: tuple[float, float]) -> Figure:
    """Rms and largest error to the teacher, and the share of outputs that meet their margin, by stage.

    Args:
        curve: curve of the run.
        size: width and height in inches.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, (errors, shares) = panels_figure(*size, {"error to the teacher": 2, "outputs that meet their margin": 1})
    stages = curve.stages
    for column, name, style, colour in (("sup_error", "largest", "s--", ORANGE), ("rms_error", "rms", "o-", BLUE)):
        points = [(x, y) for x, y in _points(stages, "stage", column) if y > 0]
        draw(errors, points, style, colour)
        for first in points[:1]:
            note(errors, f"{name} {first[1]:.3g} → {points[-1][1]:.3g}", first, (2, 8), colour)
    errors.set_yscale("log")
    errors.margins(y=0.2)
    log_ticks(errors.yaxis, (1, 2, 5), plain)
    for stage, share in _points(stages, "stage", "margin_share"):
        shares.bar(stage, share, width=0.4, color=BLUE)
    shares.set_ylim(0, 1)
    shares.set_xlabel("stage", color=MUTED, fontsize=9.5)
    shares.yaxis.set_major_formatter(PercentFormatter(1))
    shares.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@default_style()
def plot_curve(rows: Sequence[Row], path: Path, *, title: str = "", task: str = "classification") -> None:
    """Draws accuracy (or R²) of every prefix against its cumulative MACs, with the teacher: a PNG of 1080 x 630 pixels.

    Args:
        rows: the rows of curve.csv, the teacher first; any cell may be empty.
        path: the PNG, written atomically.
        title: title of the picture.
        task: task of the run.
    """
    with atomic(path) as temporary:
        curve_figure(Curve(rows, task), (7.2, 4.2), title).savefig(temporary, format="png", dpi=150)
