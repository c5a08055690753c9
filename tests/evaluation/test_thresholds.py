"""Fitted thresholds against all that could be chosen."""

import itertools

import numpy as np
import pytest

from bdistil.ensemble.budget import NEVER
from bdistil.errors import UserError
from bdistil.evaluation.thresholds import ExitTarget, exit_outcome, exit_stages, fit_thresholds

MACS = [10, 25, 45, 70]


def drawn(seed, stages, samples, levels=None):
    """Confidence (T, N), and answers that are right more often with confidence and at later stages."""
    rng = np.random.default_rng(seed)
    sure = rng.random((stages, samples))
    sure = sure if levels is None else np.round(sure * levels) / levels
    return sure, rng.random((stages, samples)) < 0.4 + 0.4 * sure + 0.1 * np.arange(stages)[:, None]


def every_choice(confidence, right, macs):
    """(right, MACs) of every way to choose thresholds: sample by sample, in plain Python."""
    stages, samples = confidence.shape
    cuts = [[NEVER, *sorted(set(row))] for row in confidence[:-1].tolist()]
    for thresholds in itertools.product(*cuts):
        hits = spent = 0
        for i in range(samples):
            exit = next((k for k, t in enumerate(thresholds) if confidence[k, i] >= t), stages - 1)
            hits, spent = hits + right[exit, i], spent + macs[exit]
        yield int(hits), int(spent)


def reached(confidence, right, macs, **target):
    thresholds = np.array(fit_thresholds(confidence, right, macs, ExitTarget(**target)))
    return exit_outcome(exit_stages(confidence, thresholds), right, np.array(macs))


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("seed", range(6))
def test_two_stages_get_the_best_there_is(seed, levels):
    sure, right = drawn(seed, 2, 30, levels)
    choices = list(every_choice(sure, right, MACS[:2]))
    for loss in (0.0, 4.0, 10.0):
        least = right[-1].sum() - loss / 100 * 30
        found = reached(sure, right, MACS[:2], max_loss=loss)
        assert found.right >= least - 1e-9
        assert found.macs == min(macs for hits, macs in choices if hits >= least - 1e-9)
    for average in (10, 14, 20, 25):
        found = reached(sure, right, MACS[:2], average_macs=average)
        assert found.macs <= average * 30
        assert found.right == max(hits for hits, macs in choices if macs <= average * 30)


@pytest.mark.parametrize("stages", [3, 4])
def test_more_stages_come_near_the_best_there_is(stages):
    """Moving one threshold at a time can end beside the best: how far is held here."""
    ratios, hits = [], []
    samples = 14 if stages == 3 else 8
    for seed in range(12):
        sure, right = drawn(seed, stages, samples)
        macs = MACS[:stages]
        choices = list(every_choice(sure, right, macs))
        found = reached(sure, right, macs, max_loss=8.0)
        least = right[-1].sum() - 0.08 * samples
        assert found.right >= least - 1e-9
        ratios.append(found.macs / min(m for h, m in choices if h >= least - 1e-9))
        found = reached(sure, right, macs, average_macs=20)
        assert found.macs <= 20 * samples
        hits.append(max(h for h, m in choices if m <= 20 * samples) - found.right)
    assert np.mean(ratios) <= 1.05
    assert min(ratios) >= 1.0
    assert np.mean(hits) <= 0.5
    assert min(hits) >= 0


@pytest.mark.parametrize("levels", [None, 6])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [{"max_loss": 1.0}, {"average_macs": 30}])
def test_no_other_threshold_of_one_stage_is_better(target, seed, levels):
    sure, right = drawn(seed, 4, 200, levels)
    macs = np.array(MACS)
    fitted = np.array(fit_thresholds(sure, right, MACS, ExitTarget(**target)))
    best = exit_outcome(exit_stages(sure, fitted), right, macs)
    least = right[-1].sum() - 2
    for number in range(3):
        for cut in [*np.unique(sure[number]), NEVER]:
            moved = fitted.copy()
            moved[number] = cut
            other = exit_outcome(exit_stages(sure, moved), right, macs)
            if "max_loss" in target and other.right >= least:
                assert other.macs >= best.macs
            elif "average_macs" in target and other.macs <= 30 * 200:
                assert other.right <= best.right


def test_each_stage_may_have_a_threshold_of_its_own():
    """The first stage is only sure of what is wrong: nobody leaves there, though one threshold for all would do it."""
    sure = np.array([[0.9] * 5 + [0.1] * 5, [0.8] * 5 + [0.7] * 5, [1.0] * 10])
    right = np.array([[False] * 10, [True] * 10, [True] * 10])
    assert reached(sure, right, [1, 2, 3], max_loss=0.0).leaving.tolist() == [0, 10, 0]


@pytest.mark.parametrize("target", [{"max_loss": 1.0}, {"average_macs": 30}])
def test_one_threshold_for_all_stages_is_the_best_of_200_quantiles(target):
    sure, right = drawn(4, 4, 100)
    macs = np.array(MACS)
    *fitted, last = fit_thresholds(sure, right, MACS, ExitTarget(**target), shared=True)
    assert last == 0
    assert len(set(fitted)) == 1
    tries = [
        exit_outcome(exit_stages(sure, np.full(4, t)), right, macs) for t in np.quantile(sure, np.linspace(0, 1, 200))
    ]
    found = exit_outcome(exit_stages(sure, np.array([*fitted, 0])), right, macs)
    if "max_loss" in target:
        assert found.macs == min(o.macs for o in tries if o.right >= right[-1].sum() - 1)
    else:
        assert found.right == max(o.right for o in tries if o.macs <= 30 * 100)


def test_one_stage_decides_all():
    assert fit_thresholds(np.ones((1, 3)), np.ones((1, 3), bool), [5], ExitTarget(max_loss=0.0)) == [0.0]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"max_loss": 0.1, "average_macs": 20}, "one of `max_loss` and `average_macs`, got 0.1 and 20"),
        ({"max_loss": -1.0}, "`max_loss` in points >= 0, got -1.0"),
        ({"max_loss": float("nan")}, "got nan"),
        ({"average_macs": 9}, "`average_macs` >= 10, the cost of the first stage, got 9"),
    ],
)
def test_targets_that_make_no_sense(target, message):
    with pytest.raises(UserError, match=message):
        fit_thresholds(*drawn(0, 4, 20), MACS, ExitTarget(**target))
