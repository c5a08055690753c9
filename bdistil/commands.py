"""The commands on a finished run: signature and docstring of a function are its command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from bdistil.anytime_fit import ExitTarget, fit_anytime, told
from bdistil.budgets import Budget
from bdistil.ensemble import ProgressiveEnsemble
from bdistil.evaluation import evaluate_run, profile_run
from bdistil.exit_rules import Rule
from bdistil.export import ExportOptions, export_run, export_summary
from bdistil.recipe_files import jobs, recipes, summary
from bdistil.report import curve_table, write_report
from bdistil.run_data import loader_of
from bdistil.run_directory import RunDirectory

NO_LIMITS = Budget()


def evaluate(
    run_dir: str,
    budget: Budget = NO_LIMITS,
    part: Literal["test", "val"] = "test",
    as_json: bool = False,
) -> None:
    """Accuracy and cost of a run's ensemble within a budget.

    Args:
        run_dir: the run directory; its config.yaml names the data.
        budget: limits; none runs all students.
        part: which part of the data.
        as_json: print one JSON object.
    """
    figures = evaluate_run(RunDirectory(run_dir), budget, part)
    if as_json:
        print(json.dumps(figures))
        return
    for key, value in figures.items():
        print(f"{key:<18} {value:,}" if isinstance(value, int) else f"{key:<18} {value}")


def calibrate(
    run_dir: str,
    rule: Rule = "max_prob",
    max_loss: float | None = None,
    average_macs: float | None = None,
    weights: bool = False,
    as_json: bool = False,
) -> None:
    """Fit temperatures and exit thresholds of a run on its validation part, and measure its stages here.

    Args:
        run_dir: the run directory; its config.yaml names the data.
        rule: how sureness is read.
        max_loss: points of accuracy that the exits may lose; 0.2 where nothing is said.
        average_macs: multiply-adds that a sample may cost on average, instead of `max_loss`.
        weights: let the students of a prefix weigh differently, where that wins on held-out halves.
        as_json: print one JSON object.
    """
    target, run = ExitTarget(rule, max_loss, average_macs), RunDirectory(run_dir)
    ensemble = ProgressiveEnsemble.load(run_dir, figures=False)
    figures = fit_anytime(ensemble, loader_of(run, "val"), target, weights=weights)
    run.keep_anytime(figures)
    write_report(run)
    print(json.dumps(figures.plain()) if as_json else told(figures, ensemble.macs))


def profile(run_dir: str, batch_size: int = 1, as_json: bool = False) -> None:
    """Costs of each stage of a run's ensemble: MACs, parameters, bytes, latency.

    Args:
        run_dir: the run directory.
        batch_size: samples a call, for the latency and the activation bytes.
        as_json: print one JSON list.
    """
    rows = profile_run(RunDirectory(run_dir), batch_size)
    if as_json:
        print(json.dumps(rows))
        return
    widths = {
        key: max(len(key), *(len(f"{row[key]:,}" if isinstance(row[key], int) else str(row[key])) for row in rows))
        for key in rows[0]
    }
    print("  ".join(f"{key:>{widths[key]}}" for key in rows[0]))
    for row in rows:
        cells = (f"{v:,}" if isinstance(v, int) else str(v) for v in row.values())
        print("  ".join(f"{cell:>{widths[key]}}" for cell, key in zip(cells, row, strict=True)))


def export(
    run_dir: str,
    output: str,
    format: Literal["onnx", "torch"] = "onnx",
    normalisation: Literal["declared", "inside"] = "declared",
    overwrite: bool = False,
) -> None:
    """Write one graph a stage and a manifest; for onnx a runner that needs no torch.

    Args:
        run_dir: the run directory.
        output: a new folder.
        format: onnx runs with onnxruntime and numpy alone; torch writes the .pt2 files of torch.export.
        normalisation: inside puts the normalisation of the data into the graphs, which then read raw samples.
        overwrite: replace an older export.
    """
    options = ExportOptions(format, normalisation, overwrite=overwrite)
    print(export_summary(export_run(RunDirectory(run_dir), Path(output), options), Path(output)))


def report(run_dir: str) -> None:
    """Write curve.png and report.html of a run again, and print its curve.

    Args:
        run_dir: the run directory.
    """
    run = RunDirectory(run_dir)
    write_report(run)
    say_end(run)


def say_end(run: RunDirectory) -> None:
    """Prints the curve of a run as a table, and where its picture and its report are."""
    print(curve_table(run.read_curve(), run.task))
    print(f"\n{run.picture}  {run.report}")


def list_recipes() -> None:
    """List the shipped recipes."""
    for name, path in recipes().items():
        print(f"{name:<24} {summary(path)}")
    print("\nJobs for SLURM: sbatch FILE --config NAME")
    for path in jobs():
        print(path)


COMMANDS: dict[str, Callable[..., None]] = {
    "evaluate": evaluate,
    "calibrate": calibrate,
    "profile": profile,
    "export": export,
    "report": report,
    "recipes": list_recipes,
}
