"""Prediction with early exits for decided samples.

A sample gets the answer of the first stage at which the exit rule decides it. When the rule is evaluated, and when
decided samples are removed from the batch, affects only the running time, see `Guard`.

Everything is in NumPy on the host, even for students in torch: on a few hundred numbers a NumPy call costs a fraction
of a torch call, and next to a small student such calls are the cost of an exit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .confidence import Array, add_votes, confidence_of, confidence_of_one
from .stage_clock import Deadline, Guard

ALWAYS = -1.0  # threshold that every sample reaches
FEW = 96  # up to this many numbers the rule is evaluated in Python floats, faster than by NumPy calls
ROUNDING = 2.0**-24  # tolerance: floats reach a threshold if their float32 values do


class Stages(Protocol):
    """Stages of an ensemble on a batch, run one after the other."""

    @property
    def number(self) -> int:
        """Number of stages that ran."""

    @property
    def size(self) -> int:
        """Number of samples left in the batch."""

    @property
    def divisible(self) -> bool:
        """Whether samples can be removed from the batch."""

    def advance(self) -> None:
        """Runs the next stage."""

    def advance_to(self, count: int) -> None:
        """Runs the stages up to the first `count`."""

    def total(self, number: int) -> Array:
        """Sum (n, L) of the logits of the students up to that of a stage that ran, from 0."""

    def own(self, number: int) -> Array:
        """Logits (n, L) of the student of a stage that ran, from 0, in any unit."""

    def keep(self, rows: Array) -> None:
        """Reduces the batch to the given rows (m,)."""

    def close(self) -> None:
        """Ends the run; what `total` has returned may be overwritten."""


@dataclass(frozen=True)
class Exits:
    """Exit rule and its thresholds.

    Attributes:
        rule: computes the confidence; one of `RULES`.
        thresholds: one per stage; a sample is decided where its confidence reaches it.
        temperatures: one per stage; divide the logits.
        shares: expected share of samples decided at each stage, where known from the validation part.
    """

    rule: str
    thresholds: Sequence[float]
    temperatures: Sequence[float]
    shares: Sequence[float] | None = None


def shares_at(rows: Sequence[Sequence[float]], threshold: float) -> tuple[float, ...] | None:
    """Share of samples decided at each stage, interpolated between thresholds; None where unknown.

    Args:
        rows: (threshold, share of stage 1, …, share of stage T) in ascending order.
        threshold: one for all stages.
    """
    if not rows:
        return None
    thresholds, *shares = np.array(rows).T
    return tuple(float(np.interp(threshold, thresholds, share)) for share in shares)


class ExitPlan:
    """Exits of a budget, with the state that its predictions share.

    Args:
        exits: rule and thresholds.
        factors: one per stage, from the sum of the students' logits to those of the prefix.
        guard: decides when to evaluate the rule and when to remove samples.
    """

    def __init__(self, exits: Exits, factors: Sequence[float], guard: Guard) -> None:
        self.exits, self.rule, self.guard = exits, exits.rule, guard
        self.factors = np.array(factors, np.float32)  # dtype of the logits
        self.scales = (np.array(factors) / exits.temperatures).tolist()
        self.thresholds = list(exits.thresholds)

    def repeated(self, first: int, last: int, samples: int) -> tuple[Array, Array]:
        """Scales and thresholds of the stages `first` to `last` - 1, each repeated for `samples` samples, (P n)."""
        rows = np.array([self.scales[first:last], self.thresholds[first:last]], np.float32)
        scales, thresholds = rows.repeat(samples, 1)
        return scales, thresholds

    def decides(self, number: int, total: Sequence[float]) -> bool:
        """Whether a stage, from 0, decides the sample with the sum (L), in Python floats."""
        return confidence_of_one(total, self.rule, self.scales[number]) >= self.thresholds[number] - ROUNDING

    def answers(self, stages: Stages) -> Answers | OneAnswer:
        """The collector of the answers to a batch, after the first stage."""
        one = stages.size == 1 and stages.total(0).shape[-1] <= FEW and self.rule != "agreement"
        return OneAnswer(stages, self) if one else Answers(stages, self)


@dataclass(frozen=True)
class Answer:
    """Answers to a batch.

    Attributes:
        logits: (B, L).
        stages: (B,), number of the stage that answers each sample.
        ran: (B,), number of stages that were run on each sample; an int where it is the same for all.
    """

    logits: Array
    stages: Array
    ran: Array | int


class Answers:
    """Evaluates the exit rule on a batch, collects the answers, and removes decided samples.

    Args:
        runner: runner after its first stage.
        plan: exit plan.

    Attributes:
        checked: number of first stages at which the rule was evaluated.
        left: number of samples that they leave undecided.
        open: (n,) bool, which samples in the batch are undecided; None: all.
    """

    def __init__(self, runner: Stages, plan: ExitPlan) -> None:
        self.runner, self.plan = runner, plan
        self.checked, self.left = 0, runner.size
        self.open: Array | None = None
        self._rows: Array | None = None  # (n,), numbers of the samples in the batch; None: all
        self._votes: Array | None = None  # (n, L), number of students that predict each class
        self._logits: Array | None = None  # (B, L) and (B,), filled for the samples that are decided
        self._stages = self._ran = np.zeros(0, np.int64)

    def check(self) -> None:
        """Evaluates the rule at the stages that ran since the last time."""
        self._check(self.runner.number)

    def _check(self, last: int) -> None:
        """Evaluates the rule at those of the first `last` stages that were not checked."""
        if last <= self.checked:
            return
        totals = self._pending(last)
        reached = self._reached(totals, self.checked, last)
        sure = reached[0] if len(reached) == 1 else np.logical_or.reduce(reached)
        if self.open is not None:
            sure &= self.open
        here = sure.nonzero()[0]
        if len(here):
            self.open = ~sure if self.open is None else self.open & ~sure
            self.left -= len(here)
            if len(reached) == 1:
                self._answer(here, totals.take(here, 0), self.checked)
            else:
                at = reached[:, here].argmax(0)
                self._answer(here, totals[at * self.runner.size + here], at + self.checked)
        self.checked = last

    def _pending(self, last: int) -> Array:
        """Sums (P n, L) of the P unchecked stages among the first `last`."""
        totals = [self.runner.total(number) for number in range(self.checked, last)]
        return totals[0] if len(totals) == 1 else np.concatenate(totals)

    def _reached(self, totals: Array, first: int, last: int) -> Array:
        """Whether the stages `first` to `last` - 1 decide the samples, by their sums (P n, L): (P, n) bool."""
        plan, samples = self.plan, self.runner.size
        votes = self._count_votes(first, last) if plan.rule == "agreement" else None
        if last - first > 1:
            scales, thresholds = plan.repeated(first, last, samples)
            return (confidence_of(totals, plan.rule, scales, votes) >= thresholds).reshape(last - first, samples)
        if totals.size <= FEW and votes is None:
            return np.array([[plan.decides(first, row) for row in totals.tolist()]], bool)
        return (confidence_of(totals, plan.rule, plan.scales[first], votes) >= plan.thresholds[first])[None]

    def _count_votes(self, first: int, last: int) -> Array:
        """Votes (P n, L) of the students up to each of the stages `first` to `last` - 1."""
        counted = []
        for number in range(first, last):
            self._votes = add_votes(self._votes, self.runner.own(number))
            counted.append(self._votes)
        return np.concatenate(counted)

    def _answer(self, here: Array, totals: Array, stages: Array | int) -> None:
        """Records answers to the samples at places (m,) in the batch: sums (m, L) of stages, from 0, (m,) or one."""
        totals *= self.plan.factors[stages, None]
        if self._logits is None:
            self._logits = np.empty((self.runner.size, totals.shape[-1]), totals.dtype)
            self._stages = np.empty(self.runner.size, np.int64)
        rows = here if self._rows is None else self._rows[here]
        self._logits[rows], self._stages[rows] = totals, stages + 1

    def remove(self) -> None:
        """Removes the decided samples from the batch."""
        assert self.open is not None
        left = self.open.nonzero()[0]
        if self._rows is None:
            self._rows, self._ran = left, np.full(self.runner.size, self.runner.number)
        else:
            self._ran[self._rows] = self.runner.number
            self._rows = self._rows[left]
        self.open, self._votes = None, None if self._votes is None else self._votes[left]
        self.runner.keep(left)

    def finish(self) -> Answer:
        """The answers of all samples; the last stage that ran answers those that no earlier one decides."""
        runner, last = self.runner, self.runner.number
        self._check(last - 1)
        if self.left or self._logits is None:  # an empty batch is answered, too
            here = np.arange(runner.size) if self.open is None else self.open.nonzero()[0]
            self._answer(here, runner.total(last - 1).take(here, 0), last - 1)
        assert self._logits is not None
        runner.close()
        if self._rows is None:
            return Answer(self._logits, self._stages, last)
        self._ran[self._rows] = last
        return Answer(self._logits, self._stages, self._ran)


class OneAnswer:
    """`Answers` for a single sample with a few classes, in Python floats; there is nothing to remove."""

    def __init__(self, runner: Stages, plan: ExitPlan) -> None:
        self.runner, self.plan = runner, plan
        self.checked, self.left = 0, 1

    def check(self) -> None:
        """Evaluates the rule at the stages that ran since the last time, up to the first that decides the sample."""
        self._check(self.runner.number)

    def _check(self, last: int) -> None:
        for number in range(self.checked, last):
            (total,) = self.runner.total(number).tolist()
            self.checked = number + 1
            if self.plan.decides(number, total):
                self.left = 0
                break

    def remove(self) -> None:
        """Does nothing."""

    def finish(self) -> Answer:
        """The answer of the first stage that decides the sample, else of the last that ran."""
        last = self.runner.number
        if self.left:
            self._check(last - 1)
        answered = last if self.left else self.checked
        logits = self.runner.total(answered - 1) * self.plan.factors.item(answered - 1)
        self.runner.close()
        return Answer(logits, np.array([answered]), last)


def predict_within(runner: Stages, allowed: int, plan: ExitPlan, deadline: Deadline | None = None) -> Answer:
    """Runs up to `allowed` stages, until all samples are decided or one more would not end in time.

    Args:
        runner: runner before its first stage.
        allowed: maximum number of stages.
        plan: exit plan.
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
        some = answers.left < runner.size and runner.divisible  # decided samples that stay change no answer
        if some and plan.guard.removes(runner.number, runner.size, answers.left):
            answers.remove()
    return answers.finish()


def runs(runner: Stages, allowed: int, deadline: Deadline | None) -> bool:
    """Runs one more stage if it is allowed and would end in time; returns whether it ran."""
    number = runner.number
    if number >= allowed or (deadline is not None and not deadline.allows(number, runner.size)):
        return False
    runner.advance()
    if deadline is not None:
        deadline.done(number, runner.size)
    return True


def measure_stages(
    new_runner: Callable[[], Stages], plan: ExitPlan, now: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds of each stage, of one check of the exit rule, and of removing half of the samples.

    Args:
        new_runner: makes a runner of one batch.
        plan: exit plan.
        now: returns the time in seconds, after the device has finished its work.
    """

    def timed(function: Callable[[], object]) -> float:
        begun = now()
        function()
        return now() - begun

    def exit_seconds() -> list[float]:
        runner = new_runner()
        runner.advance()  # as in a prediction, the check follows a student, which evicts its code from the CPU cache
        answers = plan.answers(runner)
        check, remove = timed(answers.check), 0.0
        if isinstance(answers, Answers):  # there is nothing to remove from a batch of one
            answers.open = np.arange(runner.size) % 2 == 0
            remove = timed(answers.remove)
        runner.close()
        return [check, remove]

    runner = new_runner()
    seconds = [timed(runner.advance) for _ in plan.thresholds]
    runner.close()
    exit_seconds()  # warm-up, as when serving: right after a run of all stages, a check takes up to four times as long
    return [*seconds, *exit_seconds()]
