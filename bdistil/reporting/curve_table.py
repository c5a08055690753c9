"""The curve of a run as people read it: figures of curve.csv in words, and a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

from bdistil.metrics.quality import loss_name, score_name

Row = Mapping[str, str]


def number(row: Row, column: str) -> float | None:
    """The figure in a cell; None where there is none, or none that is finite."""
    try:
        value = float(row.get(column) or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def short(value: float) -> str:
    """A number with three digits and k, M, G, T or P."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.4g}P"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 59.5 else str(timedelta(seconds=round(seconds)))


percent, plain = "{:.2%}".format, "{:.4g}".format
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "stage": ("stage", plain), "macs": ("MACs", short), "share": ("of teacher", "{:.1%}".format),
    "link_macs": ("link MACs", short), "params": ("params", short), "activation_bytes": ("activation bytes", short),
    "latency_ms": ("latency ms", plain), "val_accuracy": ("val accuracy", percent), "val_loss": ("val loss", plain),
    "test_accuracy": ("test accuracy", percent), "rms_error": ("rms error", plain),
    "sup_error": ("sup error", plain), "margin_share": ("margins met", "{:.0%}".format),
    "margin_min": ("least margin", plain), "area": ("area", plain), "violations": ("falls", plain),
    "train_macs": ("training MACs", short), "seconds": ("time", _duration), "accepted_class": ("class", plain),
}  # fmt: skip


def shown(row: Row, column: str, empty: str = "–") -> str:
    """A cell as people read it."""
    value = number(row, column)
    if value is None:
        return row.get(column) or empty
    real = row.get("task") == "regression" and column.endswith("accuracy")  # R² is no share
    return f"{value:.3f}" if real else COLUMNS[column][1](value)


def of_task(rows: Sequence[Row], task: str) -> list[Row]:
    """The rows of curve.csv, each of which also says what its run answers: classes, or real outputs."""
    return [{**row, "task": task} for row in rows]


def label(column: str, rows: Sequence[Row]) -> str:
    """What stands over a column; those named accuracy hold R² of real outputs."""
    task = rows[0].get("task", "") if rows else ""
    label = COLUMNS[column][0].replace("accuracy", score_name(task))
    return label.replace("loss", loss_name(task))


def split(rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    """The teacher's row, and the rows of the prefixes, each with its share of the teacher's MACs."""
    teacher: Row = next((row for row in rows if row["stage"] == "teacher"), {})
    whole = number(teacher, "macs") or math.inf
    stages = [row for row in rows if row["stage"] != "teacher"]
    return teacher, [{**row, "share": str((number(row, "macs") or 0.0) / whole or "")} for row in stages]


def curve_table(rows: Sequence[Row], task: str = "classification") -> str:
    """The curve for the terminal: aligned, at most 100 columns wide.

    Args:
        rows: the rows of curve.csv, the teacher first; any cell may be empty.
        task: of the run.
    """
    rows = of_task(rows, task)
    names = (
        "stage", "macs", "share", "params", "val_accuracy", "test_accuracy", "rms_error", "seconds", "accepted_class",
    )  # fmt: skip
    teacher, stages = split(rows)
    lines = [[label(name, rows).replace("accuracy", "acc.") for name in names]]
    lines += [[shown(row, name, "-") for name in names] for row in (teacher, *stages) if row]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = min(widths[-1], 100 - sum(widths[:-1]) - 2 * (len(names) - 1))
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join([*map(str.rjust, line[:-1], widths), line[-1][: widths[-1]]]) for line in lines)
