"""Budgets of a prediction, confidence scores by which samples exit early, and the result of a prediction.

An exit rule maps an answer to a confidence in 0 … 1. A sample is decided at the first stage whose confidence reaches
the threshold of that stage; the last stage decides all that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bdistil.errors import UserError

Rule = Literal["max_prob", "margin", "entropy", "agreement"]
RULES: tuple[Rule, ...] = get_args(Rule)
NEVER = 2.0  # a threshold that no sample reaches
REGISTER = 16  # float32 values in a vector register of 512 bits


def confidence_of(logits: Tensor, rule: Rule, temperature: float = 1.0, votes: Tensor | None = None) -> Tensor:
    """Confidence of the answers of a prefix.

    ``max_prob`` is the largest softmax probability, ``margin`` its distance to the second largest, ``entropy`` is
    1 - H / ln L, and ``agreement`` the share of the prefix's students whose own answer is that of the prefix. For a
    single student agreement is undefined and set to 0.

    Args:
        logits: (B, L).
        rule: one of `RULES`.
        temperature: divides the logits; has no effect on agreement.
        votes: (B, L), how many of the students answer each class; only for agreement.

    Returns:
        (B,) in 0 … 1.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> confidence_of(logits, "margin").round(decimals=3)
        tensor([0.6800, 0.0000])
    """
    if rule == "agreement":
        assert votes is not None
        chosen = votes.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
        count = votes.sum(1)
        return torch.where(count > 1, chosen / count.clamp(min=1), torch.zeros_like(chosen))
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    # Over the last dimension torch is slow where the classes do not fill a vector register.
    probability = scaled.softmax(-1) if logits.shape[-1] >= REGISTER else scaled.t().softmax(0).t()
    if rule == "max_prob":
        return probability.amax(-1)
    if rule == "margin":
        first, second = probability.topk(2, -1).values.unbind(-1)
        return first - second
    entropy: Tensor = -torch.special.xlogy(probability, probability).sum(-1)
    return 1 - entropy / math.log(logits.shape[-1])


def add_votes(votes: Tensor | None, logits: Tensor) -> Tensor:
    """Adds the answers of one more student, with logits (B, L), to the votes (B, L); None before the first."""
    vote = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return vote if votes is None else votes + vote


@dataclass(frozen=True)
class Budget:
    """Limits of a prediction. They combine: the first that binds ends it. At least one stage always runs.

    Attributes:
        stages: maximum number of students.
        macs: maximum number of multiply-adds per sample.
        seconds: maximum time; no student is started that would end later by the measured stage times.
        confidence: a sample is decided as soon as its confidence reaches this; ``fitted`` uses the thresholds fitted
            on the validation part, one per stage.
        rule: exit rule: ``max_prob`` (the default), ``margin``, ``entropy`` or ``agreement``.

    Raises:
        UserError: a limit or the rule is out of its range.

    Example:
        >>> Budget(macs=50_000, confidence=0.9).stages_within([20_000, 40_000, 60_000])
        2
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
        confidence = self.confidence
        if confidence not in (None, "fitted") and not (isinstance(confidence, float | int) and 0 < confidence <= 1):
            raise UserError(f"Expected `confidence` of a budget to be in (0, 1] or 'fitted', got {confidence}.")
        if self.rule is not None and self.rule not in RULES:
            raise UserError(f"Expected `rule` of a budget to be one of {', '.join(RULES)}, got {self.rule!r}.")

    def stages_within(self, macs: Sequence[int]) -> int:
        """Number of stages that the limits on stages and MACs allow, at least 1.

        Args:
            macs: cumulative MACs per sample, one value per stage.
        """
        allowed = len(macs) if self.stages is None else min(self.stages, len(macs))
        if self.macs is not None:
            allowed = min(allowed, sum(cost <= self.macs for cost in macs))
        return max(allowed, 1)

    def check_rule(self) -> None:
        """Checks that a rule comes with a confidence; in a sweep over confidences it is added later.

        Raises:
            UserError: there is a rule and no confidence.
        """
        if self.confidence is None and self.rule is not None:
            raise UserError(
                f"`rule` of a budget defines how `confidence` is computed, got rule={self.rule!r} without confidence. "
                "Give confidence=0.9, for example, or leave the rule out."
            )


@dataclass(frozen=True)
class Prediction:
    """Result of a prediction within a budget.

    Attributes:
        logits: (B, L), in the teacher's units.
        answered: number of students that ran for each sample, (B,) int64; an int where it is the same for all.
        costs: cumulative multiply-adds per sample, one value per stage.

    Example:
        >>> Prediction(torch.zeros(2, 10), torch.tensor([1, 3]), costs=[100, 200, 300]).macs
        tensor([100, 300])
    """

    logits: Tensor
    answered: int | Tensor
    costs: Sequence[int]

    @property
    def stages(self) -> Tensor:
        """Number of students that ran for each sample, (B,) int64."""
        return self.answered if isinstance(self.answered, Tensor) else torch.full((len(self.logits),), self.answered)

    @property
    def macs(self) -> Tensor:
        """Multiply-adds spent on each sample, (B,) int64."""
        return torch.tensor(self.costs)[self.stages - 1]
