"""One prediction within a budget: stages run while they may, decided samples leave the batch where that pays."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from bdistil.budgets import Budget, Exits, Prediction
from bdistil.exit_rules import sureness
from bdistil.stage_times import Deadline, StageClock
from bdistil.walk import Stage, Walk


class _Answers:
    """The answers of samples that have left, and which rows of the batch are still on their way."""

    def __init__(self, samples: int) -> None:
        self.stages = torch.zeros(samples, dtype=torch.int64)
        self.logits: Tensor | None = None
        self.rows: Tensor | None = None  # None: all

    def leave(self, sure: Tensor, left: Tensor, stage: Stage) -> None:
        """Decided samples, (n,) bool among those on their way, keep the answer of this stage."""
        if self.rows is None:
            self.logits, self.rows = torch.empty_like(stage.logits), torch.arange(len(sure), device=sure.device)
        self._write(self.rows[sure], stage.logits[sure], stage.index)
        self.rows = self.rows[left]

    def finish(self, stage: Stage) -> Tensor:
        """Logits (B, L), once no stage will run any more."""
        if self.rows is None:
            self.stages.fill_(stage.index)
            return stage.logits
        self._write(self.rows, stage.logits, stage.index)
        assert self.logits is not None
        return self.logits

    def _write(self, rows: Tensor, logits: Tensor, index: int) -> None:
        assert self.logits is not None
        self.logits[rows] = logits
        self.stages[rows.cpu()] = index


def predict_within(walk: Walk, budget: Budget, exits: Exits | None, clock: StageClock | None) -> Prediction:
    """Answers within a budget; work beyond it is not done.

    Args:
        walk: the batch, before its first stage.
        budget: limits.
        exits: where samples are decided; None: nowhere.
        clock: measured times; without them every decided sample leaves at once.
    """
    device = walk.x.device
    deadline = Deadline(budget.seconds, clock, lambda: _now(device))
    allowed = budget.stages_within(walk.macs)
    asked = _stages_to_ask(walk.samples, allowed, exits, clock)
    answers, stage = _Answers(walk.samples), None
    for number in range(allowed):
        if not deadline.allows(number, walk.samples):
            break
        stage = walk.step()
        deadline.done(number, walk.samples)
        if exits is not None and number < asked and _all_leave(walk, stage, exits, answers, clock, allowed):
            break
    assert stage is not None
    together = answers.rows is None
    logits = answers.finish(stage)
    if together:
        return Prediction(logits, answers.stages, torch.full_like(answers.stages, stage.macs))
    return Prediction(logits, answers.stages, torch.tensor(walk.macs)[answers.stages - 1])


def _now(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _stages_to_ask(samples: int, allowed: int, exits: Exits | None, clock: StageClock | None) -> int:
    if exits is None:
        return 0
    return allowed - 1 if clock is None else clock.stages_to_ask(samples, allowed, exits.shares)


def _all_leave(
    walk: Walk, stage: Stage, exits: Exits, answers: _Answers, clock: StageClock | None, allowed: int
) -> bool:
    """Takes decided samples out of the batch, where that pays; says whether none is left."""
    number = stage.index - 1
    sure = sureness(stage.logits, exits.rule, exits.temperatures[number], walk.votes) >= exits.thresholds[number]
    left = (~sure).nonzero().flatten()
    if len(left) == 0:
        return True
    if len(left) < walk.samples and (clock is None or clock.leaving_pays(number, walk.samples, len(left), allowed)):
        answers.leave(sure, left, stage)
        walk.keep(left)
    return False
