"""The report of a comparison: compare.csv, pictures, and one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bdistil.comparison.methods import MEANING
from bdistil.comparison.tables import (
    TOLERANCE,
    Band,
    Difference,
    Row,
    bands,
    differences,
    methods_of,
    seeds_of,
    summaries,
    unequal,
)
from bdistil.evaluation.tables import write_csv
from bdistil.metrics.quality import Task, score_name
from bdistil.reporting.axes import COLOURS, INK, MUTED, draw, log_ticks, note, panels_figure
from bdistil.reporting.report import inline_svg, template, versions
from bdistil.reporting.tables import TextTable, format_count, format_duration, plain
from bdistil.storage.files import atomic, disk_errors, write_atomically
from bdistil.utils.drawing import default_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, distinct in any colour vision; dark enough on white, light enough on black.
METHOD_COLOURS = {
    "bdistil": "#0072b2", "no_resched": "#d55e00", "resched": "#8a8f98", "links_only": "#cc79a7", "residual": "#b8860b",
    "joint": "#009e73",
}  # fmt: skip
AXES = {
    "macs": ("multiply-adds of one prediction (MACs)", format_count),
    "latency_ms": ("latency of one sample on the CPU (ms)", plain),
}


class Unit(NamedTuple):
    """Number format of scores: accuracies in percent, R² as a plain number."""

    factor: float
    form: str
    name: str
    of_differences: str

    @classmethod
    def of(cls, task: Task) -> Unit:
        """The unit of the scores of a task."""
        return cls(1.0, ".3f", "", "") if task == "regression" else cls(100.0, ".2f", " in %", ", in percentage points")

    def text(self, value: float, sign: str = "") -> str:
        """Formats a score or a difference of scores."""
        shown = round(self.factor * value, int(self.form[1])) + 0.0  # no -0.00
        return format(shown, sign + self.form)

    def pm(self, figure: Sequence[float]) -> str:
        """Formats mean ± sd of scores."""
        return _pm([self.factor * value for value in figure], f"{{:{self.form}}}")

    def difference(self, found: Difference, seeds: int) -> str:
        """Formats a difference, its interval (if there are several seeds), and its number of seeds if below `seeds`."""
        if math.isnan(found.mean):
            return "–"
        low, high = self.text(found.low, "+"), self.text(found.high, "+")
        interval = "" if math.isnan(found.low) else f" [{low}, {high}]"
        return self.text(found.mean, "+") + interval + _seeds(found.seeds, seeds)


def _seeds(count: int, of: int) -> str:
    """Note that a number is based on fewer seeds than others."""
    return "" if count == of else f" ({count} of {of} seeds)"


def _figure(rows: Sequence[Row], x: str, y: str, title: str, size: tuple[float, float], task: Task) -> Figure:
    """Draws mean and ± 1 sd band over the seeds for each method, with the teacher as reference."""
    from matplotlib.ticker import PercentFormatter

    figure, (axes,) = panels_figure(*size, {title: 1})
    for method in methods_of(rows):
        points = sorted(bands(rows, method, x, y), key=lambda band: band.x)
        if not points:
            continue
        _, xs, means, spread, _ = zip(*points, strict=True)
        colour = METHOD_COLOURS[method]
        low, high = np.array(means) - np.nan_to_num(spread), np.array(means) + np.nan_to_num(spread)
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        draw(axes, list(zip(xs, means, strict=True)), "o-", colour)
        axes.lines[-1].set_label(method)
    if y.endswith("accuracy") and (teacher := [row[y] for row in _teacher(rows)]):
        axes.axhline(teacher[0], color=INK, linewidth=1, linestyle=":")
        text, place = f"teacher {_score(teacher[0], task)}", (0.01, teacher[0])
        note(axes, text, place, (0, -12), INK, xycoords=axes.get_yaxis_transform())
    label, form = AXES[x]
    axes.set_xscale("log")
    axes.set_xlabel(label, color=MUTED, fontsize=9.5)
    log_ticks(axes.xaxis, (1, 2, 5), form)
    if task != "regression":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def pictures(rows: Sequence[Row], task: Task, size: tuple[float, float] = (7.2, 4.2)) -> dict[str, Figure]:
    """The pictures of a comparison by file name."""
    title = f"test {score_name(task)} over"
    found = {"compare-macs": _figure(rows, "macs", "test_accuracy", f"{title} MACs", size, task)}
    if any(row.get("latency_ms") for row in rows):
        found["compare-latency"] = _figure(rows, "latency_ms", "test_accuracy", f"{title} latency", size, task)
    if any(row.get("test_calibration_error") is not None for row in rows):
        title = "calibration error on the test part"
        found["compare-calibration"] = _figure(rows, "macs", "test_calibration_error", title, size, task)
    return found


def _apart(rows: Sequence[Row]) -> str:
    found = unequal(rows)
    return f"no_resched is more than {TOLERANCE:.0%} off in MACs: {'; '.join(found)}." if found else ""


def _teacher(rows: Sequence[Row]) -> list[Row]:
    """The row of the teacher; empty if the teacher is a table of logits without the test part."""
    return [row for row in rows if row["method"] == "teacher" and row["test_accuracy"] is not None]


def _score(value: float, task: Task) -> str:
    return Unit.of(task).text(value) + ("" if task == "regression" else " %")


def summary_table(rows: Sequence[Row], task: Task = "classification") -> TextTable:
    """Scores and costs of each method, mean ± sd over the seeds."""
    header = ["method", "seeds", "MACs", "test", "area", "calibration error", "falls", "training MACs", "time"]
    unit = Unit.of(task)
    cells = [
        [
            s.method, str(s.seeds), format_count(s.macs), unit.pm(s.accuracy), unit.pm(s.area),
            _pm(s.calibration_error, "{:.3f}"), _pm(s.falls, "{:.1f}"), format_count(s.train_macs[0]),
            format_duration(s.seconds[0]),
        ]
        for s in summaries(rows)
    ]  # fmt: skip
    return header, cells


def prefix_table(rows: Sequence[Row], task: Task = "classification") -> TextTable:
    """Test score and MACs of every prefix of every method, mean ± sd over the seeds that have it."""
    found = {method: {b.prefix: b for b in bands(rows, method, "macs", "test_accuracy")} for method in methods_of(rows)}
    prefixes, unit, seeds = sorted({prefix for own in found.values() for prefix in own}), Unit.of(task), seeds_of(rows)

    def text(band: Band | None) -> str:
        if band is None:
            return "–"
        return f"{unit.pm((band.mean, band.sd))} @ {format_count(band.x)}{_seeds(band.seeds, seeds)}"

    cells = [[method, *(text(own.get(prefix)) for prefix in prefixes)] for method, own in found.items()]
    return ["method", *map(str, prefixes)], cells


def difference_table(rows: Sequence[Row], method: str, task: Task = "classification") -> TextTable:
    """Score differences between a method and the others at the MACs of its prefixes, with 95 % intervals."""
    others = [other for other in methods_of(rows) if other != method]
    found = {other: {d.prefix: d for d in differences(rows, method, other)} for other in others}
    unit, seeds, cells = Unit.of(task), seeds_of(rows), []
    for prefix in sorted({prefix for ds in found.values() for prefix in ds}):
        gaps = [found[other].get(prefix) for other in others]
        macs = next(d.macs for d in gaps if d is not None)
        texts = ("–" if d is None else unit.difference(d, seeds) for d in gaps)
        cells.append([f"{prefix} @ {format_count(macs)}", *texts])
    return ["prefix", *others], cells


def _pm(figure: Sequence[float], form: str) -> str:
    mean, sd = figure
    if math.isnan(mean):
        return "–"
    return form.format(mean) + ("" if math.isnan(sd) else f" ± {form.format(sd)}")


def markdown(table: TextTable) -> str:
    """Formats a table in Markdown, with numbers right-aligned."""
    header, rows = table
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def text_report(rows: Sequence[Row], task: Task, settings: Mapping[str, Any]) -> str:
    """The tables of a comparison as a section in Markdown, for a page of results."""
    methods, unit = methods_of(rows), Unit.of(task)
    teacher = [f"teacher {_score(row['test_accuracy'], task)}" for row in _teacher(rows)]
    facts = [*(f"{name} {value}" for name, value in settings.items()), *teacher]
    score = score_name(task)
    head = f"{score[0].upper()}{score[1:]} on the test part{unit.name}, mean ± sd over the seeds."
    parts = [head, f"*{'; '.join(facts)}*", markdown(prefix_table(rows, task)), markdown(summary_table(rows, task))]
    parts += [_apart(rows)] if unequal(rows) else []
    if len(methods) > 1:
        parts.append(f"{methods[0]} against the others at its own MACs{unit.of_differences}, with 95 % intervals:")
        parts.append(markdown(difference_table(rows, methods[0], task)))
    return "\n\n".join(parts) + "\n"


@default_style()
def write_comparison(output: Path, rows: Sequence[Row], task: Task, recipe: str, settings: Mapping[str, Any]) -> Path:
    """Writes compare.csv, compare.md, the PNG pictures and report.html to a folder.

    Args:
        output: folder of the comparison.
        rows: rows returned by `bdistil.comparison.tables.gather`.
        task: task of the recipe.
        recipe: text of the recipe.
        settings: other properties of the comparison, by name.

    Returns:
        The path of report.html.
    """
    with disk_errors("the report of the comparison", output):
        write_csv(rows, output / "compare.csv")
        write_atomically(output / "compare.md", text_report(rows, task, settings))
        for name, figure in pictures(rows, task).items():
            with atomic(output / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=150)
        drawn = [inline_svg(f, name, name) for name, f in pictures(rows, task, (5.4, 3.8)).items()]
        methods = methods_of(rows)
        teacher = next(iter(_teacher(rows)), None)
        against = methods[0] if len(methods) > 1 else None
        text = template("comparison.html").render(
            title=f"Comparison {output.resolve().name}", pictures=drawn, colours=list(COLOURS.items()),
            meaning=[(method, MEANING[method]) for method in methods], score=score_name(task),
            summary=summary_table(rows, task), prefixes=prefix_table(rows, task), against=against,
            differences=difference_table(rows, against, task) if against else None, unit=Unit.of(task),
            apart=_apart(rows),
            teacher=_score(teacher["test_accuracy"], task) if teacher else None,
            settings=list(settings.items()), recipe=recipe, versions=versions(),
            csv=(output / "compare.csv").read_text(encoding="utf-8"),
        )  # fmt: skip
        write_atomically(output / "report.html", text)
    return output / "report.html"
