"""Prediction within a budget: runs stages while the budget allows, and removes decided samples where that pays."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdistil.ensemble.budget import Budget, Prediction, confidence_of
from bdistil.ensemble.calibration import Exits
from bdistil.ensemble.stage_clock import Deadline, StageClock
from bdistil.ensemble.stages import StageRunner

Array = np.ndarray[Any, Any]


class Answers:
    """Finds the decided samples of a batch, removes them from it, and collects their answers.

    Row numbers are kept in NumPy on the host: on a few hundred numbers a call costs a fraction of what it costs in
    torch, and beside a small student that is the cost of compaction.
    """

    def __init__(self, runner: StageRunner) -> None:
        self.runner = runner
        self.rows: Array | None = None  # of the samples left in the batch; None: all
        self.gone: list[tuple[Array, Tensor, int]] = []  # rows, their logits, the stage

    def decided(self, exits: Exits) -> Array:
        """Mask (n,) bool of the samples left in the batch that the current stage decides."""
        runner, number = self.runner, self.runner.number - 1
        assert runner.total is not None
        # the logits are total * factor: one pass for that and the temperature
        temperature = exits.temperatures[number] / float(runner.factor)
        confidence = confidence_of(runner.total, exits.rule, temperature, runner.votes)
        reached: Array = confidence.cpu().numpy() >= exits.thresholds[number]
        return reached

    def compact(self, decided: Array) -> None:
        """Stores the current answers of the decided samples, mask (n,), and removes these from the batch."""
        here, left = np.flatnonzero(decided), np.flatnonzero(~decided)
        rows = np.arange(len(decided)) if self.rows is None else self.rows
        self._store(rows[here], self._on_device(here))
        self.rows = rows[left]
        self.runner.keep(self._on_device(left))

    def prediction(self) -> Prediction:
        """The answers of all samples, after the last stage."""
        runner = self.runner
        if self.rows is None:
            return Prediction(runner.stage().logits, runner.number, runner.macs)
        self._store(self.rows, None)
        rows, logits, numbers = zip(*self.gone, strict=True)
        order = np.concatenate(rows).argsort()
        stages = np.repeat(numbers, [len(part) for part in rows])[order]
        in_order = torch.cat(logits).index_select(0, self._on_device(order))
        return Prediction(in_order, torch.from_numpy(stages), runner.macs)

    def _store(self, rows: Array, chosen: Tensor | None) -> None:
        self.gone.append((rows, self.runner.stage(chosen).logits, self.runner.number))

    def _on_device(self, places: Array) -> Tensor:
        return torch.from_numpy(places).to(self.runner.device)


def predict_within(
    runner: StageRunner, budget: Budget, exits: Exits | None, clock: StageClock | None, started: float
) -> Prediction:
    """Predicts within a budget whose seconds began at `started`, by `time.perf_counter`; work beyond it is not done.

    Without exits no sample exits early; without a clock every decided sample is removed at once.
    """
    allowed, answers = budget.stages_within(runner.macs), Answers(runner)
    device, deadline = runner.device, None
    if budget.seconds is not None:
        deadline = Deadline(budget.seconds, clock, lambda: time_of(device), started)
    checked = 0  # number of first stages after which the exit rule is checked
    if exits is not None:
        checked = allowed - 1 if clock is None else clock.stages_to_check(runner.samples, allowed, exits.shares)
    for number in range(allowed):
        if deadline is not None and not deadline.allows(number, runner.samples):
            break
        runner.advance()
        if deadline is not None:
            deadline.done(number, runner.samples)
        if exits is not None and number < checked and _remove_decided(answers, exits, clock, allowed) == 0:
            break
    return answers.prediction()


def time_of(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _remove_decided(answers: Answers, exits: Exits, clock: StageClock | None, allowed: int) -> int:
    """Removes decided samples from the batch where that pays; returns how many are undecided."""
    decided = answers.decided(exits)
    left = len(decided) - int(np.count_nonzero(decided))
    number = answers.runner.number - 1
    if 0 < left < len(decided) and (clock is None or clock.removal_pays(number, len(decided), left, allowed)):
        answers.compact(decided)
    return left
