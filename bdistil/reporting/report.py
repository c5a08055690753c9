"""The HTML report of a run: one self-contained file with the pictures of its curve."""

from __future__ import annotations

import io
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from bdistil.ensemble.budget import NEVER
from bdistil.ensemble.calibration import Calibration, load_calibration
from bdistil.errors import UserError
from bdistil.metrics.quality import score_name
from bdistil.reporting.axes import COLOURS
from bdistil.reporting.curve_plot import curve_figure, error_figure, plot_curve
from bdistil.reporting.tables import COLUMNS, Curve, TextTable, curve_table
from bdistil.storage.files import write_atomically
from bdistil.storage.run_directory import RunDirectory
from bdistil.utils.drawing import default_style
from bdistil.utils.packages import installed_versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@default_style()
def write_report(run: RunDirectory) -> Path:
    """Writes the HTML report of a run, one self-contained file, and the picture of its curve.

    Args:
        run: run directory with a curve.csv; decisions, configuration and calibration are reported if they exist.

    Returns:
        The path of the report, `run.report`.

    Raises:
        UserError: no round is committed yet.
    """
    if not run.curve.is_file():
        raise UserError(f"No round is committed yet in {run.root}: it has no curve.csv. Run `bdistil fit` on it first.")
    curve, title, score = Curve(run.read_curve(), run.task), run.root.resolve().name, score_name(run.task)
    plot_curve(curve.rows, run.picture, title=f"{title}: {score}", task=run.task)
    pictures = [
        inline_svg(curve_figure(curve, (5.4, 3.8), score), "curve", f"{score} of each prefix by its MACs"),
        inline_svg(error_figure(curve, (5.4, 3.8)), "error", "error to the teacher and margins met, by stage"),
    ]
    calibration = load_calibration(run)
    text = template("report.html").render(
        title=title, score=score, curve=curve, columns=list(COLUMNS), pictures=pictures, colours=list(COLOURS.items()),
        first=curve.stages[0] if curve.stages else {}, last=curve.stages[-1] if curve.stages else {},
        calibration=calibration,
        stages_table=stages_table(calibration) if calibration else None,
        times_table=_times_table(calibration) if calibration else None,
        decisions=_decisions(run, curve), stopped=run.stopped,
        config=run.config.read_text(encoding="utf-8") if run.config.is_file() else "no config.yaml",
        csv=run.curve.read_text(encoding="utf-8"), versions=versions(),
    )  # fmt: skip
    write_atomically(run.report, text)
    return run.report


def curve_summary(run: RunDirectory) -> str:
    """The curve of a run as a table, and the paths of its picture and its report."""
    return f"{curve_table(run.read_curve(), run.task)}\n\n{run.picture}  {run.report}"


def template(name: str) -> Template:
    """Loads an HTML template of this package; undefined variables are errors."""
    loader = PackageLoader("bdistil.reporting", ".")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(name)


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """A figure as inline SVG: without URLs, with ids prefixed by `name` and colours that follow the colour scheme."""
    file = io.StringIO()
    figure.savefig(file, format="svg", facecolor="none")
    text = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->|\sxmlns(:xlink)?="[^"]*"', "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") + 4 :])
    for variable, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{variable})")
    return Markup('<svg role="img" aria-label="{}"').format(description) + Markup(text)


def _decisions(run: RunDirectory, curve: Curve) -> list[tuple[int, list[str]]]:
    """The rejected and the accepted students of each round, by its number."""
    found, done = [], run.committed()
    for number in range(max(done, len(curve.stages)) + 1):
        tries = run.record(number).get("tries", []) if number < done else run.tries(number)
        lines = [f"rejected, {reason}" for reason in tries]
        for row in curve.stages[number : number + 1]:
            lines.append(f"accepted, {row.get('accepted_class') or '–'}: {row.get('reason') or '–'}")
        if lines:
            found.append((number + 1, lines))
    return found


def stages_table(calibration: Calibration) -> TextTable:
    """Temperature, calibration error, exit threshold and weight of each stage, as far as they are fitted."""
    header, exits = ["stage", "temperature"], calibration.exits
    header += ["calibration error before", "after"] if calibration.calibration_error else []
    header += ["threshold", "decided"] if exits else []
    header += ["weight"] if calibration.weights else []
    rows = []
    for number in range(calibration.count):
        row = [str(number + 1), f"{calibration.temperature(number):.3f}"]
        if calibration.calibration_error:
            row += [f"{error:.4f}" for error in calibration.calibration_error[number]]
        if exits:
            threshold = exits.thresholds[number]
            row += ["never" if threshold >= NEVER else f"{threshold:.4f}", f"{exits.decided_share[number]:.1%}"]
        row += [f"{calibration.weights[number]:.3f}"] if calibration.weights else []
        rows.append(row)
    return header, rows


def _times_table(calibration: Calibration) -> TextTable:
    names = list(dict.fromkeys(name for times in calibration.times for name in times.schedules))
    rows = []
    for times in calibration.times:
        seconds = [times.schedules.get(name) for name in names]
        cells = ["–" if s is None else f"{1e3 * s:.3g}" for s in seconds]
        overhead = [f"{1e6 * times.check:.0f}", f"{1e6 * times.compact:.0f}"]
        rows.append([str(times.batch), *cells, times.schedule, *overhead])
    return ["batch", *(f"{name}, ms" for name in names), "used", "exit rule, µs", "compacting, µs"], rows


def versions() -> str:
    """Versions of the packages that the results depend on."""
    found = installed_versions(("bdistil", "torch", "lightning"))
    return ", ".join(f"{name} {version}" for name, version in {**found, "python": platform.python_version()}.items())
