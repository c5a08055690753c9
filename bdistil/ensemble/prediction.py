"""One prediction within a budget: stages run while they may, decided samples leave the batch where that pays."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdistil.ensemble.budget import Budget, Exits, Prediction
from bdistil.ensemble.exit_rules import confidence_of
from bdistil.ensemble.stage_clock import Deadline, StageClock
from bdistil.ensemble.stages import StageRunner

Array = np.ndarray[Any, Any]


class Answers:
    """Asks samples whether they are decided, takes those out of the batch, and keeps their answers.

    Which row is where is kept in NumPy on the host: there a call on a few hundred numbers costs a fraction of what it
    costs in torch, and beside a small student that is what leaving costs.

    Args:
        runner: the batch, before its first stage.
    """

    def __init__(self, runner: StageRunner) -> None:
        self.runner = runner
        self.rows: Array | None = None  # of the samples that are still on their way; None: all
        self.gone: list[tuple[Array, Tensor, int]] = []  # rows, their logits, the stage

    def decided(self, exits: Exits) -> Array:
        """Which samples on their way, (n,) bool, the stage at hand decides."""
        runner, number = self.runner, self.runner.number - 1
        assert runner.total is not None
        # the logits are total * factor: one pass for that and the temperature
        temperature = exits.temperatures[number] / float(runner.factor)
        sure = confidence_of(runner.total, exits.rule, temperature, runner.votes)
        reached: Array = sure.cpu().numpy() >= exits.thresholds[number]
        return reached

    def compact(self, decided: Array) -> None:
        """Decided samples keep the answer of the stage at hand; the others go on without them."""
        here, left = np.flatnonzero(decided), np.flatnonzero(~decided)
        rows = np.arange(len(decided)) if self.rows is None else self.rows
        self._put_aside(rows[here], self._on_device(here))
        self.rows = rows[left]
        self.runner.keep(self._on_device(left))

    def prediction(self) -> Prediction:
        """The answers, once no stage will run any more."""
        runner = self.runner
        if self.rows is None:
            return Prediction(runner.logits(), runner.number, runner.macs)
        self._put_aside(self.rows, None)
        rows, logits, numbers = zip(*self.gone, strict=True)
        order = np.concatenate(rows).argsort()
        stages = np.repeat(numbers, [len(part) for part in rows])[order]
        in_order = torch.cat(logits).index_select(0, self._on_device(order))
        return Prediction(in_order, torch.from_numpy(stages), runner.macs)

    def _put_aside(self, rows: Array, chosen: Tensor | None) -> None:
        self.gone.append((rows, self.runner.logits(chosen), self.runner.number))

    def _on_device(self, places: Array) -> Tensor:
        return torch.from_numpy(places).to(self.runner.x.device)


def predict_within(
    runner: StageRunner, budget: Budget, exits: Exits | None, clock: StageClock | None, started: float
) -> Prediction:
    """Answers within a budget; work beyond it is not done.

    Args:
        runner: the batch, before its first stage.
        budget: limits.
        exits: where samples are decided; None: nowhere.
        clock: measured times; without them every decided sample leaves at once.
        started: when the seconds of the budget began, by `time.perf_counter`.
    """
    allowed, answers = budget.stages_within(runner.macs), Answers(runner)
    deadline = (
        None if budget.seconds is None else Deadline(budget.seconds, clock, lambda: _now(runner.x.device), started)
    )
    asked = _stages_to_ask(runner.samples, allowed, exits, clock)
    for number in range(allowed):
        if deadline is not None and not deadline.allows(number, runner.samples):
            break
        runner.advance()
        if deadline is not None:
            deadline.done(number, runner.samples)
        if exits is not None and number < asked and _all_decided(answers, exits, clock, allowed):
            break
    return answers.prediction()


def _now(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _stages_to_ask(samples: int, allowed: int, exits: Exits | None, clock: StageClock | None) -> int:
    if exits is None:
        return 0
    return allowed - 1 if clock is None else clock.stages_to_ask(samples, allowed, exits.shares)


def _all_decided(answers: Answers, exits: Exits, clock: StageClock | None, allowed: int) -> bool:
    """Takes decided samples out of the batch, where that pays; says whether none is left."""
    decided, runner = answers.decided(exits), answers.runner
    left = len(decided) - int(np.count_nonzero(decided))
    if left == 0:
        return True
    number = runner.number - 1
    if left < len(decided) and (clock is None or clock.leaving_pays(number, len(decided), left, allowed)):
        answers.compact(decided)
    return False
