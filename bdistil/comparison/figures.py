"""Scores of the prefixes of a trained ensemble, for a cell of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bdistil.boosting.labels import all_batches
from bdistil.ensemble.ensemble import ProgressiveEnsemble, prefix_accuracies
from bdistil.evaluation.calibrate import own_logits
from bdistil.evaluation.run_data import Split
from bdistil.evaluation.temperature import calibration_error
from bdistil.metrics.quality import Task, class_numbers, given_labels, prefix_metric
from bdistil.teachers.offline import OfflineTeacher

Row = dict[str, Any]


def prefix_rows(costs: Sequence[Row], val: Sequence[Row], test: Sequence[Row]) -> list[Row]:
    """One row per prefix: its costs, and its scores on both parts, named ``val_…`` and ``test_…``."""
    rows = enumerate(zip(costs, val, test, strict=True), 1)
    return [{"prefix": number, **cost, **_named("val", a), **_named("test", b)} for number, (cost, a, b) in rows]


def _named(part: str, figures: Row) -> Row:
    return {f"{part}_{key}": value for key, value in figures.items()}


def part_figures(ensemble: ProgressiveEnsemble, loader: Any) -> list[Row]:
    """Accuracy (or the score of the task) and calibration error (classification only) of every prefix, in one pass.

    Args:
        ensemble: ensemble on the CPU.
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


def table_figures(table: OfflineTeacher, part: Split, loader: Any, task: Task) -> list[Row]:
    """`part_figures` of a teacher given as a table of logits; values are None if the table has no logits of the part.

    Args:
        table: logits by part.
        part: part of the data.
        loader: loader of that part; yields (x, y).
        task: task of the recipe.
    """
    if part not in table.tables:
        return [{"accuracy": None, "calibration_error": None}]
    scores, answers, labels = prefix_metric(task, table.outputs), [], []
    for _, y, index in all_batches(loader):
        answers.append(table.rows(part, index))
        labels.append(given_labels(task, y, answers[-1]))
        scores.update(answers[-1][None], labels[-1])
    accuracy, error = float(scores.compute()[0]), None
    if task == "classification":
        classes = class_numbers(torch.cat(labels))
        error = calibration_error(torch.cat(answers)[classes >= 0], classes[classes >= 0])
    return [{"accuracy": accuracy, "calibration_error": error}]
