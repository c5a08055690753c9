"""The curve of accuracy against cost."""

import math

import numpy as np
import pytest

from bdistil.errors import UserError
from bdistil.metrics.curve import area_under_curve, violations_of_monotony


@pytest.mark.parametrize(
    ("macs", "accuracy"),
    [
        ([10, 100], [0.5, 0.9]),
        ([22_000, 50_000, 51_000, 9_000_000], [0.4, 0.8, 0.7, 0.95]),
        ([1, 2, 4, 8], [0.6, 0.6, 0.6, 0.6]),
        ([0.5, 3.0], [1.0, 0.0]),
    ],
)
def test_area_against_a_numerical_integral(macs, accuracy):
    low, high = math.log(macs[0]), math.log(macs[-1])
    budgets = low + (np.arange(200_000) + 0.5) * (high - low) / 200_000
    expected = np.interp(budgets, np.log(macs), accuracy).mean()
    assert area_under_curve(macs, accuracy) == pytest.approx(expected, abs=1e-6)
    assert area_under_curve([1000 * m for m in macs], accuracy) == pytest.approx(expected, abs=1e-6)


def test_area_by_hand():
    # Half of the width at 0.5 on average, half of it at 1.
    assert area_under_curve([1, 10, 100], [0.0, 1.0, 1.0]) == pytest.approx(0.75)


def test_area_of_one_point_is_its_accuracy():
    assert area_under_curve([123], [0.7]) == 0.7


@pytest.mark.parametrize(
    ("macs", "accuracy", "message"),
    [
        ([], [], "as many MACs as accuracies, at least one, got 0 and 0"),
        ([1, 2], [0.5], "as many MACs as accuracies, at least one, got 2 and 1"),
        ([1], [0.5, 0.6], "got 1 and 2"),
        ([0, 2], [0.5, 0.6], r"`macs` of the prefixes to be positive and rising, got \[0, 2\]"),
        ([-1], [0.5], r"got \[-1\]"),
        ([3, 2], [0.5, 0.6], r"positive and rising, got \[3, 2\]"),
        ([1, 5, 5], [0.5, 0.6, 0.7], r"positive and rising, got \[1, 5, 5\]"),
    ],
)
def test_curves_that_have_no_area(macs, accuracy, message):
    with pytest.raises(UserError, match=message):
        area_under_curve(macs, accuracy)


@pytest.mark.parametrize(
    ("accuracy", "tolerance", "violations"),
    [
        ([], 0.0, 0),
        ([0.5], 0.0, 0),
        ([0.5, 0.6, 0.7], 0.0, 0),
        ([0.5, 0.5, 0.5], 0.0, 0),
        ([0.7, 0.6, 0.5], 0.0, 2),
        ([0.5, 0.7, 0.6, 0.65], 0.0, 1),  # 0.65 is less than the best, but not than the one before
        ([0.5, 0.7, 0.695, 0.6], 0.01, 1),
        ([0.75, 0.5], 0.25, 0),  # by no more than the tolerance
    ],
)
def test_violations(accuracy, tolerance, violations):
    assert violations_of_monotony(accuracy, tolerance) == violations
