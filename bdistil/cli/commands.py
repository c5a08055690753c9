"""The commands on a finished run: signature and docstring of a function are its command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from bdistil.cli.recipe_files import jobs, recipes, summary
from bdistil.ensemble.budget import Budget, Rule
from bdistil.ensemble.calibration import load_calibration, save_calibration
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.evaluation.calibrate import fit_anytime, format_calibration
from bdistil.evaluation.evaluate import Sweep, evaluate_budgets, profile_run, sweep_budgets
from bdistil.evaluation.run_data import Split, loader_of
from bdistil.evaluation.tables import reference_row, table, write_csv, write_picture
from bdistil.evaluation.thresholds import ExitTarget
from bdistil.export.run import ExportOptions, export_run, export_summary
from bdistil.reporting.report import write_report
from bdistil.reporting.tables import curve_table
from bdistil.storage.run_directory import RunDirectory

NO_LIMITS = Budget()


def evaluate(
    run_dir: str,
    budget: Budget = NO_LIMITS,
    part: Split = "test",
    sweep: Sweep | None = None,
    batch_size: int = 256,
    csv: str | None = None,
    picture: str | None = None,
    as_json: bool = False,
) -> None:
    """Accuracy, cost and latency of a run's ensemble within a budget, or within each of a sweep.

    Args:
        run_dir: the run directory; its config.yaml names the data.
        budget: limits; none runs all students.
        part: which part of the data.
        sweep: vary this limit over its range; the others are those of `budget`.
        batch_size: of the second latency; the first is of single samples.
        csv: write the figures to this file.
        picture: draw accuracy against average MACs to this PNG.
        as_json: print one JSON object, for a sweep a list of them.
    """
    if sweep != "confidence":
        budget.check_rule()
    run = RunDirectory(run_dir)
    budgets = [budget]
    if sweep is not None:
        macs = ProgressiveEnsemble.load(run_dir).macs
        budgets = sweep_budgets(sweep, budget, macs, load_calibration(run), batch_size)
    rows = evaluate_budgets(run, budgets, part, batch_size)
    teacher = reference_row(run, part)
    beside = [*([teacher] if teacher else []), *rows]
    if csv is not None:
        write_csv(beside, Path(csv))
    if picture is not None:
        write_picture(beside, Path(picture), run.root.resolve().name)
    if as_json:
        print(json.dumps(beside if sweep else rows[0]))
    elif sweep:
        print(table(beside))
    else:
        _print_one(rows[0])


def _print_one(figures: Mapping[str, Any]) -> None:
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
        rule: how confidence is read.
        max_loss: points of accuracy that the exits may lose; 0.2 where nothing is said.
        average_macs: multiply-adds that a sample may cost on average, instead of `max_loss`.
        weights: let the students of a prefix weigh differently, where that wins on held-out halves.
        as_json: print one JSON object.
    """
    target, run = ExitTarget(rule, max_loss, average_macs), RunDirectory(run_dir)
    ensemble = ProgressiveEnsemble.load(run_dir, calibration=False)
    figures = fit_anytime(ensemble, loader_of(run, "val"), target, weights=weights)
    save_calibration(run, figures)
    write_report(run)
    print(json.dumps(figures.to_dict()) if as_json else format_calibration(figures, ensemble.macs))


def profile(run_dir: str, batch_size: int = 1, as_json: bool = False) -> None:
    """Costs of each stage of a run's ensemble: MACs, parameters, bytes, latency.

    Args:
        run_dir: the run directory.
        batch_size: samples a call, for the latency and the activation bytes.
        as_json: print one JSON list.
    """
    rows = profile_run(RunDirectory(run_dir), batch_size)
    print(json.dumps(rows) if as_json else table(rows))


def export(
    run_dir: str,
    output: str,
    format: Literal["onnx", "torch", "executorch"] = "onnx",
    normalisation: Literal["declared", "inside"] = "declared",
    quantise: Literal["dynamic", "static"] | None = None,
    fuse: Literal["all", "exits"] | None = None,
    overwrite: bool = False,
) -> None:
    """Write one graph a stage and a manifest; for onnx a runner that needs no torch.

    Args:
        run_dir: the run directory.
        output: a new folder.
        format: onnx runs with onnxruntime and numpy alone; torch writes .pt2 files; executorch a program for devices.
        normalisation: inside puts the normalisation of the data into the graphs, which then read raw samples.
        quantise: int8 weights; static takes ranges from training samples. Accuracies are printed beside float.
        fuse: all adds one graph of all stages, exits one with early exits; the runner uses it if it was faster here.
        overwrite: replace an older export.
    """
    options = ExportOptions(format, normalisation, quantise, fuse, overwrite)
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
EXAMPLES = {
    "evaluate": "bdistil evaluate --run_dir runs/digits --budget.macs 50000",
    "calibrate": "bdistil calibrate --run_dir runs/digits --max_loss 0.5",
    "profile": "bdistil profile --run_dir runs/digits --batch_size 64",
    "export": "bdistil export --run_dir runs/digits --output digits-onnx",
    "report": "bdistil report --run_dir runs/digits",
    "recipes": "bdistil recipes",
}
