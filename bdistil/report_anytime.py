"""The part of the report that tells what was fitted and measured for stopping early."""

from __future__ import annotations

from html import escape

from bdistil.ensemble.calibration import AnytimeFigures
from bdistil.ensemble.exit_rules import NEVER


def anytime_section(figures: AnytimeFigures | None) -> str:
    """A heading, tables and two sentences as HTML; nothing where nothing was fitted.

    Args:
        figures: of the run.
    """
    if figures is None:
        return ""
    return f"<h2>Stopping early</h2>{_exits_told(figures)}{_stages_table(figures)}{_times_table(figures)}"


def _table(head: list[str], rows: list[list[str]], told: str) -> str:
    lines = ["".join(f'<th scope="col">{escape(name)}</th>' for name in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{told}"><table>{body}</table></div>'


def _exits_told(figures: AnytimeFigures) -> str:
    exits = figures.exits
    if exits is None:
        return ""
    return (
        f"<p>Exit rule {escape(exits.rule)}, fitted on the validation part to {escape(exits.target)}: accuracy "
        f"{exits.accuracy:.2%} of {exits.full_accuracy:.2%} with {exits.average_macs:,.0f} MACs on average. Thresholds "
        f"fitted on one half and used on the other lose {exits.held_out_loss:.2f} points: expect that on new samples."
        "</p>"
    )


def _stages_table(figures: AnytimeFigures) -> str:
    rows = []
    for number in range(figures.count):
        row = [str(number + 1)]
        if figures.calibration_error:
            before, after = figures.calibration_error[number]
            row += [f"{figures.temperature(number):.3f}", f"{before:.4f}", f"{after:.4f}"]
        if figures.exits:
            threshold = figures.exits.thresholds[number]
            row += ["never" if threshold >= NEVER else f"{threshold:.4f}", f"{figures.exits.decided_share[number]:.1%}"]
        row += [f"{figures.weights[number]:.3f}"] if figures.weights else []
        rows.append(row)
    head = ["stage"]
    head += ["temperature", "calibration error before", "after"] if figures.calibration_error else []
    head += ["threshold", "decided"] if figures.exits else []
    return _table(head + (["weight"] if figures.weights else []), rows, "exits and calibration of each stage")


def _times_table(figures: AnytimeFigures) -> str:
    if not figures.times:
        return ""
    names = sorted({name for times in figures.times for name in times.schedules}, key=["one", "pairs", "all"].index)
    rows = []
    for times in figures.times:
        seconds = [times.schedules.get(name) for name in names]
        cells = ["–" if s is None else f"{1e3 * s:.3g}" for s in seconds]
        overhead = [f"{1e6 * times.check:.0f}", f"{1e6 * times.compact:.0f}"]
        rows.append([str(times.batch), *cells, times.schedule, *overhead])
    head = ["batch", *(f"{name}, ms" for name in names), "taken", "asking the rule, µs", "leaving the batch, µs"]
    note = (
        f"<p>All stages on {escape(figures.device)} by schedule: one after the other, bodies in pairs, all bodies "
        "together. Leaving the batch is done where the stages to come save more.</p>"
    )
    return _table(head, rows, "measured times") + note
