"""Prediction within a budget: runs stages while the budget allows, and stops for samples that are decided.

The answer to a sample is that of the first stage at which the exit rule decides it. When the rule is evaluated, and
when decided samples are removed from the batch, is a matter of time only, see `Guard`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bdistil.ensemble.budget import Array, Prediction, confidence, confidence_of_one, host
from bdistil.ensemble.calibration import Exits
from bdistil.ensemble.stage_clock import Deadline, Guard
from bdistil.ensemble.stages import StageRunner, prefix_factor

KEPT = 64  # repetitions of scales and thresholds
FEW = 96  # numbers up to which the rule is evaluated in Python's floats: less than the calls of NumPy take
ROUNDING = 2.0**-24  # they reach a threshold where float32, rounded, does


class ExitPlan:
    """Exits of a budget, with what all its predictions share.

    Args:
        exits: rule and thresholds.
        scale: of the ensemble.
        weights: of the students, see `prefix_factor`.
        guard: decides when to evaluate the rule and when to remove samples.
    """

    def __init__(self, exits: Exits, scale: float, weights: Sequence[float], guard: Guard) -> None:
        self.exits, self.rule, self.guard = exits, exits.rule, guard
        stages = range(1, len(exits.thresholds) + 1)
        self.factors = np.array([prefix_factor(scale, weights, number) for number in stages])
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
        assert runner.total is not None
        one = runner.samples == 1 and runner.total.shape[-1] <= FEW and self.rule != "agreement"
        return OneAnswer(runner, self) if one else Answers(runner, self)


class Answers:
    """Evaluates the exit rule on a batch, collects the answers, and removes decided samples.

    All of it is in NumPy on the host: on a few hundred numbers a call costs a fraction of what it costs in torch, and
    beside a small student that is the cost of an exit.

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
        self.checked, self.left = 0, runner.samples
        self.open: Array | None = None
        self._pending: list[tuple[Tensor, Tensor | None]] = []  # sum and votes of the stages not checked
        self._rows: Array | None = None  # (n,), numbers of the samples in the batch; None: all
        self._stages = np.zeros(self.left, np.int64)
        self._totals: Array | None = None
        self._ran: Array | None = None

    def add(self) -> None:
        """Takes the answer of the stage that has just run; `check` evaluates the rule."""
        assert self.runner.total is not None
        self._pending.append((self.runner.total, self.runner.votes))

    def check(self) -> None:
        """Evaluates the rule at the stages added since the last time."""
        first, pending = self.checked, self._pending
        self.checked, self._pending = first + len(pending), []
        if len(pending) == 1:
            total, votes = pending[0]
            self._check_one(host(total), None if votes is None else host(votes), first)
        else:
            totals, votes = torch.cat([total for total, _ in pending]), None
            if self.plan.rule == "agreement":
                votes = torch.cat([votes for _, votes in pending if votes is not None])
            self._check_several(host(totals), None if votes is None else host(votes), first)

    def _check_one(self, totals: Array, votes: Array | None, number: int) -> None:
        """Evaluates the rule at a stage, from 0, by sums (n, L)."""
        plan = self.plan
        if totals.size <= FEW and votes is None:
            found = [plan.decides(number, row) for row in totals.tolist()]
            if True not in found:
                return
            reached = np.array(found)
        else:
            reached = confidence(totals, plan.rule, plan.scales[number], votes) >= plan.thresholds[number]
        here = self._decide(reached)
        if len(here):
            self._answer(here, totals[here], number + 1)

    def _check_several(self, totals: Array, votes: Array | None, first: int) -> None:
        """Evaluates the rule at the stages from `first` on, by sums (P n, L)."""
        plan, samples = self.plan, self.runner.samples
        scales, thresholds = plan.repeated(first, self.checked, samples)
        reached = (confidence(totals, plan.rule, scales, votes) >= thresholds).reshape(-1, samples)
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
        if self._totals is None:
            self._totals = np.empty((len(self._stages), totals.shape[-1]), totals.dtype)
        self._totals[rows], self._stages[rows] = totals, stages

    def remove(self) -> None:
        """Removes the decided samples from the batch."""
        assert self.open is not None
        rows, left = self._rows, self.open.nonzero()[0]
        if self._ran is None:
            self._ran = np.empty_like(self._stages)
        self._ran[slice(None) if rows is None else rows] = self.runner.number
        self._rows, self.open = left if rows is None else rows[left], None
        self.runner.keep(torch.from_numpy(left))

    def prediction(self) -> Prediction:
        """The answers of all samples; the last stage that ran answers those that are undecided."""
        total, number = self.runner.total, self.runner.number
        assert total is not None
        if self._pending:
            self.check()
        if self._totals is None:  # no sample exits early
            self.plan.guard.learn(number, self.left)
            return Prediction(self.runner.stage().logits, number, self.runner.macs)
        if self.left:
            here = np.arange(self.runner.samples) if self.open is None else np.flatnonzero(self.open)
            self._answer(here, host(total)[here], number)
        if self._ran is not None and self._rows is not None:
            self._ran[self._rows] = number
        for stage, samples in enumerate(np.bincount(self._stages).tolist()):
            if samples:
                self.plan.guard.learn(stage, samples)
        logits = self._totals * self.plan.factors[self._stages - 1, None].astype(self._totals.dtype)
        ran = number if self._ran is None else torch.from_numpy(self._ran)
        return Prediction(torch.from_numpy(logits).to(total), torch.from_numpy(self._stages), self.runner.macs, ran)


class OneAnswer(Answers):
    """`Answers` for a single sample with a few classes, in Python's floats; there is nothing to remove."""

    def __init__(self, runner: StageRunner, plan: ExitPlan) -> None:
        self.runner, self.plan = runner, plan
        self.checked, self.left = 0, 1
        self._sums: list[Tensor] = []

    def add(self) -> None:
        """Takes the answer of the stage that has just run; `check` evaluates the rule."""
        assert self.runner.total is not None
        self._sums.append(self.runner.total)

    def check(self) -> None:
        """Evaluates the rule at the stages added since the last time, up to the first that decides the sample."""
        for number in range(self.checked, len(self._sums)):
            (logits,) = self._sums[number].tolist()
            self.checked = number + 1
            if self.plan.decides(number, logits):
                self.left = 0
                break

    def prediction(self) -> Prediction:
        """The answer of the first stage that decides the sample, else of the last that ran."""
        ran = answered = self.runner.number
        if self.left:
            self.check()
        if not self.left:
            answered = self.checked
        self.plan.guard.learn(answered, 1)
        logits = self._sums[answered - 1] * float(self.plan.factors[answered - 1])
        return Prediction(logits, answered, self.runner.macs, ran)


def predict_within(
    runner: StageRunner, allowed: int, plan: ExitPlan | None = None, deadline: Deadline | None = None
) -> Prediction:
    """Runs up to `allowed` stages, until all samples are decided or one more would not end in time.

    Args:
        runner: before its first stage.
        allowed: number of stages.
        plan: exits; None lets no sample exit early.
        deadline: None for no limit on time.
    """
    if plan is None:
        while _runs(runner, allowed, deadline):
            pass
        return Prediction(runner.stage().logits, runner.number, runner.macs)
    _runs(runner, allowed, deadline)
    answers = plan.answers(runner)
    answers.add()
    while runner.number < allowed:
        until = plan.guard.next_check(answers.checked, runner.samples, answers.left)
        while runner.number < until and _runs(runner, allowed, deadline):
            answers.add()
        if runner.number < until or runner.number == allowed:
            break
        answers.check()
        if not answers.left:
            break
        if answers.left < runner.samples and plan.guard.removes(runner.number, runner.samples, answers.left):
            if not runner.divisible:  # decided samples stay, which changes no answer
                continue
            answers.remove()
    return answers.prediction()


def _runs(runner: StageRunner, allowed: int, deadline: Deadline | None) -> bool:
    """Runs one more stage, if it is allowed and would end in time."""
    number = runner.number
    if number >= allowed or (deadline is not None and not deadline.allows(number, runner.samples)):
        return False
    runner.advance()
    if deadline is not None:
        deadline.done(number, runner.samples)
    return True


def time_of(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
