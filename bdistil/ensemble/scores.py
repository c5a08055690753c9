"""TODO."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch.utils.data import DataLoader

from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.metrics.quality import PrefixErrors, PrefixScores, Task

Scores = PrefixScores | PrefixErrors


def _scores(task: Task, outputs: int, predictors: int = 1) -> Scores:
    """What the answers of K predictors are measured by."""
    if task == "regression":
        return PrefixErrors(predictors, outputs, sync_on_compute=False)
    return PrefixScores(predictors, sync_on_compute=False)


@torch.no_grad()
def prefix_accuracies(
    ensemble: ProgressiveEnsemble, loader: DataLoader[Any], device: torch.device, task: Task = "classification"
) -> list[float]:
    """Accuracy in 0 … 1, or R², of every prefix, in one pass over a loader that yields (x, y)."""
    scores: Scores | None = None
    for x, y in loader:
        answers = [stage.logits.cpu() for stage in ensemble.stages(move_data_to_device(x, device))]
        scores = scores or _scores(task, answers[0].shape[-1], len(ensemble))
        scores.update(torch.stack(answers), y)
    return [] if scores is None else [float(a) for a in scores.compute()[0].flatten()]
