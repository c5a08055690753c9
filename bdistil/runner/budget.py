"""Budgets of a prediction, and its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .confidence import RULES, Array


class ExportError(ValueError):
    """The folder, the input or the budget cannot be used."""


@dataclass(frozen=True)
class Budget:
    """Limits of a prediction. They combine: the first that binds ends it. At least one stage always runs.

    Attributes:
        stages: maximum number of students.
        macs: maximum number of multiply-adds per sample.
        seconds: maximum time; a student that would exceed it by the measured stage times is not started.
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
        check_limits(self, ExportError)
        if self.rule is not None and (self.rule not in RULES or self.confidence is None):
            raise ExportError(
                f"Expected `rule` of a budget to be one of {', '.join(RULES)}, with a confidence, got {self.rule!r} "
                f"and confidence={self.confidence!r}."
            )

    def stages_within(self, macs: Sequence[int]) -> int:
        """Number of stages that the limits on stages and MACs allow, at least 1.

        Args:
            macs: cumulative multiply-adds per sample, one value per stage.
        """
        return stages_within(macs, self.stages, self.macs)


def check_limits(budget: Any, error: type[Exception]) -> None:
    """Checks the numbers of a budget; None means no limit. NumPy numbers are accepted, booleans are not.

    Args:
        budget: object with the limits of `Budget`.
        error: class of the exception for a limit out of its range.
    """

    def check(name: str, kind: type, allowed: str, within: Callable[[Any], bool]) -> None:
        value = getattr(budget, name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) or not within(value)):
            raise error(f"Expected `{name}` of a budget to be {allowed}, got {value!r}.")

    check("stages", Integral, "a whole number >= 1", lambda value: value >= 1)
    check("macs", Real, "a number > 0", lambda value: value > 0)
    check("seconds", Real, "a number > 0", lambda value: value > 0)
    if budget.confidence != "fitted":
        check("confidence", Real, "in (0, 1] or 'fitted'", lambda value: 0 < value <= 1)


def stages_within(costs: Sequence[int], stages: int | None, macs: float | None) -> int:
    """Number of stages that the limits on stages and MACs allow, at least 1.

    Args:
        costs: cumulative multiply-adds per sample, one value per stage.
        stages: limit on the stages.
        macs: limit on the multiply-adds.
    """
    allowed = len(costs) if stages is None else min(stages, len(costs))
    if macs is not None:
        allowed = min(allowed, sum(cost <= macs for cost in costs))
    return max(allowed, 1)


@dataclass(frozen=True)
class Stage:
    """Answer of a prefix.

    Attributes:
        total: (B, L), weighted sum of the students' logits.
        factor: factor from this sum to logits in the teacher's units; (L,) for real outputs.
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
        stages: (B,), number of students in the prefix that answers each sample; does not depend on the rest of the
            batch.
        macs: (B,), multiply-adds run on each sample; they include students beyond its prefix if it was cheaper not to
            check after each student, or to leave a decided sample in the batch.
    """

    logits: Array
    stages: Array
    macs: Array
