"""Accuracy, cost and latency of a finished run, within budgets and stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch.utils.data import BatchSampler, DataLoader

from bdistil.data.loaders import first_samples
from bdistil.ensemble.budget import Budget
from bdistil.ensemble.calibration import Calibration
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.evaluation.early import early_figures
from bdistil.evaluation.run_data import Split, loader_of
from bdistil.evaluation.tables import SCORES, cpu_latency
from bdistil.metrics.cost import latency_ms, measure_cost
from bdistil.metrics.quality import PrefixMetric, prefix_metric
from bdistil.models.student import linked_activations, links_of
from bdistil.storage.run_directory import RunDirectory
from bdistil.utils.trees import row_count, take_rows

Sweep = Literal["stages", "macs", "seconds", "confidence"]
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
DEADLINES = 6
SINGLES, BATCHES = 100, 30  # timed calls


# ---- within budgets


def evaluate_budgets(
    run: RunDirectory, budgets: Sequence[Budget], part: Split = "test", batch_size: int = 256
) -> list[dict[str, Any]]:
    """Accuracy (R² and rms error for a regression), average cost, latency and exits, one row per budget.

    `average_macs` counts the stages that ran, which depends on the batches and on measured times; `answered_macs` only
    those up to the stage that a prediction comes from.

    With a single budget, the row of students that read segments of a sequence includes early-classification metrics.

    Args:
        run: a run of a recipe.
        budgets: budgets to evaluate.
        part: part of the data.
        batch_size: batch size of the second latency, and of all figures within seconds; the first latency is that of
            single samples.

    Raises:
        UserError: `batch_size` < 1, or the run was not started by a recipe.
    """
    _check_batch_size(batch_size)
    ensemble, loader = ProgressiveEnsemble.load(run.root), loader_of(run, part)
    x = first_samples(loader, max(SINGLES, batch_size))
    samples = row_count(x)
    singles = [take_rows(x, slice(row, row + 1)) for row in range(min(SINGLES, samples))]
    batch = take_rows(x, torch.arange(batch_size) % samples)
    early = {}
    if len(budgets) == 1 and ensemble.task == "classification":
        early = early_figures(ensemble, loader, budgets[0].confidence)
    rows = []
    for budget in budgets:
        batches = loader if budget.seconds is None else _in_batches(loader, batch_size)
        row = {"budget": budget_text(budget), "part": part, **_quality(ensemble, batches, budget)}
        row |= _latency(ensemble, singles, budget, "single") | _latency(ensemble, [batch] * BATCHES, budget, "batch")
        rows.append({**row, "batch_size": batch_size, **early})
    return rows


def budget_text(budget: Budget) -> str:
    """The limits of a budget as text: ``stages=2 confidence=0.9``, or ``none``."""
    limits = {key: value for key, value in asdict(budget).items() if value is not None}
    texts = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in limits.items())
    return " ".join(texts) or "none"


def _in_batches(loader: DataLoader[Any], batch_size: int) -> DataLoader[Any]:
    """The samples of a loader in batches of another size: what ends in time depends on it."""
    batches = BatchSampler(loader.sampler, batch_size, drop_last=False)
    return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)


def _quality(ensemble: ProgressiveEnsemble, loader: Iterable[Any], budget: Budget) -> dict[str, Any]:
    metric: PrefixMetric | None = None
    macs, decided = 0, torch.zeros(len(ensemble) + 1, dtype=torch.int64)
    started = time.perf_counter()
    for x, y in loader:
        if y is None:
            raise UserError("Expected labels, to measure the accuracy on, but this run has none (labels=None).")
        prediction = ensemble.predict(x, budget)
        metric = metric or prefix_metric(ensemble.task, prediction.logits.shape[-1])
        metric.update(prediction.logits[None], y)
        macs += int(prediction.macs.sum())
        decided += prediction.stages.bincount(minlength=len(ensemble) + 1)
    if metric is None:
        raise UserError("Expected the part to hold samples, got none.")
    seconds, samples = time.perf_counter() - started, int(decided.sum())
    score, error = (round(float(figure), 6) for figure in metric.compute())
    answered = sum(int(count) * cost for count, cost in zip(decided[1:], ensemble.macs, strict=True))
    costs = {"average_macs": round(macs / samples), "answered_macs": round(answered / samples)}
    costs["all_stages_macs"] = ensemble.macs[-1]
    shares = [round(float(d) / samples, 4) for d in decided[1:]]
    exits = {"decided_share": shares} if ensemble.task == "classification" else {}
    quality = {SCORES[ensemble.task]: score} | ({"rms": error} if ensemble.task == "regression" else {})
    return {"samples": samples, **quality, **costs, **exits, "seconds": round(seconds, 3)}


def _latency(ensemble: ProgressiveEnsemble, calls: Sequence[Any], budget: Budget, name: str) -> dict[str, float]:
    """Median and 95th percentile of the time per call in milliseconds, after one warm-up call."""
    ensemble.predict(calls[0], budget)
    milliseconds = []
    for x in calls:
        started = time.perf_counter()
        ensemble.predict(x, budget)
        milliseconds.append(1e3 * (time.perf_counter() - started))
    p50, p95 = torch.tensor(milliseconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95]).double()).tolist()
    return {f"{name}_ms_p50": round(p50, 4), f"{name}_ms_p95": round(p95, 4)}


def sweep_budgets(
    sweep: Sweep, budget: Budget, macs: Sequence[int], calibration: Calibration | None, batch_size: int
) -> list[Budget]:
    """Budgets that vary one limit of `budget`.

    Stages from 1 to all, the MACs of each prefix, six deadlines from the expected time of the first stage on the CPU to
    1.2 times that of all stages, or confidences from 0.5 to 0.99.

    Args:
        sweep: the limit to vary.
        budget: the other limits.
        macs: cumulative, one value per stage.
        calibration: measured times, for deadlines.
        batch_size: batch size for which the deadlines are computed.

    Raises:
        UserError: `budget` itself sets the limit to vary, or a sweep over seconds has no measured times.
    """
    if getattr(budget, sweep) is not None:
        raise UserError(f"Expected `budget.{sweep}` to be unset as `sweep` varies it, got {budget_text(budget)}.")
    if sweep == "stages":
        return [replace(budget, stages=k + 1) for k in range(len(macs))]
    if sweep == "macs":
        return [replace(budget, macs=m) for m in macs]
    if sweep == "confidence":
        return [replace(budget, confidence=c) for c in CONFIDENCES]
    clock = calibration.clock("cpu") if calibration is not None else None
    if clock is None:
        raise UserError(
            "Expected measured stage times for a sweep of seconds. Run `bdistil calibrate` on the run first; for other "
            "tasks than classification, whose stages it does not time, give --sweep macs."
        )
    late = [clock.late(stage, batch_size) for stage in range(len(macs))]
    deadlines = torch.linspace(late[0], 1.2 * sum(late), DEADLINES).tolist()
    return [replace(budget, seconds=s) for s in deadlines]


# ---- stage by stage


def profile_run(run: RunDirectory, batch_size: int = 1) -> list[dict[str, Any]]:
    """Costs of each stage, after those of the teacher: MACs per sample, parameters, bytes, latency.

    MACs are those of the run's curve. The activation bytes and the latency of a stage are measured here, on random
    samples; lengths that may vary are the largest of training. The teacher was measured at the start of the run with a
    batch size of 1; for other batch sizes, its activation bytes and latency are None, and so is its latency if the run
    was trained on a GPU.

    Args:
        run: the run directory.
        batch_size: batch size for the activation bytes and the latency.

    Raises:
        UserError: `batch_size` < 1, no round is committed, or x is of unknown shape.
    """
    _check_batch_size(batch_size)
    ensemble = ProgressiveEnsemble.load(run.root)
    if not ensemble.inputs.known:
        raise UserError(
            "Expected x of this run to be a tensor, or a tuple or mapping of tensors, to profile its stages."
        )
    x, rows = ensemble.inputs.random(batch_size), []
    if teacher := run.read("teacher"):
        rows = [
            {"stage": "teacher", "macs": teacher["macs"], "link_macs": 0, "params": teacher["params"],
             "weight_bytes": teacher["weight_bytes"],
             "activation_bytes": teacher["activation_bytes"] if batch_size == 1 else None,
             "latency_ms": cpu_latency(teacher) if batch_size == 1 else None,
             "cumulative_macs": teacher["macs"]}
        ]  # fmt: skip
    students, curve = list(ensemble.students), run.rows()[1:]
    for number, student in enumerate(students):
        inputs = (x, linked_activations(student, students[:number], x)) if links_of(student) else (x,)
        cost = measure_cost(student, inputs, uncounted="record")
        rows.append(
            {"stage": number + 1, "macs": ensemble.macs[number] - (ensemble.macs[number - 1] if number else 0),
             "link_macs": curve[number]["link_macs"],
             "params": cost.params, "weight_bytes": cost.weight_bytes, "activation_bytes": cost.activation_bytes,
             "latency_ms": round(latency_ms(student, inputs), 3), "cumulative_macs": ensemble.macs[number]}
        )  # fmt: skip
    return rows


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"Expected `batch_size` to be >= 1, got {batch_size}.")
