"""Tables of figures for the terminal and as CSV, and a picture of accuracy against cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdistil.metrics.quality import Task
from bdistil.reporting.curve_plot import plot_curve
from bdistil.reporting.tables import format_table
from bdistil.storage.files import disk_errors, write_atomically
from bdistil.storage.run_directory import RunDirectory

# Name of the score column by task.
SCORES: dict[Task, str] = {"regression": "r2", "multilabel": "mean_average_precision", "classification": "accuracy"}


def reference_row(run: RunDirectory, part: str) -> dict[str, Any] | None:
    """The teacher as a row to append to those of budgets; None if the run recorded no scores of it."""
    figures, test = run.read("teacher"), run.read("test")
    if figures is None:
        return None
    score = figures.get("val_accuracy") if part == "val" else (test or [None])[0]
    name = SCORES[run.task]
    return {
        "budget": "teacher", "part": part, name: score, "average_macs": figures["macs"],
        "answered_macs": figures["macs"], "single_ms_p50": cpu_latency(figures),
    }  # fmt: skip


def cpu_latency(teacher: Mapping[str, Any]) -> float | None:
    """Latency of the teacher in milliseconds, if it was measured on the CPU, as that of the students is."""
    return float(teacher["latency_ms"]) if teacher.get("device", "cpu") == "cpu" else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns for the terminal, without the columns that are None in all rows.

    Example:
        >>> print(table([{"stage": 1, "macs": 1200}, {"stage": 2, "accuracy": 0.91}]))
        stage   macs  accuracy
        ----- ------ ---------
            1  1,200         -
            2      -      0.91
    """
    keys = [key for key in _keys(rows) if any(row.get(key) is not None for row in rows)]
    return format_table(keys, ([_text(row.get(key)) for key in keys] for row in rows))


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes rows as CSV; a list becomes one cell of numbers separated by spaces.

    Raises:
        RunError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _keys(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in row.items()} for row in rows
    )
    with disk_errors("the table of the evaluation", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.getvalue())


def write_picture(rows: Sequence[Mapping[str, Any]], path: Path, title: str, sweep: str | None = None) -> None:
    """Draws accuracy, or R² for a regression, against MACs up to the answer for the rows of budgets and teacher.

    A point of a sweep is labelled by the value of the limit that varies, others by their limits.

    Raises:
        RunError: the file cannot be written.
    """
    task = next(task for task, score in SCORES.items() if any(score in row for row in rows))
    points = [
        {"stage": _label(row["budget"], sweep), "macs": str(row["answered_macs"]),
         f"{row['part']}_accuracy": str(row[SCORES[task]])}
        for row in sorted(rows, key=lambda row: float(row["answered_macs"]))
    ]  # fmt: skip
    with disk_errors("the picture of the evaluation", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        plot_curve(points, path, title=title, task=task)


def _label(budget: str, sweep: str | None) -> str:
    """Label of a budget: the value of the limit that varies, or all limits.

    >>> _label("stages=2 confidence=0.9", "stages"), _label("teacher", "stages"), _label("macs=50", None)
    ('2', 'teacher', 'macs=50')
    """
    limits = dict(limit.split("=") for limit in budget.split() if "=" in limit)
    return limits.get(sweep or "", budget)
