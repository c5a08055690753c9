"""Budgets: when an ordered ensemble has done enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bdistil.ensemble.calibration import Calibration
from bdistil.ensemble.exit_rules import RULES, Rule
from bdistil.errors import UserError


@dataclass(frozen=True)
class Budget:
    """What a prediction may cost. Limits combine: the first to bind wins. At least one stage always answers.

    Attributes:
        stages: at most this many students.
        macs: at most this many multiply-adds a sample.
        seconds: no student is started that would end later than this after the call, by the measured stage times.
        confidence: a sample is decided as soon as its confidence reaches this; ``fitted`` takes the thresholds that
            were fitted on the validation part, one value per stage.
        rule: how confidence is read: ``max_prob`` (the default), ``margin``, ``entropy`` or ``agreement``.
    """

    stages: int | None = None
    macs: int | None = None
    seconds: float | None = None
    confidence: float | Literal["fitted"] | None = None
    rule: Rule | None = None

    def __post_init__(self) -> None:
        if self.stages is not None and self.stages < 1:
            raise UserError(f"Expected `stages` of a budget to be >= 1, got {self.stages}.")
        for name in ("macs", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"Expected `{name}` of a budget to be > 0, got {value}.")
        sure = self.confidence
        if sure is not None and sure != "fitted" and (isinstance(sure, str) or not 0 < sure <= 1):
            raise UserError(f"Expected `confidence` of a budget to be in (0, 1] or 'fitted', got {sure}.")
        if self.rule is not None and self.rule not in RULES:
            raise UserError(f"Expected `rule` of a budget to be one of {', '.join(RULES)}, got {self.rule!r}.")

    def stages_within(self, macs: Sequence[int]) -> int:
        """How many stages the limits on stages and MACs allow, at least 1.

        Args:
            macs: cumulative MACs per sample, one number a stage.
        """
        allowed = len(macs) if self.stages is None else min(self.stages, len(macs))
        if self.macs is not None:
            allowed = min(allowed, sum(cost <= self.macs for cost in macs))
        return max(allowed, 1)


@dataclass(frozen=True)
class Exits:
    """Where samples are decided.

    Attributes:
        rule: of confidence.
        thresholds: one a stage.
        temperatures: one a stage, of the logits.
        shares: of samples that are decided at each stage, where that is known from the validation part.
    """

    rule: Rule
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]
    shares: tuple[float, ...] | None = None


def check_rule(budget: Budget) -> None:
    """A rule needs a confidence that it reads. A budget whose confidences a sweep gives has none yet.

    Raises:
        UserError: there is none.
    """
    if budget.confidence is None and budget.rule is not None:
        raise UserError(
            f"`rule` of a budget says how `confidence` is read, got rule={budget.rule!r} without confidence. "
            "Give confidence=0.9, for example, or leave the rule out."
        )


def exits_of(budget: Budget, calibration: Calibration) -> Exits | None:
    """The exits that a budget asks for; None where it knows no confidence.

    Raises:
        UserError: it gives a rule without a confidence, or asks for fitted thresholds where none were fitted, or those
            of another rule.
    """
    check_rule(budget)
    if budget.confidence is None:
        return None
    temperatures = tuple(calibration.temperature(number) for number in range(calibration.count))
    if budget.confidence != "fitted":
        return Exits(budget.rule or "max_prob", (budget.confidence,) * calibration.count, temperatures)
    fitted = calibration.exits
    if fitted is None:
        raise UserError(
            "Expected thresholds fitted on the validation part for confidence='fitted', but this ensemble has none. "
            "Fit them with `bdistil calibrate --run_dir DIR`, or give a number in (0, 1]."
        )
    if budget.rule not in (None, fitted.rule):
        raise UserError(
            f"The fitted thresholds are of the rule {fitted.rule!r}, but the budget says rule={budget.rule!r}. Leave "
            f"the rule out, or fit again with `bdistil calibrate --run_dir DIR --rule {budget.rule}`."
        )
    return Exits(fitted.rule, fitted.thresholds, temperatures, fitted.decided_share)


@dataclass(frozen=True)
class Prediction:
    """What a prediction within a budget gives.

    Attributes:
        logits: (B, L), in the teacher's units.
        answered: how many students answered each sample, (B,) int64; one number where it is the same for all.
        costs: cumulative multiply-adds of a sample, one number a stage.
    """

    logits: Tensor
    answered: int | Tensor
    costs: Sequence[int]

    @property
    def stages(self) -> Tensor:
        """How many students answered each sample, (B,) int64; made when it is read."""
        return self.answered if isinstance(self.answered, Tensor) else torch.full((len(self.logits),), self.answered)

    @property
    def macs(self) -> Tensor:
        """Multiply-adds that each sample cost, (B,) int64; made when it is read."""
        return torch.tensor(self.costs)[self.stages - 1]
