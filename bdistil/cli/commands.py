"""The commands on finished runs: the signature and docstring of each function define its command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
from bdistil.reporting.report import curve_summary, write_report
from bdistil.storage.run_directory import RunDirectory
from bdistil.utils.paths import user_path

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
    """Measure accuracy, cost and latency of a run's ensemble under a budget, or under a sweep of budgets.

    Args:
        run_dir: run directory; its config.yaml defines the data.
        budget: limits; without any, all students run.
        part: part of the data.
        sweep: limit to vary over its range; the other limits are those of `budget`.
        batch_size: samples per batch for the second latency, and for all figures within seconds; the first latency is
            measured on single samples.
        csv: file to write the results to.
        picture: PNG file to draw accuracy against the MACs up to the answer to.
        as_json: print one JSON object; for a sweep, a list of them.
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
    if as_json:
        print(json.dumps(beside if sweep else rows[0]))
    elif sweep:
        print(table(beside))
    else:
        _print_one(rows[0])
    if csv is not None:
        write_csv(beside, user_path(csv, "csv"))
    if picture is not None:
        write_picture(beside, user_path(picture, "picture"), run.root.resolve().name, sweep)


def _print_one(figures: Mapping[str, Any]) -> None:
    for key, value in figures.items():
        print(f"{key:<18} {value:,}" if isinstance(value, int) else f"{key:<18} {value}")


def calibrate(
    run_dir: str,
    rule: Rule = "max_prob",
    max_loss: float | None = None,
    average_macs: float | None = None,
    delta: float | Literal["none"] | None = None,
    weights: bool = False,
    as_json: bool = False,
) -> None:
    """Fit temperatures and exit thresholds on the validation part of a run, and time its stages on this machine.

    Args:
        run_dir: run directory; its config.yaml defines the data.
        rule: confidence score of the exits.
        max_loss: percentage points of accuracy that early exits may cost; 1 by default.
        average_macs: average number of multiply-adds per sample, a target instead of `max_loss`.
        delta: probability with which new samples may lose more than `max_loss`, 0.1 by default; `none` is the naive
            fit, which keeps to `max_loss` on the validation part only.
        weights: fit weights of the students too, and keep them if they are better on held-out halves.
        as_json: print one JSON object.
    """
    target, run = ExitTarget(rule, max_loss, average_macs, delta), RunDirectory(run_dir)
    ensemble = ProgressiveEnsemble.load(run_dir, calibration=False)
    figures = fit_anytime(ensemble, loader_of(run, "val"), target, weights=weights)
    save_calibration(run, figures)
    write_report(run)
    print(json.dumps(figures.to_dict()) if as_json else format_calibration(figures, ensemble.macs))


def profile(run_dir: str, batch_size: int = 1, as_json: bool = False) -> None:
    """Measure the cost of each stage of a run's ensemble: MACs, parameters, bytes, latency.

    Args:
        run_dir: run directory.
        batch_size: samples per batch, for the latency and the activation bytes.
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
    """Export the ensemble of a run: one graph for each stage, a manifest and, for onnx, a runner without torch.

    Args:
        run_dir: run directory.
        output: folder to create.
        format: onnx runs with onnxruntime and numpy alone; torch writes .pt2 files; executorch a program for devices.
        normalisation: inside puts the normalisation of the data into the graphs, which then read raw samples.
        quantise: int8 weights; static takes ranges from training samples, dynamic from each batch, so that answers
            depend on the other samples of the batch. Prints accuracies in int8 and in float.
        fuse: all adds one graph of all stages, exits one with early exits; the runner uses it if it was faster here.
        overwrite: replace an older export.
    """
    options = ExportOptions(format, normalisation, quantise, fuse, overwrite)
    folder = user_path(output, "output")
    print(export_summary(export_run(RunDirectory(run_dir), folder, options), folder))


def report(run_dir: str) -> None:
    """Write curve.png and report.html of a run, and print its curve.

    Args:
        run_dir: run directory.
    """
    run = RunDirectory(run_dir)
    write_report(run)
    print(curve_summary(run))


def list_recipes() -> None:
    """List the shipped recipes and SLURM scripts."""
    for name, path in recipes().items():
        print(f"{name:<24} {summary(path)}")
    print("\nSLURM scripts: sbatch FILE --config NAME")
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
    "calibrate": "bdistil calibrate --run_dir runs/digits --max_loss 1.0 --delta 0.1",
    "profile": "bdistil profile --run_dir runs/digits --batch_size 64",
    "export": "bdistil export --run_dir runs/digits --output digits-onnx",
    "report": "bdistil report --run_dir runs/digits",
    "recipes": "bdistil recipes",
}
