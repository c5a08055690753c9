"""Budgets: when an ordered ensemble has done enough."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdistil.errors import UserError


@dataclass(frozen=True)
class Budget:
    """What a prediction may cost. Limits combine: the first to bind wins. At least one stage always answers.

    Attributes:
        stages: at most this many students.
        macs: at most this many multiply-adds a sample.
        seconds: no student is started that would end later than this after the call, by the measured stage times.
        confidence: a sample is decided as soon as its largest softmax probability reaches this.
    """

    stages: int | None = None
    macs: int | None = None
    seconds: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.stages is not None and self.stages < 1:
            raise UserError(f"Expected `stages` of a budget to be >= 1, got {self.stages}.")
        for name in ("macs", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"Expected `{name}` of a budget to be > 0, got {value}.")
        if self.confidence is not None and not 0 < self.confidence <= 1:
            raise UserError(f"Expected `confidence` of a budget to be in (0, 1], got {self.confidence}.")

    def stages_within(self, macs: list[int]) -> int:
        """How many stages the limits on stages and MACs allow, at least 1.

        Args:
            macs: cumulative MACs per sample, one number a stage.
        """
        allowed = len(macs) if self.stages is None else min(self.stages, len(macs))
        if self.macs is not None:
            allowed = min(allowed, sum(cost <= self.macs for cost in macs))
        return max(allowed, 1)


@dataclass(frozen=True)
class Prediction:
    """What a prediction within a budget gives.

    Attributes:
        logits: (B, L), in the teacher's units.
        stages: how many students answered each sample, (B,) int64.
        macs: multiply-adds that each sample cost, (B,) int64.
    """

    logits: Tensor
    stages: Tensor
    macs: Tensor


def decided(logits: Tensor, confidence: float) -> Tensor:
    """Is the largest softmax probability at least `confidence`? Shape (B,) bool."""
    return torch.softmax(logits.float(), -1).amax(-1) >= confidence
