"""Thresholds of an exit rule, fitted on samples whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bdistil.ensemble.budget import NEVER
from bdistil.errors import UserError

Array = np.ndarray[Any, Any]


class Outcome(NamedTuple):
    """What thresholds give: right answers, multiply-adds of all samples, and how many samples leave at each stage."""

    right: int
    macs: int
    leaving: Array


def exit_stages(confidence: Array, thresholds: Array) -> Array:
    """The stage, from 0, at which each sample is decided; what no stage decides, the last one does.

    Args:
        confidence: (T, N).
        thresholds: (T,).
    """
    decided = confidence >= thresholds[:, None]
    decided[-1] = True
    stages: Array = decided.argmax(0)
    return stages


def outcome(stages: Array, right: Array, macs: Array) -> Outcome:
    """What exits at these stages give.

    Args:
        stages: (N,), from 0.
        right: (T, N) bool, is the answer of a prefix right?
        macs: (T,) cumulative, of one sample.
    """
    samples = np.arange(right.shape[1])
    return Outcome(int(right[stages, samples].sum()), int(macs[stages].sum()), np.bincount(stages, minlength=len(macs)))


def fit_thresholds(
    confidence: Array,
    right: Array,
    macs: Sequence[int],
    *,
    max_loss: float | None = None,
    average_macs: float | None = None,
    shared: bool = False,
) -> list[float]:
    """Thresholds for a target: the least MACs at an accuracy, or the best accuracy at an average of MACs.

    It starts from the best threshold that all stages share, then moves one stage's threshold at a time to the best of
    all its values while that helps. So no change of a single threshold is better; a change of several may be.

    Args:
        confidence: (T, N).
        right: (T, N) bool, is the answer of a prefix right?
        macs: cumulative, of one sample, one number a stage.
        max_loss: points of accuracy that may be lost against all stages.
        average_macs: that a sample may cost on average.
        shared: the same threshold for all stages: it saves less here, and keeps its word better on new samples.

    Returns:
        One threshold a stage; `NEVER` where a stage decides nobody, 0 at the last.

    Raises:
        UserError: not exactly one target is given, or no stage fits it.
    """
    if (max_loss is None) == (average_macs is None):
        raise UserError(f"Give one of `max_loss` and `average_macs`, got {max_loss} and {average_macs}.")
    if max_loss is not None and not max_loss >= 0:
        raise UserError(f"Expected `max_loss` in points >= 0, got {max_loss}.")
    if average_macs is not None and not average_macs >= macs[0]:
        raise UserError(f"Expected `average_macs` >= {macs[0]:,}, the cost of the first stage, got {average_macs}.")
    problem = _Problem(confidence.astype(np.float64), right.astype(bool), np.asarray(macs), max_loss, average_macs)
    best = problem.shared()
    while not shared and (better := problem.improved(best)) is not None:
        best = better
    return [*(float(t) for t in best[:-1]), 0.0]


class _Problem:
    """Samples and a target; larger values of `value` are better, lexicographically."""

    def __init__(
        self, confidence: Array, right: Array, macs: Array, max_loss: float | None, average_macs: float | None
    ) -> None:
        self.confidence, self.right, self.macs = confidence, right, macs
        self.samples = right.shape[1]
        self.most_macs = None if average_macs is None else average_macs * self.samples
        # 0.2 points of 500 samples are one sample, whatever the rounding of 0.2 says
        self.least_right = None if max_loss is None else right[-1].sum() - max_loss / 100 * self.samples - 1e-6

    def value(self, right: Array | int, macs: Array | int) -> tuple[Array, Array, Array]:
        """Is the target met; then what is to be made large; then what decides between equals."""
        right, macs = np.asarray(right), np.asarray(macs)
        if self.least_right is not None:
            met = right >= self.least_right
            return met, np.where(met, -macs, right), np.where(met, right, -macs)
        met = macs <= self.most_macs
        return met, np.where(met, right, -macs), np.where(met, -macs, right)

    def of(self, thresholds: Array) -> tuple[float, ...]:
        result = outcome(exit_stages(self.confidence, thresholds), self.right, self.macs)
        return tuple(float(v) for v in self.value(result.right, result.macs))

    def shared(self) -> Array:
        """The best threshold for all stages, of 200 quantiles."""
        quantiles = np.quantile(self.confidence, np.linspace(0, 1, 200))
        tries = [np.full(len(self.macs), t) for t in (NEVER, 0.0, *np.unique(quantiles))]
        return max(tries, key=self.of)

    def improved(self, thresholds: Array) -> Array | None:
        """Thresholds with one of them moved, where that is better."""
        now = self.of(thresholds)
        for number in range(len(self.macs) - 1):
            moved: Array = thresholds.copy()
            moved[number] = self.best_threshold(thresholds, number)
            if self.of(moved) > now:
                return moved
        return None

    def best_threshold(self, thresholds: Array, number: int) -> float:
        """The best threshold of one stage, those of the others given: all its values in one pass, sorted."""
        place = np.arange(len(thresholds))
        closed = np.where(place == number, NEVER, thresholds)  # nobody leaves at this stage
        everybody = outcome(exit_stages(self.confidence, closed), self.right, self.macs)
        later = exit_stages(self.confidence, np.where(place <= number, NEVER, thresholds))
        reaching = np.flatnonzero((self.confidence < closed[:, None])[:number].all(0))
        order = reaching[np.argsort(-self.confidence[number, reaching], kind="stable")]
        sure = self.confidence[number, order]
        gain = self.right[number, order].astype(int) - self.right[later[order], order]
        spared = self.macs[number] - self.macs[later[order]]
        right = everybody.right + np.concatenate(([0], gain.cumsum()))
        macs = everybody.macs + np.concatenate(([0], spared.cumsum()))
        cut = np.concatenate(([True], np.append(sure[1:] < sure[:-1], True)))[: len(order) + 1]  # not between equals
        met, first, second = self.value(right, macs)
        return _between(sure, int(max(np.flatnonzero(cut), key=lambda m: (met[m], first[m], second[m]))))


def _between(sure: Array, count: int) -> float:
    """A threshold that the first `count` of falling numbers reach: halfway to the next, as last bits may differ."""
    if count == 0:
        return NEVER
    following = sure[count] if count < len(sure) else sure[count - 1] * (1 - 1e-4)
    return float((sure[count - 1] + following) / 2)
