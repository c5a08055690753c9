"""TODO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from bdistil.errors import UserError


def area_under_curve(macs: Sequence[float], accuracy: Sequence[float]) -> float:
    """Area under accuracy over log(MACs), by the trapezoid rule, divided by the width: a mean accuracy in 0 … 1.

    The mean accuracy that a user gets whose budget lies anywhere between the first and the last prefix, on a
    logarithmic scale. One point gives its own accuracy.

    Args:
        macs: cumulative MACs of the prefixes, rising.
        accuracy: of the prefixes.

    Raises:
        UserError: the lengths differ, or MACs are not positive and rising.
    """
    if len(macs) != len(accuracy) or not len(macs):
        raise UserError(f"Expected as many MACs as accuracies, at least one, got {len(macs)} and {len(accuracy)}.")
    if min(macs) <= 0 or any(b <= a for a, b in pairwise(macs)):
        raise UserError(f"Expected `macs` of the prefixes to be positive and rising, got {list(macs)}.")
    if len(macs) == 1:
        return float(accuracy[0])
    logs = [math.log(m) for m in macs]
    steps, heights = pairwise(logs), pairwise(accuracy)
    area = sum((right - left) * (low + high) / 2 for (left, right), (low, high) in zip(steps, heights, strict=True))
    return area / (logs[-1] - logs[0])


def violations_of_monotony(accuracy: Sequence[float], tolerance: float = 0.0) -> int:
    """How many prefixes are less accurate than the one before, by more than `tolerance`."""
    return sum(b < a - tolerance for a, b in pairwise(accuracy))


def curve_figures(macs: Sequence[float], accuracy: Sequence[float], tolerance: float = 0.0) -> dict[str, float]:
    """`area_under_curve` and `violations_of_monotony` of the prefixes so far, as they are logged."""
    return {
        "area": area_under_curve(macs, accuracy),
        "violations": float(violations_of_monotony(accuracy, tolerance)),
    }
