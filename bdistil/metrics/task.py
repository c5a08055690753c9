"""TODO."""

from __future__ import annotations

from typing import Literal

Task = Literal["classification", "regression"]


def score_name(task: str) -> str:
    """What the columns `val_accuracy` and `test_accuracy` hold."""
    return "R²" if task == "regression" else "accuracy"


def loss_name(task: str) -> str:
    """What the column `val_loss` holds."""
    return "rms error on labels" if task == "regression" else "loss"
