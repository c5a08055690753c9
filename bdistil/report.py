"""A run at a glance: accuracy against cost as a picture, as a table for the terminal, and one self-contained page."""

from __future__ import annotations

import io
import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from html import escape
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdistil.disk import write_atomically
from bdistil.errors import UserError
from bdistil.report_anytime import anytime_section
from bdistil.run_directory import RunDirectory
from bdistil.units import loss_name, score_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Row = Mapping[str, str]
Points = list[tuple[float, float]]
# Name: on light paper, on dark. Blue and vermilion of Okabe and Ito are apart for every kind of colour vision.
COLOURS = {
    "blue": ("#0072b2", "#56b4e9"), "orange": ("#d55e00", "#f0a04b"), "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9aa4ae"), "line": ("#d8dee4", "#2f363d"), "paper": ("#ffffff", "#0d1117"),
}  # fmt: skip
BLUE, ORANGE, INK, MUTED, LINE, PAPER = (light for light, _ in COLOURS.values())


def _number(row: Row, column: str) -> float | None:
    try:
        value = float(row.get(column) or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _short(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.4g}P"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 59.5 else str(timedelta(seconds=round(seconds)))


_percent, _plain = "{:.2%}".format, "{:.4g}".format
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "stage": ("stage", _plain), "macs": ("MACs", _short), "share": ("of teacher", "{:.1%}".format),
    "link_macs": ("link MACs", _short), "params": ("params", _short), "activation_bytes": ("activation bytes", _short),
    "latency_ms": ("latency ms", _plain), "val_accuracy": ("val accuracy", _percent), "val_loss": ("val loss", _plain),
    "test_accuracy": ("test accuracy", _percent), "rms_error": ("rms error", _plain),
    "sup_error": ("sup error", _plain), "margin_share": ("margins met", "{:.0%}".format),
    "margin_min": ("least margin", _plain), "area": ("area", _plain), "violations": ("falls", _plain),
    "train_macs": ("training MACs", _short), "seconds": ("time", _duration), "accepted_class": ("class", _plain),
}  # fmt: skip


def _shown(row: Row, column: str, empty: str = "–") -> str:
    value = _number(row, column)
    if value is None:
        return row.get(column) or empty
    real = row.get("task") == "regression" and column.endswith("accuracy")  # R² is no share
    return f"{value:.3f}" if real else COLUMNS[column][1](value)


def _of_task(rows: Sequence[Row], task: str) -> list[Row]:
    """The rows of curve.csv, each of which also says what its run answers: classes, or real outputs."""
    return [{**row, "task": task} for row in rows]


def _label(column: str, rows: Sequence[Row]) -> str:
    """What stands over a column; those named accuracy hold R² of real outputs."""
    task = rows[0].get("task", "") if rows else ""
    label = COLUMNS[column][0].replace("accuracy", score_name(task))
    return label.replace("loss", loss_name(task))


def _split(rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    """The teacher's row, and the rows of the prefixes, each with its share of the teacher's MACs."""
    teacher: Row = next((row for row in rows if row["stage"] == "teacher"), {})
    whole = _number(teacher, "macs") or math.inf
    stages = [row for row in rows if row["stage"] != "teacher"]
    return teacher, [{**row, "share": str((_number(row, "macs") or 0.0) / whole or "")} for row in stages]


def curve_table(rows: Sequence[Row], task: str = "classification") -> str:
    """The curve for the terminal: aligned, at most 100 columns wide.

    Args:
        rows: the rows of curve.csv, the teacher first; any cell may be empty.
        task: of the run.
    """
    rows = _of_task(rows, task)
    names = (
        "stage", "macs", "share", "params", "val_accuracy", "test_accuracy", "rms_error", "seconds", "accepted_class",
    )  # fmt: skip
    teacher, stages = _split(rows)
    lines = [[_label(name, rows).replace("accuracy", "acc.") for name in names]]
    lines += [[_shown(row, name, "-") for name in names] for row in (teacher, *stages) if row]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = min(widths[-1], 100 - sum(widths[:-1]) - 2 * (len(names) - 1))
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join([*map(str.rjust, line[:-1], widths), line[-1][: widths[-1]]]) for line in lines)


# ---- pictures


def _points(rows: Sequence[Row], x: str, y: str) -> Points:
    """What can be drawn of two columns, on axes that have no zero."""
    pairs = ((_number(row, x), _number(row, y)) for row in rows)
    return [(a, b) for a, b in pairs if a is not None and b is not None and a > 0]


def _figure(width: float, height: float, panels: Mapping[str, int]) -> tuple[Figure, list[Axes]]:
    """A figure of panels one over the other, by title and share of the height, for the Agg and SVG canvases."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure((width, height), facecolor=PAPER, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=list(panels.values()))[:, 0]
    for axes, title in zip(all_axes, panels, strict=True):
        axes.set(facecolor="none", axisbelow=True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.grid(color=LINE, linewidth=0.7)
        axes.tick_params(which="both", colors=MUTED, labelsize=9, length=0)
        axes.set_title(title, color=INK, fontsize=10.5, loc="left", parse_math=False)
    return figure, list(all_axes)


def _log_ticks(axis: Axis, steps: Sequence[int], label: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def _draw(axes: Axes, points: Points, style: str, colour: str, size: float = 5.5) -> None:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, style, color=colour, linewidth=1.8, markersize=size, markeredgecolor=PAPER)


def _say(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], colour: str, **kw: Any) -> None:
    """Text beside a point, on a halo, so that no line strikes it out."""
    from matplotlib.patheffects import withStroke

    kw = {"fontsize": 9.5, "weight": "bold", "path_effects": [withStroke(linewidth=3, foreground=PAPER)], **kw}
    axes.annotate(text, at, offset, textcoords="offset points", color=colour, in_layout=False, **kw)


def _cost_axis(axes: Axes, costs: Sequence[float], last: float) -> None:
    """A logarithmic axis of MACs with room for names to the right of the last prefix."""
    low, high = math.log10(min(costs)), math.log10(max(costs))
    pad, room = 0.06 * (high - low) + max(0.0, 0.25 - (high - low) / 2), 0.3
    low, high = low - pad, max(high + pad, (math.log10(last) - room * (low - pad)) / (1 - room))
    axes.set(xscale="log", xlim=(10**low, 10**high))
    axes.set_xlabel("multiply-adds of one prediction (MACs)", color=MUTED, fontsize=9.5)
    _log_ticks(axes.xaxis, (1, 2, 5) if high - low < 3 else (1,), _short)


def _number_stages(axes: Axes, stages: Sequence[Row]) -> None:
    """The number of a prefix over its marks, from the last one backwards; those that would touch are left out."""
    low, high = axes.get_xlim()
    limit = math.inf
    for row in reversed(stages):
        for macs, top in sorted(_points([row], "macs", "val_accuracy") + _points([row], "macs", "test_accuracy"))[-1:]:
            if macs < limit:
                _say(axes, row["stage"], (macs, top), (-3, 5), MUTED, fontsize=8.5, ha="right", weight="normal")
                limit = macs / (high / low) ** 0.03


def _curve_figure(rows: Sequence[Row], size: tuple[float, float], title: str = "") -> Figure:
    from matplotlib.ticker import PercentFormatter

    (teacher, stages), (figure, (axes,)) = _split(rows), _figure(*size, {title: 1})
    validation, test = (_points(stages, "macs", f"{part}_accuracy") for part in ("val", "test"))
    goal = _number(teacher, "val_accuracy") or _number(teacher, "test_accuracy")
    star = [(macs, goal)] if goal and (macs := _number(teacher, "macs")) else []
    points = validation + test or star or [(1.0, 1.0)]
    heights = [y for _, y in points] + ([goal] if goal else [])
    span = max(max(heights) - min(heights), 0.02)
    axes.set_ylim(min(heights) - 0.12 * span, max(heights) + 0.14 * span)
    real = bool(rows) and rows[0].get("task") == "regression"
    show: Callable[[float], str] = "{:.3f}".format if real else "{:.1%}".format
    if not real:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    _cost_axis(axes, [x for x, _ in points + star], max(points)[0])
    curves = [c for c in ((validation, "o-", BLUE, "validation"), (test, "s--", ORANGE, "test")) if c[0]]
    beaten = bool(goal and curves) and max(points[-1][1] for points, *_ in curves) > (goal or 0.0)
    below = goal if goal and not beaten else math.inf
    for points, style, colour, name in sorted(curves, key=lambda curve: -curve[0][-1][1]):
        macs, accuracy = points[-1]
        below = min(accuracy, below - 0.075 * span)  # the names stand under one another and under the teacher's line
        _draw(axes, points, style, colour)
        _say(axes, f"{name} {show(accuracy)}", (macs, below), (9, 0), colour, va="center")
    _number_stages(axes, stages)
    if goal:
        axes.axhline(goal, color=INK, linewidth=1, linestyle=":")
        _draw(axes, star, "*", INK, 13)
        text = f"teacher {show(goal)}" + (f", {_shown(teacher, 'macs')} MACs" if star else "")
        place = {"ha": "left" if beaten else "right", "xycoords": axes.get_yaxis_transform()}
        _say(axes, text, (0.01 if beaten else 0.99, goal), (0, 7), INK, **place)
    return figure


def _error_figure(rows: Sequence[Row], size: tuple[float, float]) -> Figure:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, (errors, shares) = _figure(*size, {"error to the teacher": 2, "outputs that meet their margin": 1})
    stages = _split(rows)[1]
    for column, name, style, colour in (("sup_error", "largest", "s--", ORANGE), ("rms_error", "rms", "o-", BLUE)):
        points = [(x, y) for x, y in _points(stages, "stage", column) if y > 0]
        _draw(errors, points, style, colour)
        for first in points[:1]:
            _say(errors, f"{name} {first[1]:.3g} → {points[-1][1]:.3g}", first, (2, 8), colour)
    errors.set_yscale("log")
    errors.margins(y=0.2)
    _log_ticks(errors.yaxis, (1, 2, 5), _plain)
    for stage, share in _points(stages, "stage", "margin_share"):
        shares.bar(stage, share, width=0.4, color=BLUE)
    shares.set_ylim(0, 1)
    shares.set_xlabel("stage", color=MUTED, fontsize=9.5)
    shares.yaxis.set_major_formatter(PercentFormatter(1))
    shares.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def plot_curve(rows: Sequence[Row], path: Path, *, title: str = "", task: str = "classification") -> None:
    """Draws accuracy against the cumulative MACs of every prefix, with the teacher: a PNG of 1080 x 630 pixels.

    Args:
        rows: the rows of curve.csv, the teacher first; any cell may be empty.
        path: the PNG; written beside and renamed, so that a reader never sees half of it.
        title: over the picture.
        task: of the run.
    """
    rows = _of_task(rows, task)
    beside = path.with_name(f".{path.name}.tmp")
    _curve_figure(rows, (7.2, 4.2), title).savefig(beside, format="png", dpi=150)
    os.replace(beside, path)


# ---- the page

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
    return f'<data value="{raw}" title="{raw}">{escape(_shown(row, column))}</data>'


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
    lines = ["".join(f'<th scope="col">{_label(column, rows)}</th>' for column in COLUMNS)]
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
    rows, title, score = _of_task(run.read_curve(), run.task), escape(run.root.resolve().name), score_name(run.task)
    teacher, stages = _split(rows)
    plot_curve(rows, run.picture, title=run.root.resolve().name, task=run.task)
    curve = _svg(_curve_figure(rows, (5.4, 3.8), score), "curve", f"{score} of each prefix by its MACs")
    error = _svg(_error_figure(rows, (5.4, 3.8)), "error", "error to the teacher and margins met, stage by stage")
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
{anytime_section(run.anytime_figures())}
<h2>Decisions</h2>{_decisions(run, stages)}
<h2>Behind the figures</h2><details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>
<details><summary>curve.csv</summary><pre>{escape(run.curve.read_text(encoding="utf-8"))}</pre></details>
<footer>Written with {versions}, python {platform.python_version()}.</footer></body></html>
"""
    write_atomically(run.report, page)
    return run.report
