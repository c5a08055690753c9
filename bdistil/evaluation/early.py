"""Metrics of early classification: how early sequences are decided, and at which accuracy.

A sample is decided at the first stage whose largest softmax probability, at the fitted temperature as in `predict`,
reaches a threshold. A sample that no stage decides is answered at the last step and counts as undecided. The share
decided early is only meaningful with the accuracy of all samples, so both are always reported together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bdistil.ensemble.budget import confidence_of
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.metrics.quality import class_numbers
from bdistil.models.segment_student import SegmentStudent

FRACTIONS = (0.55, 0.75)  # fractions of the steps, as in the literature
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)


def early_row(
    confidence: Tensor, right: Tensor, ends: Sequence[int] | Tensor, steps: int | Tensor, threshold: float
) -> dict[str, float]:
    """Metrics at one threshold: shares decided by 55 % and 75 % of the steps, accuracy of all samples, steps saved.

    The share of steps saved is 1 - sum(e_i) / sum(M_i), where e_i of the M_i steps of sample i were read.

    Args:
        confidence: confidence of each stage's answer, (T, N).
        right: whether that answer is correct, (T, N) bool.
        ends: number of steps read up to each stage, (T,), or (T, N) if lengths vary.
        steps: length of a sequence, or lengths of all sequences, (N,).
        threshold: smallest confidence that decides a sample.

    Example:
        >>> confidence = torch.tensor([[0.95, 0.2], [0.5, 0.9]])
        >>> early_row(confidence, torch.ones(2, 2, dtype=torch.bool), ends=[5, 10], steps=10, threshold=0.9)
        {'decided_by_55': 0.5, 'decided_by_75': 0.5, 'accuracy': 1.0, 'steps_saved': 0.25}
    """
    reached = confidence >= threshold
    decided = reached.any(0)
    stages = torch.where(decided, reached.int().argmax(0), len(confidence) - 1)
    ends, steps = torch.as_tensor(ends).reshape(len(confidence), -1), torch.as_tensor(steps).expand(confidence.shape[1])
    read = ends.expand(confidence.shape).gather(0, stages[None])[0]
    row = {f"decided_by_{100 * f:.0f}": float((decided & (read <= f * steps)).double().mean()) for f in FRACTIONS}
    row["accuracy"] = float(right.gather(0, stages[None]).double().mean())
    row["steps_saved"] = 1.0 - float(read.sum()) / float(steps.sum())
    return {key: round(value, 4) for key, value in row.items()}


def early_figures(
    ensemble: ProgressiveEnsemble, loader: DataLoader[Any], confidence: float | str | None = None
) -> dict[str, Any]:
    """Metrics of an ensemble that reads sequences in segments, by threshold; empty for any other ensemble.

    Args:
        ensemble: ensemble of a run.
        loader: yields (x, y).
        confidence: additional threshold.

    Returns:
        The metrics of `early_row` by threshold, under ``early@0.9`` and so on.
    """
    students = [student for student in ensemble.students if isinstance(student, SegmentStudent)]
    if not students:
        return {}
    columns, of_stage = [], ensemble.calibration.temperature
    for x, y in loader:
        if y is None:
            raise UserError("Expected labels (N,) for the figures of early classification, got none.")
        classes = class_numbers(y)
        logits = [stage.logits.cpu()[classes >= 0] for stage in ensemble.stages(x)]
        samples, ends = len(logits[0]), torch.tensor([student.span(x.shape[1])[1] for student in students])
        columns.append(
            (
                torch.stack([confidence_of(a, "max_prob", of_stage(n)) for n, a in enumerate(logits)]),
                torch.stack([answer.argmax(-1) for answer in logits]) == classes[classes >= 0],
                ends[:, None].expand(-1, samples),
                torch.full((1, samples), x.shape[1]),
            )
        )
    answers, right, read, steps = (torch.cat(parts, 1) for parts in zip(*columns, strict=True))
    thresholds = sorted({*THRESHOLDS, *([confidence] if isinstance(confidence, float) else [])})
    return {f"early@{p:g}": early_row(answers, right, read, steps[0], p) for p in thresholds}
