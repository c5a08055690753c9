"""How early a sequence was decided, and at what accuracy: the figures of early classification.

A sample is decided at the first stage whose largest softmax probability reaches a threshold; where none does, it is
answered at the last step and counts as undecided. The share that is decided early says nothing without the accuracy of
all samples, so the two are always given together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bdistil.ensemble.budget import confidence_of
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.models.segment_student import SegmentStudent

# Parts of the sequence by which the share of decided samples is reported, as the literature does.
PARTS = (0.55, 0.75)
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)


def first_sure(sure: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The stage at which each sample is answered, and whether it was decided there.

    Args:
        sure: confidence of each stage's answer, (T, N).
        threshold: from which on a sample is decided.

    Returns:
        Stages from 0, (N,) int64, the last for a sample that is never decided; and (N,) bool.
    """
    reached = sure >= threshold
    decided = reached.any(0)
    return torch.where(decided, reached.int().argmax(0), len(sure) - 1), decided


def share_decided_by(read: Tensor, decided: Tensor, steps: int, part: float) -> float:
    """Share of the samples that were decided by a part of the steps.

    Args:
        read: how many steps of each sample were read, (N,).
        decided: (N,) bool; a sample that never was counts in the denominator only.
        steps: M, of the whole sequence.
        part: for example 0.55.
    """
    return float((decided & (read <= part * steps)).double().mean())


def steps_saved(read: Tensor, steps: int) -> float:
    """Share of the steps that nobody had to read: 1 - sum_i (e_i + 1) / (N M), with e_i the last step read, from 0.

    Args:
        read: how many steps of each sample were read, e_i + 1, (N,).
        steps: M, of the whole sequence.
    """
    return 1.0 - float(read.double().mean()) / steps


def early_row(sure: Tensor, right: Tensor, ends: Sequence[int], steps: int, threshold: float) -> dict[str, float]:
    """The early-decision figures at one threshold; the accuracy is that of all samples.

    Args:
        sure: confidence of each stage's answer, (T, N).
        right: is that answer right, (T, N) bool.
        ends: steps read after each stage.
        steps: M, of the whole sequence.
        threshold: from which on a sample is decided.
    """
    stages, decided = first_sure(sure, threshold)
    read = torch.tensor(ends)[stages]
    row = {f"decided_by_{100 * part:.0f}": share_decided_by(read, decided, steps, part) for part in PARTS}
    row["accuracy"] = float(right.gather(0, stages[None]).double().mean())
    row["steps_saved"] = steps_saved(read, steps)
    return {key: round(value, 4) for key, value in row.items()}


def early_figures(
    ensemble: ProgressiveEnsemble, loader: DataLoader[Any], confidence: float | str | None = None
) -> dict[str, Any]:
    """The early-decision figures of an ensemble that reads sequences in segments; nothing of any other.

    Args:
        ensemble: of a run.
        loader: yields (x, y).
        confidence: one more threshold beside the usual ones.

    Returns:
        ``early@0.9`` and so on: shares decided by 55 % and 75 % of the steps, accuracy of all samples, steps saved.
    """
    students = [student for student in ensemble.students if isinstance(student, SegmentStudent)]
    if not students:
        return {}
    sure, right, steps = [], [], 0
    for x, y in loader:
        steps = x.shape[1]
        logits = [stage.logits.cpu() for stage in ensemble.stages(x)]
        sure.append(torch.stack([confidence_of(answer, "max_prob") for answer in logits]))
        right.append(torch.stack([answer.argmax(-1) == y for answer in logits]))
    ends = [student.span(steps)[1] for student in students]
    thresholds = sorted({*THRESHOLDS, *([confidence] if isinstance(confidence, float) else [])})
    all_sure, all_right = torch.cat(sure, 1), torch.cat(right, 1)
    return {f"early@{p:g}": early_row(all_sure, all_right, ends, steps, p) for p in thresholds}
