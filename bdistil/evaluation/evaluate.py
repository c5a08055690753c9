"""What a finished run is worth within a budget, or within each of a sweep: accuracy, cost, latency."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bdistil.ensemble.budget import Budget
from bdistil.ensemble.calibration import Calibration
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.evaluation.early import early_figures
from bdistil.evaluation.run_data import first_samples, loader_of
from bdistil.metrics.quality import PrefixErrors
from bdistil.storage.run_directory import RunDirectory

Part = Literal["test", "val"]
Sweep = Literal["stages", "macs", "seconds", "confidence"]
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
DEADLINES = 6
SINGLES, BATCHES = 100, 30  # calls that are timed


def evaluate_budgets(
    run: RunDirectory, budgets: Sequence[Budget], part: Part = "test", batch_size: int = 256
) -> list[dict[str, Any]]:
    """Accuracy, average cost, latency and the share of samples decided at each stage, for each of some budgets.

    Students that read segments of a sequence also get the figures of early classification (`bdistil.evaluation.early`).

    Args:
        run: a run of a recipe.
        budgets: limits.
        part: of the data.
        batch_size: of the second latency; the first is of single samples.

    Raises:
        UserError: `batch_size` < 1, or the run is not one of a recipe.
    """
    if batch_size < 1:
        raise UserError(f"Expected `batch_size` to be >= 1, got {batch_size}.")
    ensemble, loader = ProgressiveEnsemble.load(run.root), loader_of(run, part)
    x = first_samples(loader, max(SINGLES, batch_size))
    singles = list(x[:SINGLES].split(1))
    batch = x[torch.arange(batch_size) % len(x)]
    rows = []
    classes = ensemble.task != "regression"
    quality = _quality if classes else evaluate_outputs
    early = early_figures(ensemble, loader, budgets[0].confidence) if classes and len(budgets) == 1 else {}
    for budget in budgets:
        row = {"budget": budget_text(budget), "part": part, **quality(ensemble, loader, budget)}
        row |= _latency(ensemble, singles, budget, "single") | _latency(ensemble, [batch] * BATCHES, budget, "batch")
        rows.append({**row, "batch_size": batch_size, **early})
    return rows


def budget_text(budget: Budget) -> str:
    """The limits of a budget in short: ``stages=2 confidence=0.9``."""
    given = {key: value for key, value in asdict(budget).items() if value is not None}
    texts = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in given.items())
    return " ".join(texts) or "none"


def _quality(ensemble: ProgressiveEnsemble, loader: Iterable[Any], budget: Budget) -> dict[str, Any]:
    right, macs, samples, decided = 0, 0, 0, torch.zeros(len(ensemble) + 1, dtype=torch.int64)
    started = time.perf_counter()
    for x, y in loader:
        prediction = ensemble.predict(x, budget)
        right += int((prediction.logits.argmax(-1) == y).sum())
        macs += int(prediction.macs.sum())
        samples += len(y)
        decided += prediction.stages.bincount(minlength=len(ensemble) + 1)
    return {
        "samples": samples,
        "accuracy": round(right / samples, 6),
        "average_macs": round(macs / samples),
        "all_stages_macs": ensemble.macs[-1],
        "decided_share": [round(float(d) / samples, 4) for d in decided[1:]],
        "seconds": round(time.perf_counter() - started, 3),
    }


def evaluate_outputs(ensemble: ProgressiveEnsemble, loader: Any, budget: Budget) -> dict[str, Any]:
    """R², rms error on the labels and average cost of an ensemble of real outputs within a budget.

    Args:
        ensemble: of a regression.
        loader: yields (x, y).
        budget: limits, without confidence.
    """
    scores, macs, samples, started = None, 0, 0, time.perf_counter()
    for x, y in loader:
        prediction = ensemble.predict(x, budget)
        scores = scores or PrefixErrors(outputs=prediction.logits.shape[-1])
        scores.update(prediction.logits[None], y)
        macs, samples = macs + int(prediction.macs.sum()), samples + len(y)
    if scores is None:
        raise UserError("Expected the part to hold samples, got none.")
    r2, rms = (round(float(figure), 6) for figure in scores.compute())
    return {
        "samples": samples,
        "r2": r2,
        "rms": rms,
        "average_macs": round(macs / samples),
        "all_stages_macs": ensemble.macs[-1],
        "seconds": round(time.perf_counter() - started, 3),
    }


def _latency(ensemble: ProgressiveEnsemble, calls: Sequence[Tensor], budget: Budget, name: str) -> dict[str, float]:
    """Median and 95th percentile of the milliseconds of a call, after one that is not counted."""
    ensemble.predict(calls[0], budget)
    milliseconds = []
    for x in calls:
        started = time.perf_counter()
        ensemble.predict(x, budget)
        milliseconds.append(1e3 * (time.perf_counter() - started))
    p50, p95 = torch.tensor(milliseconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95]).double()).tolist()
    return {f"{name}_ms_p50": round(p50, 4), f"{name}_ms_p95": round(p95, 4)}


def sweep_budgets(
    sweep: Sweep, budget: Budget, macs: Sequence[int], figures: Calibration | None, batch_size: int
) -> list[Budget]:
    """Budgets that differ in one limit; the other limits are those of `budget`.

    Stages from 1 to all, the MACs of each prefix, six deadlines from the first stage to all of them by the measured
    times, or confidences from 0.5 to 0.99.

    Args:
        sweep: the limit.
        budget: the other limits.
        macs: cumulative, one number a stage.
        figures: measured times, for deadlines.
        batch_size: that the deadlines are for.

    Raises:
        UserError: the budget fixes that limit itself, or deadlines are asked for and no times were measured.
    """
    if getattr(budget, sweep) is not None:
        raise UserError(
            f"`budget.{sweep}` is what `sweep` is to vary, got {budget_text(budget)}. Leave one of the two out."
        )
    if sweep == "stages":
        return [replace(budget, stages=k + 1) for k in range(len(macs))]
    if sweep == "macs":
        return [replace(budget, macs=m) for m in macs]
    if sweep == "confidence":
        return [replace(budget, confidence=c) for c in CONFIDENCES]
    if figures is None or not figures.times:
        raise UserError(
            "Expected measured stage times for a sweep of seconds. Run `bdistil calibrate` on the run first."
        )
    times = min(figures.times, key=lambda t: abs(t.batch - batch_size))
    deadlines = torch.linspace(times.late[0], 1.2 * sum(times.late), DEADLINES).tolist()
    return [replace(budget, seconds=s) for s in deadlines]
