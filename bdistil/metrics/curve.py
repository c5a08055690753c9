"""Figures of the accuracy-cost curve: area under it, violations of monotonicity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from bdistil.errors import UserError


def area_under_curve(macs: Sequence[float], accuracy: Sequence[float]) -> float:
    """Area under accuracy over log(MACs), by the trapezoid rule, divided by the width: a mean accuracy in 0 … 1.

    This is the expected accuracy for a budget anywhere between the first and the last prefix, uniform on a logarithmic
    scale. A single point returns its own accuracy.

    Args:
        macs: cumulative MACs of the prefixes, increasing.
        accuracy: accuracy of each prefix.

    Raises:
        UserError: the lengths differ, or MACs are not positive and increasing.

    Example:
        >>> round(area_under_curve([1, 10, 100], [0.5, 0.7, 0.8]), 3)
        0.675
    """
    if len(macs) != len(accuracy) or not len(macs):
        raise UserError(f"Expected as many MACs as accuracies, at least one, got {len(macs)} and {len(accuracy)}.")
    if min(macs) <= 0 or any(b <= a for a, b in pairwise(macs)):
        raise UserError(f"Expected `macs` of the prefixes to be positive and rising, got {list(macs)}.")
    if len(macs) == 1:
        return float(accuracy[0])
    logs, heights = np.log(np.array(macs, dtype=float)), np.array(accuracy, dtype=float)
    return float((np.diff(logs) * (heights[1:] + heights[:-1]) / 2).sum() / (logs[-1] - logs[0]))


def violations_of_monotony(accuracy: Sequence[float], tolerance: float = 0.0) -> int:
    """Number of prefixes that are less accurate than the one before, by more than `tolerance`.

    Example:
        >>> violations_of_monotony([0.5, 0.7, 0.69, 0.8]), violations_of_monotony([0.7, 0.69], tolerance=0.02)
        (1, 0)
    """
    return sum(b < a - tolerance for a, b in pairwise(accuracy))


def merge_points(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Sorted costs and the mean accuracy at each, from the (cost, accuracy) pairs of several fits.

    Fits of one model with different seeds or folds have the same cost and become one point.

    Example:
        >>> merge_points([(20, 0.75), (10, 0.5), (20, 0.25)])
        ([10, 20], [0.5, 0.5])
    """
    found: dict[float, list[float]] = {}
    for cost, accuracy in points:
        found.setdefault(cost, []).append(accuracy)
    costs = sorted(found)
    return costs, [sum(found[cost]) / len(found[cost]) for cost in costs]


def curve_figures(macs: Sequence[float], accuracy: Sequence[float], tolerance: float = 0.0) -> dict[str, float]:
    """`area_under_curve` and `violations_of_monotony` of the prefixes so far, in the form that is logged.

    Example:
        >>> curve_figures([10, 20], [0.5, 0.25])
        {'area': 0.375, 'violations': 1.0}
    """
    violations = float(violations_of_monotony(accuracy, tolerance))
    return {"area": area_under_curve(macs, accuracy), "violations": violations}
