"""Exit thresholds with a guarantee for new samples: learn-then-test with exact binomial bounds.

Thresholds that lose at most ε on the samples they were fitted on lose more on new ones, as the fit overfits. Here a
sequence of thresholds, from conservative to aggressive, is learned on one part of the samples and tested on the others,
in order, up to the first that fails. The last that passes loses at most ε on new samples from the same distribution,
with probability 1 - δ over the draw of the samples: fixed sequence testing with a split, of Angelopoulos, Bates,
Candès, Jordan and Lei, Learn then Test (arXiv 2110.01052). The test counts spoiled samples, which all stages together
classify correctly and the exits wrongly. Their number is binomial, so its bound is exact (Clopper and Pearson,
Biometrika 26, 1934). The accuracy lost is the share of spoiled samples minus that of samples corrected by an exit, so
it is never larger.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import beta, binom

from bdistil.ensemble.budget import NEVER
from bdistil.ensemble.calibration import Promise
from bdistil.evaluation.thresholds import exit_stages
from bdistil.runner.confidence import Array

LEARNED = 5  # one sample in five is used for learning
CANDIDATES = 200


def upper_bound(events: int, samples: int, delta: float) -> float:
    """Clopper and Pearson's upper bound on a share, given the number of events; it holds with probability 1 - `delta`.

    Example:
        >>> round(upper_bound(0, 400, 0.1), 5), round(upper_bound(1, 400, 0.1), 5)
        (0.00574, 0.00969)
    """
    return 1.0 if events == samples else float(beta.ppf(1 - delta, events + 1, samples - events))


def events_allowed(samples: int, share: float, delta: float) -> int:
    """Largest number of events for which `upper_bound` does not exceed `share`; -1 if even 0 events exceed it."""
    counts = np.arange(samples + 1)
    return int((binom.cdf(counts, samples, min(share, 1.0)) <= delta).sum()) - 1


def samples_needed(max_loss: float, delta: float) -> int | None:
    """Smallest number of samples, learned ones included, for which a promise is possible; None if no number suffices.

    Args:
        max_loss: largest loss of accuracy, in percentage points.
        delta: probability that the promise is broken.

    Example:
        >>> samples_needed(1.0, 0.1), samples_needed(0.5, 0.1)
        (287, 574)
    """
    share = max_loss / 100
    if share <= 0:
        return None
    tested = 1 if share >= 1 else math.ceil(math.log(delta) / math.log1p(-share))
    return max((tested - 1) * LEARNED // (LEARNED - 1) + 1, tested + 1)  # the least whose untouched rest is `tested`


def learned_samples(samples: int) -> int:
    """Number of samples on which the sequence is learned."""
    return max(samples // LEARNED, 1)


def held_back(samples: int, max_loss: float, delta: float) -> Array:
    """Mask (N,) of the samples to test on; the others are used for learning. Empty if there are too few samples.

    The choice is random, as samples may be ordered by class or time, but always the same.
    """
    mask, needed = np.zeros(samples, bool), samples_needed(max_loss, delta)
    if needed is not None and samples >= needed:
        mask[np.random.default_rng(0).permutation(samples)[learned_samples(samples) :]] = True
    return mask


def promised_thresholds(
    confidence: Array, right: Array, tested: Array, max_loss: float, delta: float
) -> tuple[list[float], Promise]:
    """The most aggressive thresholds of the sequence for which the promise holds; all stages run if it holds for none.

    Each element of the sequence is one threshold for all stages: 200 quantiles of the learned confidences, descending.

    Args:
        confidence: (T, N); may depend on the labels of the learned samples, but not on those of the tested ones.
        right: (T, N) bool, whether the answer of a prefix is correct.
        tested: (N,) bool, see `held_back`.
        max_loss: percentage points of accuracy that may be lost against all stages.
        delta: probability with which more may be lost.

    Returns:
        One threshold per stage, see `fit_thresholds`, and the promise.
    """
    stages, samples, kept, spoiled = len(confidence), int(tested.sum()), NEVER, 0
    if samples and stages > 1:
        allowed = events_allowed(samples, max_loss / 100, delta)
        quantiles = np.quantile(confidence[:-1, ~tested], np.linspace(1, 0, CANDIDATES))
        for threshold in np.unique(quantiles)[::-1]:
            found = _spoiled(confidence[:, tested], right[:, tested], float(threshold))
            if found > allowed:
                break
            kept, spoiled = float(threshold), found
    promise = Promise(
        max_loss=max_loss,
        delta=delta,
        kept=kept < NEVER,
        validation=right.shape[1],
        samples=samples,
        spoiled=spoiled,
        bound=100 * upper_bound(spoiled, samples, delta) if samples else 100.0,
        needed=samples_needed(max_loss, delta),
        needed_for_half=samples_needed(max_loss / 2, delta),
    )
    return [*(kept,) * (stages - 1), 0.0], promise


def _spoiled(confidence: Array, right: Array, threshold: float) -> int:
    stages = exit_stages(confidence, np.full(len(confidence), threshold))
    exited = right[stages, np.arange(right.shape[1])]
    return int((right[-1] & ~exited).sum())
