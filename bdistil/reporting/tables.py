"""Text tables for the terminal, and the names and units of the columns of curve.csv."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bdistil.metrics.quality import score_name

Row = Mapping[str, str]
WIDTH = 100  # characters per line of a table in the terminal
# The only rule is below the header and in ASCII, so that a table can be printed to any terminal, file or pipe.
HEADER_RULE = Box("    \n    \n -  \n" + "    \n" * 5, ascii=True)


TextTable = tuple[list[str], list[list[str]]]  # header and rows


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None) -> str:
    """An aligned table as plain text.

    Args:
        header: names of the columns.
        rows: cells as text, one per column.
        width: maximum line width, to which the last column is wrapped; unlimited by default.

    Example:
        >>> print(format_table(["stage", "MACs"], [["1", "5.91k"], ["2", "11.8k"]]))
        stage   MACs
        ----- ------
            1  5.91k
            2  11.8k
    """
    table = Table(box=HEADER_RULE, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    for number, name in enumerate(header, 1):
        table.add_column(Text(name), justify="right", no_wrap=width is None or number < len(header))
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=width or 10_000, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as text:
        console.print(table)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def number(row: Row, column: str) -> float | None:
    """The number in a cell; None if the cell is empty, not numeric or not finite."""
    try:
        value = float(row.get(column) or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def format_count(value: float) -> str:
    """Formats a number with three digits and k, M, G, T or P.

    Example:
        >>> format_count(21_488)
        '21.5k'
    """
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.4g}P"


def format_duration(seconds: float) -> str:
    """Formats seconds for display: ``3.21 s``, ``0:12:30``."""
    return f"{seconds:.3g} s" if seconds < 59.5 else str(timedelta(seconds=round(seconds)))


percent, plain = "{:.2%}".format, "{:.4g}".format
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "stage": ("stage", plain), "macs": ("MACs", format_count), "share": ("of teacher", "{:.1%}".format),
    "link_macs": ("link MACs", format_count), "params": ("params", format_count),
    "activation_bytes": ("activation bytes", format_count), "latency_ms": ("latency ms", plain),
    "val_accuracy": ("val accuracy", percent), "val_loss": ("val loss", plain),
    "test_accuracy": ("test accuracy", percent), "rms_error": ("rms error", plain),
    "sup_error": ("sup error", plain), "margin_share": ("margins met", "{:.0%}".format),
    "margin_min": ("least margin", plain), "area": ("area", plain), "violations": ("falls", plain),
    "train_macs": ("training MACs", format_count), "seconds": ("time", format_duration),
    "accepted_class": ("class", plain),
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """The rows of curve.csv, with the names and units of their cells.

    Attributes:
        rows: rows of curve.csv, the teacher first; any cell may be empty.
        task: task of the run. In a regression, the columns named accuracy hold R².
    """

    rows: Sequence[Row]
    task: str = "classification"

    @property
    def regression(self) -> bool:
        """Whether accuracy is R²."""
        return self.task == "regression"

    @cached_property
    def teacher(self) -> Row:
        """The row of the teacher; empty if there is none."""
        return next((row for row in self.rows if row["stage"] == "teacher"), {})

    @cached_property
    def stages(self) -> list[Row]:
        """The rows of the prefixes, each with its share of the teacher's MACs."""
        whole = number(self.teacher, "macs") or math.inf
        stages = [row for row in self.rows if row["stage"] != "teacher"]
        return [{**row, "share": str((number(row, "macs") or 0.0) / whole or "")} for row in stages]

    def label(self, column: str) -> str:
        """The header of a column."""
        label = COLUMNS[column][0].replace("accuracy", score_name(self.task))
        return label.replace("loss", "rms error on labels") if self.task == "regression" else label

    def score(self, value: float, digits: int = 2) -> str:
        """Formats an accuracy as percentage, or R²."""
        return f"{value:.3f}" if self.regression else f"{value:.{digits}%}"

    def cell(self, row: Row, column: str, empty: str = "–") -> str:
        """Formats a cell with its unit.

        Args:
            row: row of the curve.
            column: name of a column.
            empty: text for an empty cell.
        """
        value = number(row, column)
        if value is None:
            return row.get(column) or empty
        return self.score(value) if column.endswith("accuracy") else COLUMNS[column][1](value)


def curve_table(rows: Sequence[Row], task: str = "classification") -> str:
    """The curve as text, at most 100 columns wide.

    Args:
        rows: the rows of curve.csv, the teacher first; any cell may be empty.
        task: task of the run.
    """
    curve = Curve(rows, task)
    names = (
        "stage", "macs", "share", "params", "val_accuracy", "test_accuracy", "rms_error", "seconds", "accepted_class",
    )  # fmt: skip
    header = [curve.label(name).replace("accuracy", "acc.").replace("mean average precision", "mAP") for name in names]
    lines = ([curve.cell(row, name, "-") for name in names] for row in (curve.teacher, *curve.stages) if row)
    return format_table(header, lines, WIDTH)
