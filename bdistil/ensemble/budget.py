"""Prediction budgets, confidence scores for early exit, and prediction results.

An exit rule maps an answer to a confidence in 0 … 1. A sample is decided at the first stage whose confidence reaches
the threshold of that stage; the last stage decides all remaining samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bdistil.errors import UserError
from bdistil.runner import confidence
from bdistil.runner.budget import check_limits, stages_within
from bdistil.runner.confidence import Array

Rule = Literal["max_prob", "margin", "entropy", "agreement"]
RULES: tuple[Rule, ...] = get_args(Rule)
NEVER = 2.0  # a threshold that no sample reaches


def confidence_of(logits: Tensor, rule: Rule, temperature: float = 1.0, votes: Tensor | None = None) -> Tensor:
    """Confidence of the answers of a prefix.

    ``max_prob`` is the largest softmax probability, ``margin`` its distance to the second largest, ``entropy`` is
    1 - H / ln L, and ``agreement`` the share of the prefix's students that predict the same class as the prefix. For a
    single student agreement is undefined and set to 0.

    Args:
        logits: (B, L).
        rule: one of `RULES`.
        temperature: divides the logits; has no effect on agreement.
        votes: (B, L), number of students that predict each class; only for agreement.

    Returns:
        (B,) in 0 … 1, on the CPU.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> confidence_of(logits, "margin").round(decimals=3)
        tensor([0.6800, 0.0000])
    """
    found = confidence.confidence_of(host(logits), rule, 1 / temperature, None if votes is None else host(votes))
    return torch.from_numpy(np.asarray(found))


def host(tensor: Tensor) -> Array:
    """Converts a tensor to a NumPy array, without a copy if it is on the CPU; half precision becomes float32."""
    if not tensor.is_cpu or tensor.requires_grad or tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32))
    array: Array = tensor.numpy()
    return array


def add_votes(votes: Tensor | None, logits: Tensor) -> Tensor:
    """Adds the predicted classes of a student with logits (B, L) to the votes (B, L), None before the first student."""
    vote = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return vote if votes is None else votes + vote


@dataclass(frozen=True)
class Budget:
    """Limits of a prediction. The first limit that is reached ends the prediction; at least one stage always runs.

    Attributes:
        stages: maximum number of students.
        macs: maximum number of multiply-adds per sample; where lengths vary, of one like the first training sample.
        seconds: maximum time; no student is started that would exceed it according to the measured stage times.
        confidence: a sample is decided as soon as its confidence reaches this value; ``fitted`` uses the thresholds
            fitted on the validation part, and their rule.
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
        check_limits(self, UserError)
        if self.rule is not None and self.rule not in RULES:
            raise UserError(f"Expected `rule` of a budget to be one of {', '.join(RULES)}, got {self.rule!r}.")

    def stages_within(self, macs: Sequence[int]) -> int:
        """Number of stages that the limits on stages and MACs allow, at least 1.

        Args:
            macs: cumulative MACs per sample, one value per stage.
        """
        return stages_within(macs, self.stages, self.macs)

    def check_rule(self) -> None:
        """Checks that a rule comes with a confidence; separate from construction as a sweep sets the confidence later.

        Raises:
            UserError: `rule` is set without `confidence`.
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
        answered: number of students in the prefix that answers each sample, (B,) int64; an int if it is the same for
            all. It does not depend on the other samples of the batch.
        costs: cumulative multiply-adds per sample, one value per stage.
        ran: number of students that were run on each sample, (B,) int64 or an int: larger than `answered` where
            skipping an exit check or keeping a decided sample in the batch was cheaper. None: same as `answered`.

    Example:
        >>> prediction = Prediction(torch.zeros(2, 10), torch.tensor([1, 3]), costs=[100, 200, 300], ran=3)
        >>> prediction.stages, prediction.macs
        (tensor([1, 3]), tensor([300, 300]))
    """

    logits: Tensor
    answered: int | Tensor
    costs: Sequence[int]
    ran: int | Tensor | None = None

    @property
    def stages(self) -> Tensor:
        """Number of students in the prefix that answers each sample, (B,) int64."""
        return self._each(self.answered)

    @property
    def macs(self) -> Tensor:
        """Multiply-adds run on each sample, (B,) int64."""
        return torch.tensor(self.costs)[self._each(self.answered if self.ran is None else self.ran) - 1]

    def _each(self, stages: int | Tensor) -> Tensor:
        return stages if isinstance(stages, Tensor) else torch.full((len(self.logits),), stages)
