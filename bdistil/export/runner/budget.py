"""Budgets of a prediction, confidence of answers, and the result of a prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

RULES = ("max_prob", "margin", "entropy", "agreement")


class ExportError(ValueError):
    """The folder, the input or the budget cannot be used."""


@dataclass(frozen=True)
class Budget:
    """Limits of a prediction. They combine: the first that binds ends it. At least one stage always runs.

    Attributes:
        stages: maximum number of students.
        macs: maximum number of multiply-adds per sample.
        seconds: maximum time; no student is started that would end later by the measured stage times.
        confidence: a sample is decided as soon as its confidence reaches this; "fitted" uses the thresholds in the
            manifest.
        rule: exit rule: max_prob (the default), margin, entropy or agreement.

    Raises:
        ExportError: a limit is out of its range.

    Example:
        >>> Budget(stages=3, macs=300).stages_within([100, 250, 420])
        2
    """

    stages: int | None = None
    macs: int | None = None
    seconds: float | None = None
    confidence: float | str | None = None
    rule: str | None = None

    def __post_init__(self) -> None:
        if self.stages is not None and self.stages < 1:
            raise ExportError(f"Expected `stages` of a budget to be >= 1, got {self.stages}.")
        for name in ("macs", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ExportError(f"Expected `{name}` of a budget to be > 0, got {value}.")
        value = self.confidence
        if value is not None and value != "fitted" and (isinstance(value, str) or not 0 < value <= 1):
            raise ExportError(f"Expected `confidence` of a budget to be in (0, 1] or 'fitted', got {value!r}.")
        if self.rule is not None and (self.rule not in RULES or value is None):
            raise ExportError(
                f"Expected `rule` of a budget to be one of {', '.join(RULES)}, with a confidence, got {self.rule!r} "
                f"and confidence={value!r}."
            )

    def stages_within(self, macs: Sequence[int]) -> int:
        """Number of stages that the limits on stages and MACs allow, at least 1.

        Args:
            macs: cumulative multiply-adds per sample, one value per stage.
        """
        allowed = len(macs) if self.stages is None else min(self.stages, len(macs))
        if self.macs is not None:
            allowed = min(allowed, sum(cost <= self.macs for cost in macs))
        return max(allowed, 1)


@dataclass(frozen=True)
class Stage:
    """Answer of a prefix.

    Attributes:
        total: (B, L), weighted sum of the students' logits.
        factor: from this sum to logits in the teacher's units; (L,) for real outputs.
        index: number of students in the prefix.
        macs: cumulative multiply-adds per sample.
        offset: (L,), added to real outputs.
    """

    total: Array
    factor: float | Array
    index: int
    macs: int
    offset: Array | None = None

    @property
    def logits(self) -> Array:
        """(B, L), in the teacher's units; computed on access."""
        logits: Array = self.total * self.factor
        return logits if self.offset is None else logits + self.offset


@dataclass(frozen=True)
class Prediction:
    """Result of a prediction.

    Attributes:
        logits: (B, L), in the teacher's units.
        stages: (B,), number of students that answered each sample.
        macs: (B,), multiply-adds of each sample.
    """

    logits: Array
    stages: Array
    macs: Array


def confidence_of(logits: Array, rule: str, temperature: float = 1.0, votes: Array | None = None) -> Array:
    """Confidence of the answers of a prefix.

    Args:
        logits: (B, L).
        rule: one of `RULES`.
        temperature: divides the logits; has no effect on agreement.
        votes: (B, L), how many students answer each class; only for agreement.

    Returns:
        (B,) in 0 … 1.
    """
    if rule == "agreement":
        assert votes is not None
        count = votes.sum(1)
        chosen = votes[np.arange(len(votes)), logits.argmax(1)]
        return np.where(count > 1, chosen / np.maximum(count, 1), 0)
    scaled = logits / np.float32(temperature)
    exponentials = np.exp(scaled - scaled.max(1, keepdims=True))
    probability = exponentials / exponentials.sum(1, keepdims=True)
    if rule == "max_prob":
        return np.asarray(probability.max(1))
    if rule == "margin":
        largest = np.partition(probability, -2, axis=1)[:, -2:]
        return np.asarray(largest[:, 1] - largest[:, 0])
    terms = probability * np.log(np.where(probability > 0, probability, 1))
    return np.asarray(1 + terms.sum(1) / math.log(logits.shape[1]))
