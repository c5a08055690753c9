"""A run at a glance: one self-contained page, with the pictures of its curve."""

from __future__ import annotations

import io
import platform
import re
from collections.abc import Sequence
from html import escape
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

from bdistil.ensemble.budget import NEVER
from bdistil.ensemble.calibration import Calibration, load_calibration
from bdistil.errors import UserError
from bdistil.metrics.quality import score_name
from bdistil.reporting.curve_plot import COLOURS, curve_figure, error_figure, plot_curve
from bdistil.reporting.curve_table import COLUMNS, Row, label, of_task, shown, split
from bdistil.storage.files import write_atomically
from bdistil.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIGHT, DARK = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
STYLE = (
    f":root{{{LIGHT}color-scheme:light dark}}@media screen and (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    + """
*{box-sizing:border-box} figure,h1{margin:0} h1{font-size:1.9rem;line-height:1.2}
h2{margin:2.5rem 0 .8rem;font-size:1.2rem}
body{max-width:76rem;margin:auto;padding:2.5rem 1.25rem 3rem;background:var(--paper);color:var(--ink);
overflow-wrap:anywhere;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
p,small,footer,th{color:var(--muted);font-size:.875rem;font-weight:400} footer{margin-top:3rem}
.cards,.pictures{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));margin-top:1.5rem}
.cards>div{border:1px solid var(--line);border-radius:.6rem;padding:.8rem 1rem} .cards small,.cards b{display:block}
.cards b{font-size:1.7rem;line-height:1.4} data{font-variant-numeric:tabular-nums}
.pictures{grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))} svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto} table{border-collapse:collapse} tr{border-bottom:1px solid var(--line)}
th,td{padding:.4rem .45rem;text-align:right;vertical-align:bottom;font-size:.8rem;overflow-wrap:normal}
td{white-space:nowrap} tr>:first-child{position:sticky;left:0;background:var(--paper);text-align:left}
li{margin:.5rem 0} summary{cursor:pointer}
pre{overflow-x:auto;overflow-wrap:normal;border:1px solid var(--line);border-radius:.6rem;padding:1rem;font-size:.8rem}
@page{size:landscape;margin:12mm}
@media print{body{padding:0;font-size:12px}
h2,footer{margin-top:1rem;break-after:avoid} th,td{font-size:8px;padding:.2rem}
.scroll{overflow:visible} figure,table,.cards>div,li{break-inside:avoid} pre{white-space:pre-wrap}}
"""
)


def _svg(figure: Figure, name: str, told: str) -> str:
    """A figure as markup of the page: no address in it, ids of its own, colours that follow the colour scheme."""
    file = io.StringIO()
    figure.savefig(file, format="svg", facecolor="none")
    text = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->|\sxmlns(:xlink)?="[^"]*"', "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") + 4 :])
    for variable, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{variable})")
    return f'<figure><svg role="img" aria-label="{told}"{text}</figure>'


def _cell(row: Row, column: str) -> str:
    """A figure as people read it; the exact one is its value, and its tooltip."""
    raw = escape(row.get(column) or "")
    return f'<data value="{raw}" title="{raw}">{escape(shown(row, column))}</data>'


def _cards(teacher: Row, stages: Sequence[Row]) -> str:
    first, last = (stages[0], stages[-1]) if stages else ({}, {})
    score = score_name(teacher.get("task", ""))
    cards = [
        ("area under the curve", _cell(last, "area"), f"mean {score} over log MACs, first prefix to last"),
        ("falls", _cell(last, "violations"), "prefixes less accurate than the one before"),
    ]
    for name, row in (("first student", first), (f"ensemble of {len(stages)}", last), ("teacher", teacher)):
        kinds = {"macs": "{} MACs", "share": "{} of the teacher's", "test_accuracy": "test {}"}
        notes = [text.format(_cell(row, column)) for column, text in kinds.items() if row.get(column)]
        cards.insert(0, (name, _cell(row, "val_accuracy"), f"validation {score}<br>" + " · ".join(notes)))
    return "".join(f"<div>{name}<b>{figure}</b><small>{note}</small></div>" for name, figure, note in cards)


def _table(rows: Sequence[Row]) -> str:
    lines = ["".join(f'<th scope="col">{label(column, rows)}</th>' for column in COLUMNS)]
    lines += ["".join(f"<td>{_cell(row, column)}</td>" for column in COLUMNS) for row in rows if row]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0" role="region" aria-label="the curve"><table>{body}</table></div>'


def _decisions(run: RunDirectory, stages: Sequence[Row]) -> str:
    """What was accepted in each round, what was rejected before, and why boosting stopped."""
    lines, done = [], run.committed()
    for number in range(max(done, len(stages)) + 1):
        tries = run.record(number).get("tries", []) if number < done else run.tries(number)
        told = [f"rejected, {reason}" for reason in tries]
        for row in stages[number : number + 1]:
            told.append(f"accepted, {row.get('accepted_class') or '–'}: {row.get('reason') or '–'}")
        lines += [f'<li value="{number + 1}">{"<br>".join(map(escape, told))}</li>'] if told else []
    lines += [f"</ol><b>Stopped:</b> {escape(run.stopped)}<ol>"] if run.stopped else []
    return f"<ol>{''.join(lines)}</ol>"


def write_report(run: RunDirectory) -> Path:
    """Writes the run at a glance, one HTML file that needs nothing beside it, and the picture of its curve.

    Args:
        run: has a curve.csv; its rounds and its configuration are told as far as they are there.

    Returns:
        `run.report`, where the page is.

    Raises:
        UserError: no round is committed yet.
    """
    if not run.curve.is_file():
        raise UserError(f"No round is committed yet in {run.root}: it has no curve.csv. Run `bdistil fit` on it first.")
    rows, title, score = of_task(run.read_curve(), run.task), escape(run.root.resolve().name), score_name(run.task)
    teacher, stages = split(rows)
    plot_curve(rows, run.picture, title=run.root.resolve().name, task=run.task)
    curve = _svg(curve_figure(rows, (5.4, 3.8), score), "curve", f"{score} of each prefix by its MACs")
    error = _svg(error_figure(rows, (5.4, 3.8)), "error", "error to the teacher and margins met, stage by stage")
    config = run.config.read_text(encoding="utf-8") if run.config.is_file() else "no config.yaml"
    found = ((name, [d.version for d in distributions(name=name)]) for name in ("bdistil", "torch", "lightning"))
    versions = ", ".join(f"{name} {(installed or ['not installed'])[0]}" for name, installed in found)
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>
<div class="cards">{_cards(teacher, stages)}</div><div class="pictures">{curve}{error}</div>
<h2>Prefix by prefix</h2>{_table([teacher, *stages])}
<p>MACs and parameters are those of the whole prefix; links, activations, latency, margins, training and time those of
its last student. Errors are those of the prefix to the teacher's logits. The exact value of a cell is its tooltip.</p>
{anytime_section(load_calibration(run))}
<h2>Decisions</h2>{_decisions(run, stages)}
<h2>Behind the figures</h2><details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>
<details><summary>curve.csv</summary><pre>{escape(run.curve.read_text(encoding="utf-8"))}</pre></details>
<footer>Written with {versions}, python {platform.python_version()}.</footer></body></html>
"""
    write_atomically(run.report, page)
    return run.report


def anytime_section(figures: Calibration | None) -> str:
    """A heading, tables and two sentences as HTML; nothing where nothing was fitted.

    Args:
        figures: of the run.
    """
    if figures is None:
        return ""
    return f"<h2>Stopping early</h2>{_exits_told(figures)}{_stages_table(figures)}{_times_table(figures)}"


def _figures_table(head: list[str], rows: list[list[str]], told: str) -> str:
    lines = ["".join(f'<th scope="col">{escape(name)}</th>' for name in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{told}"><table>{body}</table></div>'


def _exits_told(figures: Calibration) -> str:
    exits = figures.exits
    if exits is None:
        return ""
    return (
        f"<p>Exit rule {escape(exits.rule)}, fitted on the validation part to {escape(exits.target)}: accuracy "
        f"{exits.accuracy:.2%} of {exits.full_accuracy:.2%} with {exits.average_macs:,.0f} MACs on average. Thresholds "
        f"fitted on one half and used on the other lose {exits.held_out_loss:.2f} points: expect that on new samples."
        "</p>"
    )


def _stages_table(figures: Calibration) -> str:
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
    return _figures_table(head + (["weight"] if figures.weights else []), rows, "exits and calibration of each stage")


def _times_table(figures: Calibration) -> str:
    if not figures.times:
        return ""
    names = list(dict.fromkeys(name for times in figures.times for name in times.schedules))
    rows = []
    for times in figures.times:
        seconds = [times.schedules.get(name) for name in names]
        cells = ["–" if s is None else f"{1e3 * s:.3g}" for s in seconds]
        overhead = [f"{1e6 * times.check:.0f}", f"{1e6 * times.compact:.0f}"]
        rows.append([str(times.batch), *cells, times.schedule, *overhead])
    head = ["batch", *(f"{name}, ms" for name in names), "taken", "asking the rule, µs", "leaving the batch, µs"]
    note = (
        f"<p>All stages on {escape(figures.device)} by schedule: one after the other, or all bodies "
        "together. Leaving the batch is done where the stages to come save more.</p>"
    )
    return _figures_table(head, rows, "measured times") + note
