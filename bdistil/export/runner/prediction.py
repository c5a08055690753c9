"""Prediction with early exits: stops for samples that are decided.

The answer to a sample is that of the first stage at which the exit rule decides it. When the rule is evaluated, and
when decided samples are removed from the batch, is a matter of time only, see `Guard`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .budget import Array, Prediction, confidence_of, confidence_of_one
from .stage_clock import Deadline, Guard
from .stages import StageRunner

ALWAYS = -1.0  # a threshold that every sample reaches
KEPT = 64  # repetitions of scales and thresholds
FEW = 96  # numbers up to which the rule is evaluated in Python's floats: less than the calls of NumPy take
ROUNDING = 2.0**-24  # they reach a threshold where float32, rounded, does


@dataclass(frozen=True)
class Exits:
    """Exit rule and its thresholds.

    Attributes:
        rule: one of `RULES`.
        thresholds: one per stage; a sample is decided where its confidence reaches it.
        temperatures: one per stage.
        shares: expected share of samples decided at each stage, where known.
    """

    rule: str
    thresholds: Sequence[float]
    temperatures: Sequence[float]
    shares: Sequence[float] | None = None


def shares_at(rows: Sequence[Sequence[float]], threshold: float) -> list[float] | None:
    """Shares decided at each stage, from rows (threshold, shares ...) in ascending order; interpolated."""
    later = [row for row in rows if row[0] >= threshold][:1] or list(rows[-1:])
    if not later:
        return None
    earlier = [row for row in rows if row[0] < threshold][-1:] or later
    (low, *first), (high, *second) = earlier[0], later[0]
    part = min((threshold - low) / (high - low), 1.0) if high > low else 1.0
    return [(1 - part) * a + part * b for a, b in zip(first, second)]  # noqa: B905


class ExitPlan:
    """Exits of a budget, with what all its predictions share.

    Args:
        exits: rule and thresholds.
        factors: one per stage, from the sum of the students' logits to those of the prefix.
        macs: cumulative, one per stage.
        guard: decides when to evaluate the rule and when to remove samples.
    """

    def __init__(self, exits: Exits, factors: Sequence[float], macs: Sequence[int], guard: Guard) -> None:
        self.exits, self.rule, self.guard, self.macs = exits, exits.rule, guard, np.array(macs)
        self.factors = np.array(factors, np.float32)
        self.scales = (self.factors / exits.temperatures).tolist()
        self.thresholds = list(exits.thresholds)
        self._repeated: dict[tuple[int, int, int], Array] = {}

    def repeated(self, first: int, last: int, samples: int) -> tuple[Array, Array]:
        """Scales and thresholds of the stages `first` to `last` - 1, each for as many samples, (P n)."""
        key = (first, last, samples)
        if key not in self._repeated:
            if len(self._repeated) >= KEPT:
                self._repeated.clear()
            rows = np.array([self.scales[first:last], self.thresholds[first:last]], np.float32)
            self._repeated[key] = rows.repeat(samples, 1)
        scales, thresholds = self._repeated[key]
        return scales, thresholds

    def decides(self, number: int, total: Sequence[float]) -> bool:
        """Whether a stage, from 0, decides the sample with the sum (L), in Python's floats."""
        return confidence_of_one(total, self.rule, self.scales[number]) >= self.thresholds[number] - ROUNDING

    def answers(self, runner: StageRunner) -> Answers:
        """What collects the answers of a batch, after the first stage."""
        one = runner.size == 1 and runner.total(0).shape[-1] <= FEW and self.rule != "agreement"
        return OneAnswer(runner, self) if one else Answers(runner, self)


class Answers:
    """Evaluates the exit rule on a batch, collects the answers, and removes decided samples.

    Args:
        runner: after its first stage.
        plan: exits.

    Attributes:
        checked: number of first stages at which the rule was evaluated.
        left: number of samples that are undecided by these.
        open: (n,) bool, which samples in the batch are undecided; None: all.
    """

    def __init__(self, runner: StageRunner, plan: ExitPlan) -> None:
        self.runner, self.plan = runner, plan
        self.checked, self.left = 0, runner.size
        self.open: Array | None = None
        self._rows: Array | None = None  # (n,), numbers of the samples in the batch; None: all
        self._stages = np.zeros(self.left, np.int64)
        self._totals = np.empty_like(runner.total(0))
        self._ran: Array | None = None

    def check(self) -> None:
        """Evaluates the rule at the stages that ran since the last time."""
        runner, first, last = self.runner, self.checked, self.runner.number
        self.checked, agreement = last, self.plan.rule == "agreement"
        if agreement:
            for number in range(first, last):
                runner.count_votes(number)
        if last - first == 1:
            self._check_one(runner.total(first), runner.votes[first] if agreement else None, first)
        else:
            totals = np.concatenate([runner.total(number) for number in range(first, last)])
            self._check_several(totals, np.concatenate(runner.votes[first:last]) if agreement else None, first)

    def _check_one(self, totals: Array, votes: Array | None, number: int) -> None:
        """Evaluates the rule at a stage, from 0, by sums (n, L)."""
        plan = self.plan
        if totals.size <= FEW and votes is None:
            found = [plan.decides(number, row) for row in totals.tolist()]
            if True not in found:
                return
            reached = np.array(found)
        else:
            reached = confidence_of(totals, plan.rule, plan.scales[number], votes) >= plan.thresholds[number]
        here = self._decide(reached)
        if len(here):
            self._answer(here, totals[here], number + 1)

    def _check_several(self, totals: Array, votes: Array | None, first: int) -> None:
        """Evaluates the rule at the stages from `first` on, by sums (P n, L)."""
        plan, samples = self.plan, self.runner.size
        scales, thresholds = plan.repeated(first, self.checked, samples)
        reached = (confidence_of(totals, plan.rule, scales, votes) >= thresholds).reshape(-1, samples)
        here = self._decide(np.logical_or.reduce(reached))
        if len(here):
            at = reached[:, here].argmax(0)
            self._answer(here, totals[at * samples + here], first + 1 + at)

    def _decide(self, reached: Array) -> Array:
        """Places (m,) in the batch of the samples that the mask (n,) decides and that were undecided."""
        if self.open is not None:
            reached = reached & self.open
        here: Array = reached.nonzero()[0]
        if len(here):
            self.open = ~reached if self.open is None else self.open & ~reached
            self.left -= len(here)
        return here

    def _answer(self, here: Array, totals: Array, stages: Array | int) -> None:
        """Keeps the sums (m, L) and stages (m,) that answer samples of the batch, given by their places (m,) in it."""
        rows = here if self._rows is None else self._rows[here]
        self._totals[rows], self._stages[rows] = totals, stages

    def remove(self) -> None:
        """Removes the decided samples from the batch."""
        assert self.open is not None
        rows, left = self._rows, self.open.nonzero()[0]
        if self._ran is None:
            self._ran = np.empty_like(self._stages)
        self._ran[slice(None) if rows is None else rows] = self.runner.number
        self._rows, self.open = left if rows is None else rows[left], None
        self.runner.keep(left)

    def prediction(self) -> Prediction:
        """The answers of all samples; the last stage that ran answers those that are undecided."""
        plan, number = self.plan, self.runner.number
        if self.checked < number:
            self.check()
        if self.left == len(self._stages):  # no sample exits early
            logits, count = self.runner.total(number - 1) * plan.factors[number - 1], self.left
            self.runner.close()
            plan.guard.learn(number, count)
            return Prediction(logits, np.full(count, number), np.full(count, plan.macs[number - 1]))
        if self.left:
            here = np.flatnonzero(self.open) if self.open is not None else np.arange(self.runner.size)
            self._answer(here, self.runner.total(number - 1)[here], number)
        if self._ran is None:
            ran = np.full(len(self._stages), number)
        else:
            ran = self._ran
            ran[self._rows] = number
        self.runner.close()
        for stage, samples in enumerate(np.bincount(self._stages).tolist()):
            if samples:
                plan.guard.learn(stage, samples)
        logits = self._totals * plan.factors[self._stages - 1, None]
        return Prediction(logits, self._stages, plan.macs[ran - 1])


class OneAnswer(Answers):
    """`Answers` for a single sample with a few classes, in Python's floats; there is nothing to remove."""

    def __init__(self, runner: StageRunner, plan: ExitPlan) -> None:
        self.runner, self.plan = runner, plan
        self.checked, self.left = 0, 1

    def check(self) -> None:
        """Evaluates the rule at the stages that ran since the last time, up to the first that decides the sample."""
        plan = self.plan
        for number in range(self.checked, self.runner.number):
            (logits,) = self.runner.total(number).tolist()
            self.checked = number + 1
            if plan.decides(number, logits):
                self.left = 0
                break

    def prediction(self) -> Prediction:
        """The answer of the first stage that decides the sample, else of the last that ran."""
        plan, ran = self.plan, self.runner.number
        if self.left:
            self.check()
        answered = ran if self.left else self.checked
        logits = self.runner.total(answered - 1) * plan.factors[answered - 1]
        self.runner.close()
        plan.guard.learn(answered, 1)
        return Prediction(logits, np.array([answered]), plan.macs[ran - 1 : ran])


def predict_within(runner: StageRunner, allowed: int, plan: ExitPlan, deadline: Deadline | None) -> Prediction:
    """Runs up to `allowed` stages, until all samples are decided or one more would not end in time.

    Args:
        runner: before its first stage.
        allowed: number of stages.
        plan: exits.
        deadline: None for no limit on time.
    """
    runs(runner, allowed, deadline)
    answers = plan.answers(runner)
    while runner.number < allowed:
        until = plan.guard.next_check(answers.checked, runner.size, answers.left)
        if deadline is None:
            runner.advance_to(until)
        while runner.number < until and runs(runner, allowed, deadline):
            pass
        if runner.number < until or runner.number == allowed:
            break
        answers.check()
        if not answers.left:
            break
        if answers.left < runner.size and plan.guard.removes(runner.number, runner.size, answers.left):
            answers.remove()
    return answers.prediction()


def runs(runner: StageRunner, allowed: int, deadline: Deadline | None) -> bool:
    """Runs one more stage, if it is allowed and would end in time."""
    number = runner.number
    if number >= allowed or (deadline is not None and not deadline.allows(number, runner.size)):
        return False
    runner.advance()
    if deadline is not None:
        deadline.done(number, runner.size)
    return True


def measure_stages(new_runner: Callable[[], StageRunner], plan: ExitPlan) -> list[float]:
    """Seconds of each stage, of one check of the exit rule, and of removing half of the samples.

    Args:
        new_runner: makes a runner of one batch.
        plan: exits.
    """
    runner = new_runner()
    seconds = [timed(runner.advance) for _ in range(len(runner.graphs))]
    runner.close()
    runner = new_runner()
    runner.advance()
    answers = plan.answers(runner)
    seconds.append(timed(answers.check))
    if runner.size > 1:
        answers.open = np.arange(runner.size) % 2 == 0
        seconds.append(timed(answers.remove))
    else:  # there is nothing to remove from a batch of one
        seconds.append(0.0)
    runner.close()
    return seconds


def timed(function: Callable[[], object]) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun
