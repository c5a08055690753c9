"""What a prediction may cost, what it gives, and how sure an answer is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .files import ExportError

Array = np.ndarray[Any, Any]

RULES = ("max_prob", "margin", "entropy", "agreement")


@dataclass(frozen=True)
class Budget:
    """What a prediction may cost. Limits combine: the first to bind wins. At least one stage always answers.

    Attributes:
        stages: at most this many students.
        macs: at most this many multiply-adds a sample.
        seconds: no student is started that would end later than this after the call, by the measured stage times.
        confidence: a sample is decided as soon as its confidence reaches this; "fitted" takes the
            manifest's thresholds.
        rule: how confidence is read: max_prob (the default), margin, entropy or agreement.
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
        sure = self.confidence
        if sure is not None and sure != "fitted" and (isinstance(sure, str) or not 0 < sure <= 1):
            raise ExportError(f"Expected `confidence` of a budget to be in (0, 1] or 'fitted', got {sure!r}.")
        if self.rule is not None and (self.rule not in RULES or sure is None):
            raise ExportError(
                f"Expected `rule` of a budget to be one of {', '.join(RULES)}, beside a confidence, got {self.rule!r} "
                f"with confidence={sure!r}."
            )

    def stages_within(self, macs: Sequence[int]) -> int:
        """How many stages the limits on stages and MACs allow, at least 1, by cumulative MACs."""
        allowed = len(macs) if self.stages is None else min(self.stages, len(macs))
        if self.macs is not None:
            allowed = min(allowed, sum(cost <= self.macs for cost in macs))
        return max(allowed, 1)


@dataclass(frozen=True)
class Stage:
    """The answer after a number of students: logits (B, L), how many have answered, multiply-adds a sample so far."""

    total: Array
    factor: float | Array
    index: int
    macs: int
    offset: Array | None = None

    @property
    def logits(self) -> Array:
        """(B, L), in the teacher's units; worked out when it is read."""
        logits: Array = self.total * self.factor
        return logits if self.offset is None else logits + self.offset


@dataclass(frozen=True)
class Prediction:
    """Logits (B, L), how many students answered each sample (B,), and the multiply-adds that each cost (B,)."""

    logits: Array
    stages: Array
    macs: Array


def confidence_of(logits: Array, rule: str, temperature: float = 1.0, votes: Array | None = None) -> Array:
    """How sure answers (B, L) are, (B,) in 0 … 1; `votes` (B, L) counts the students that answer each class."""
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
        two = np.partition(probability, -2, axis=1)[:, -2:]
        return np.asarray(two[:, 1] - two[:, 0])
    terms = probability * np.log(np.where(probability > 0, probability, 1))
    return np.asarray(1 + terms.sum(1) / math.log(logits.shape[1]))
