"""Figures of an evaluation as a table for the terminal, as CSV and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdistil.reporting.curve_plot import plot_curve
from bdistil.storage.files import disk_errors, write_atomically
from bdistil.storage.run_directory import RunDirectory


def teacher_row(run: RunDirectory, part: str) -> dict[str, Any] | None:
    """The teacher as a row beside those of budgets, as far as the run knows it; of real outputs R² stands for accuracy.

    Args:
        run: the run directory.
        part: ``test`` or ``val``: which accuracy.
    """
    figures, test = run.teacher_figures(), run.test_figures()
    if figures is None:
        return None
    score = figures.get("val_accuracy") if part == "val" else (test or [None])[0]
    name = "r2" if run.task == "regression" else "accuracy"
    row = {"budget": "teacher", "part": part, name: score, "average_macs": figures["macs"]}
    return {**row, "single_ms_p50": figures["latency_ms"]}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns for the terminal; a column that no row fills is left out.

    Args:
        rows: of any keys; those of the first rows come first.
    """
    keys = [key for key in _keys(rows) if any(row.get(key) is not None for row in rows)]
    cells = [keys, *([_shown(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes rows as CSV; a list is one cell of numbers with spaces between.

    Args:
        rows: of any keys.
        path: the file.

    Raises:
        RunError: the disk refused.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _keys(rows), lineterminator="\n")
    writer.writeheader()
    plain = ({key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in row.items()} for row in rows)
    writer.writerows(plain)
    with disk_errors("the table of the evaluation", path.parent):
        write_atomically(path, text.getvalue())


def write_picture(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws accuracy, or R² of real outputs, against average MACs, with the teacher as reference.

    Args:
        rows: of budgets, and the teacher's, where there is one.
        path: a PNG.
        title: over the picture.

    Raises:
        RunError: the disk refused.
    """
    points = []
    for row in sorted(rows, key=lambda row: float(row["average_macs"])):
        name, column = str(row["budget"]), f"{row['part']}_accuracy"
        point = {"stage": name if name == "teacher" else name.rpartition("=")[2], "macs": str(row["average_macs"])}
        real = "r2" in row
        points.append({**point, column: str(row["r2" if real else "accuracy"]), "task": "regression" if real else ""})
    with disk_errors("the picture of the evaluation", path.parent):
        plot_curve(points, path, title=title)
