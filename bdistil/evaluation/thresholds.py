"""Targets of exit thresholds, and the naive fit: the best thresholds on the given samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from bdistil.ensemble.budget import NEVER, RULES, Rule
from bdistil.ensemble.calibration import in_points
from bdistil.errors import UserError
from bdistil.runner.confidence import Array


@dataclass(frozen=True)
class ExitTarget:
    """Target of fitted thresholds; set either `max_loss` or `average_macs`.

    Attributes:
        rule: exit rule.
        max_loss: percentage points of accuracy that the exits may lose against all stages; 1 by default.
        average_macs: average multiply-adds per sample that the exits may cost.
        delta: probability with which new samples may lose more than `max_loss`, 0.1 by default, see
            `bdistil.evaluation.risk_control`; ``none`` is the naive fit, which meets `max_loss` on the validation part
            only.

    Raises:
        UserError: the rule is unknown, both `max_loss` and `average_macs` are set, `max_loss` < 0, or `delta` is
            outside of 0 … 1 or set for `average_macs`.
    """

    rule: Rule = "max_prob"
    max_loss: float | None = None
    average_macs: float | None = None
    delta: float | Literal["none"] | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"Expected `rule` to be one of {', '.join(RULES)}, got {self.rule!r}.")
        if self.max_loss is not None and self.average_macs is not None:
            raise UserError(
                f"Give one of `max_loss` and `average_macs`, got {self.max_loss} and {self.average_macs}: thresholds "
                "cannot be fitted for both."
            )
        if self.max_loss is None and self.average_macs is None:
            object.__setattr__(self, "max_loss", 1.0)
        if self.max_loss is not None and not self.max_loss >= 0:
            raise UserError(f"Expected `max_loss` in points >= 0, got {self.max_loss}.")
        given, cost = self.delta, self.average_macs is not None
        if cost and given not in (None, "none"):
            raise UserError(
                f"`delta` is for `max_loss`, got delta={given} with `average_macs`: an average of MACs is fitted on "
                "the validation part and promises no accuracy. Leave `delta` out."
            )
        if given is None:
            object.__setattr__(self, "delta", "none" if cost else 0.1)
        elif given != "none" and (isinstance(given, str) or not 0 < given < 1):
            raise UserError(f"Expected `delta` to be in 0 … 1 or 'none', got {given!r}.")

    @property
    def naive(self) -> bool:
        """Whether the target holds on the validation part only, without a promise for new samples."""
        return self.delta == "none"

    @property
    def points(self) -> float:
        """`max_loss` as a number; 0 if not set."""
        return float(self.max_loss or 0)

    @property
    def risk(self) -> float:
        """`delta` as a number; 0 for a naive fit."""
        return 0.0 if self.naive else float(self.delta or 0)

    def __str__(self) -> str:
        if self.max_loss is None:
            return f"average at most {self.average_macs:,.0f} MACs"
        where = "of the validation part (naive)" if self.naive else f"with probability {1 - self.risk:g}"
        return f"lose at most {in_points(self.max_loss)} {where}"


class Outcome(NamedTuple):
    """Effect of thresholds: correct answers, multiply-adds of all samples, and samples that exit at each stage (T,)."""

    right: int
    macs: int
    leaving: Array


def exit_stages(confidence: Array, thresholds: Array) -> Array:
    """First stage (N,), from 0, at which confidences (T, N) reach thresholds (T,); the last stage decides the rest."""
    decided = confidence >= thresholds[:, None]
    decided[-1] = True
    stages: Array = decided.argmax(0)
    return stages


def exit_outcome(stages: Array, right: Array, macs: Array) -> Outcome:
    """Correct answers and cost of exits at stages (N,), from 0; `right` and `macs` as in `fit_thresholds`."""
    samples = np.arange(right.shape[1])
    return Outcome(int(right[stages, samples].sum()), int(macs[stages].sum()), np.bincount(stages, minlength=len(macs)))


def fit_thresholds(
    confidence: Array, right: Array, macs: Sequence[int], target: ExitTarget, *, shared: bool = False
) -> list[float]:
    """Fits thresholds to a target: the least MACs at an accuracy, or the best accuracy at average MACs.

    Coordinate search from the best threshold shared by all stages: one threshold at a time moves to its optimal value
    as long as this improves the result. No change of a single threshold improves it further; a change of several may.

    Args:
        confidence: (T, N).
        right: (T, N) bool, whether the answer of a prefix is correct.
        macs: cumulative MACs per sample, one value per stage.
        target: percentage points of accuracy that may be lost against all stages, or average MACs per sample.
        shared: use one threshold for all stages, which saves less on these samples but generalises better.

    Returns:
        One threshold per stage; `NEVER` if a stage decides no sample, 0 at the last.

    Raises:
        UserError: no stage meets the target.
    """
    average = target.average_macs
    if average is not None and not average >= macs[0]:
        raise UserError(f"Expected `average_macs` >= {macs[0]:,}, the cost of the first stage, got {average}.")
    search = _Search(confidence.astype(np.float64), right.astype(bool), np.asarray(macs), target)
    best = search.shared()
    while not shared and (better := search.improved(best)) is not None:
        best = better
    return [*(float(t) for t in best[:-1]), 0.0]


class _Search:
    """Search for thresholds; results are compared lexicographically, larger is better."""

    def __init__(self, confidence: Array, right: Array, macs: Array, target: ExitTarget) -> None:
        self.confidence, self.right, self.macs, self.target = confidence, right, macs, target

    def value(self, right: Array | int, macs: Array | int) -> tuple[Array, Array, Array]:
        """(target met, quantity to maximise, tie-breaker) for given numbers of correct answers and MACs."""
        right, saved, samples = np.asarray(right), -np.asarray(macs), self.right.shape[1]
        if self.target.max_loss is None:
            met = -saved <= self.target.average_macs * samples
            return met, np.where(met, right, saved), np.where(met, saved, right)
        # 1e-6 absorbs rounding: 0.2 points of 500 samples are exactly one sample.
        met = right >= self.right[-1].sum() - self.target.max_loss / 100 * samples - 1e-6
        return met, np.where(met, saved, right), np.where(met, right, saved)

    def of(self, thresholds: Array) -> tuple[float, ...]:
        result = exit_outcome(exit_stages(self.confidence, thresholds), self.right, self.macs)
        return tuple(float(v) for v in self.value(result.right, result.macs))

    def shared(self) -> Array:
        """The best threshold for all stages, among 200 quantiles of the confidences."""
        quantiles = np.quantile(self.confidence, np.linspace(0, 1, 200))
        tries = [np.full(len(self.macs), t) for t in (NEVER, 0.0, *np.unique(quantiles))]
        return max(tries, key=self.of)

    def improved(self, thresholds: Array) -> Array | None:
        """Thresholds with a single one improved; None if no single change improves the result."""
        now = self.of(thresholds)
        for number in range(len(self.macs) - 1):
            moved: Array = thresholds.copy()
            moved[number] = self.best_threshold(thresholds, number)
            if self.of(moved) > now:
                return moved
        return None

    def best_threshold(self, thresholds: Array, number: int) -> float:
        """The best threshold of one stage with the others fixed; tries all its values in one sorted pass."""
        place = np.arange(len(thresholds))
        closed = np.where(place == number, NEVER, thresholds)  # no sample exits at this stage
        base = exit_outcome(exit_stages(self.confidence, closed), self.right, self.macs)
        order = self._arriving(closed, number)
        later = exit_stages(self.confidence, np.where(place <= number, NEVER, thresholds))[order]  # exits without it
        right = base.right + _running(self.right[number, order].astype(int) - self.right[later, order])
        macs = base.macs + _running(self.macs[number] - self.macs[later])
        met, first, second = self.value(right, macs)
        ordered = self.confidence[number, order]
        best = max(_counts(ordered), key=lambda count: (met[count], first[count], second[count]))
        return _between(ordered, int(best))

    def _arriving(self, thresholds: Array, number: int) -> Array:
        """Samples that no earlier stage decides, by descending confidence at this stage."""
        samples = np.flatnonzero((self.confidence < thresholds[:, None])[:number].all(0))
        return samples[np.argsort(-self.confidence[number, samples], kind="stable")]


def _running(changes: Array) -> Array:
    """Sums of the first 0, 1, … n changes, (n + 1,)."""
    return np.concatenate(([0], changes.cumsum()))


def _counts(ordered: Array) -> Array:
    """How many of the samples with descending confidences may exit: samples of equal confidence exit together."""
    falls = np.concatenate(([True], ordered[1:] < ordered[:-1], [True]))
    return np.flatnonzero(falls[: len(ordered) + 1])


def _between(ordered: Array, count: int) -> float:
    """Threshold reached by the first `count` of descending values, halfway to the next to be robust to rounding."""
    if count == 0:
        return NEVER
    following = ordered[count] if count < len(ordered) else ordered[count - 1] * (1 - 1e-4)
    return float((ordered[count - 1] + following) / 2)
