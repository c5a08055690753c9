"""Temperatures and weights against a search, the calibration error against its definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bdistil.evaluation.temperature import (
    HIGHEST,
    LOWEST,
    calibration_error,
    fit_temperature,
    fit_weights,
    weighted_prefixes,
    winning_weights,
)


def drawn(samples=2000, classes=5, scale=3.0, seed=0):
    """Logits, and labels drawn from their softmax: calibrated as they are."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(samples, classes, generator=generator)
    return logits, torch.multinomial(torch.softmax(logits, -1), 1, generator=generator).flatten()


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_is_that_of_a_search(factor):
    logits, labels = drawn()
    grid = np.geomspace(LOWEST, HIGHEST, 4000)
    smoothing = {"label_smoothing": 1 / (len(labels) + 1)}
    losses = [float(F.cross_entropy(factor * logits.double() / t, labels, **smoothing)) for t in grid]
    found = fit_temperature(factor * logits, labels)
    assert found == pytest.approx(grid[np.argmin(losses)], rel=2e-3)
    assert found == pytest.approx(factor, rel=0.1)  # as the labels were drawn


def test_answers_that_are_all_wrong_stay_within_the_bound():
    logits, _ = drawn()
    assert fit_temperature(logits, logits.argmin(-1)) == pytest.approx(HIGHEST, rel=1e-6)


def error_by_hand(logits, labels):
    probability = torch.softmax(logits, -1).double().numpy()
    sure, right = probability.max(1), probability.argmax(1) == labels.numpy()
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (sure > low) & (sure <= low + 1 / 15)
        total += abs(right[inside].sum() - sure[inside].sum())
    return total / len(sure)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_calibration_error_is_its_definition_and_falls(factor):
    logits, labels = drawn()
    sharp = factor * logits
    assert calibration_error(sharp, labels) == pytest.approx(error_by_hand(sharp, labels), abs=1e-5)
    after = calibration_error(sharp, labels, fit_temperature(sharp, labels))
    assert after < 0.03
    assert factor == 1.0 or calibration_error(sharp, labels) > 0.1


def students(noises, samples=600, seed=1):
    """Own logits (T, N, L) of students that see the truth through noise."""
    logits, labels = drawn(samples, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    return torch.stack([logits + noise * torch.randn(logits.shape, generator=generator) for noise in noises]), labels


def test_weights_are_those_of_a_search():
    own, labels = students([6.0, 1.5])

    def loss(weight):
        prefixes = weighted_prefixes(own.double(), torch.tensor([1.0, weight], dtype=torch.float64))
        return sum(float(F.cross_entropy(z / fit_temperature(z, labels), labels)) for z in prefixes)

    grid = np.geomspace(0.1, 19, 120)
    best = grid[np.argmin([loss(weight) for weight in grid])]
    assert fit_weights(own, labels) == pytest.approx([1.0, best], rel=0.1)


def test_weights_are_off_unless_they_win():
    assert winning_weights(*students([8.0, 8.0, 0.5]))
    assert winning_weights(*students([2.0, 2.0, 2.0])) == []


def test_few_samples_that_are_all_right_do_not_make_every_answer_certain():
    """A stage that is right on all of 100 samples: its temperature must not fall to the bound."""
    logits, _ = drawn(samples=100)
    assert LOWEST < 5 * LOWEST < fit_temperature(logits, logits.argmax(-1)) < 1
