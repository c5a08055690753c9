"""Figures of the prefixes of a trained ensemble, for a cell of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bdistil.ensemble.ensemble import ProgressiveEnsemble, prefix_accuracies
from bdistil.evaluation.calibrate import own_logits
from bdistil.evaluation.temperature import calibration_error

Row = dict[str, Any]


def prefix_rows(costs: Sequence[Row], val: Sequence[Row], test: Sequence[Row]) -> list[Row]:
    """One row for each prefix: its costs, and its figures on both parts under the names ``val_…`` and ``test_…``."""
    rows = enumerate(zip(costs, val, test, strict=True), 1)
    return [{"prefix": number, **cost, **_named("val", a), **_named("test", b)} for number, (cost, a, b) in rows]


def _named(part: str, figures: Row) -> Row:
    return {f"{part}_{key}": value for key, value in figures.items()}


def part_figures(ensemble: ProgressiveEnsemble, loader: Any) -> list[Row]:
    """Accuracy, or what replaces it, and calibration error (None but for classes) of every prefix, in one pass.

    Args:
        ensemble: on the CPU.
        loader: yields (x, y).
    """
    cpu = torch.device("cpu")
    if ensemble.task != "classification":
        scores = prefix_accuracies(ensemble, loader, cpu, ensemble.task)
        return [{"accuracy": score, "calibration_error": None} for score in scores]
    own, classes = own_logits(ensemble, loader, cpu)
    prefixes = own.cumsum(0) / torch.arange(1, len(own) + 1)[:, None, None]
    return [
        {
            "accuracy": float((logits.argmax(-1) == classes).double().mean()),
            "calibration_error": calibration_error(logits, classes),
        }
        for logits in prefixes
    ]
