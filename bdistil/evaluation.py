"""What a finished run is worth: accuracy within a budget, and the costs of each stage."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch

from bdistil.budgets import Budget
from bdistil.cost import latency_ms, measure_cost
from bdistil.early import early_figures
from bdistil.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.regression import PrefixErrors
from bdistil.run_data import loader_of
from bdistil.run_directory import RunDirectory
from bdistil.students import linked_features, links_of


def evaluate_run(run: RunDirectory, budget: Budget, part: Literal["test", "val"] = "test") -> dict[str, Any]:
    """Accuracy, average cost and the share of samples decided at each stage, within a budget.

    Students that read segments of a sequence also get the figures of early classification (`bdistil.early`).

    Args:
        run: a run of a recipe.
        budget: limits.
        part: of the data.
    """
    ensemble = ProgressiveEnsemble.load(run.root)
    loader = loader_of(run, part)
    if ensemble.task == "regression":
        return {"part": part, **evaluate_outputs(ensemble, loader, budget)}
    right, macs, samples, decided = 0, 0, 0, torch.zeros(len(ensemble) + 1, dtype=torch.int64)
    started = time.perf_counter()
    for x, y in loader:
        prediction = ensemble.predict(x, budget)
        right += int((prediction.logits.argmax(-1) == y).sum())
        macs += int(prediction.macs.sum())
        samples += len(y)
        decided += prediction.stages.bincount(minlength=len(ensemble) + 1)
    return {
        "part": part,
        "samples": samples,
        "accuracy": round(right / samples, 6),
        "average_macs": round(macs / samples),
        "all_stages_macs": ensemble.macs[-1],
        "decided_share": [round(float(d) / samples, 4) for d in decided[1:]],
        "seconds": round(time.perf_counter() - started, 3),
        **early_figures(ensemble, loader, budget.confidence),
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


def profile_run(run: RunDirectory, batch_size: int = 1) -> list[dict[str, Any]]:
    """Costs of each stage, the teacher's first: MACs per sample, parameters, bytes, latency.

    Args:
        run: the run directory.
        batch_size: samples a call, for the activation bytes and the latency.

    Raises:
        UserError: `batch_size` < 1, or no round is committed.
    """
    if batch_size < 1:
        raise UserError(f"Expected `batch_size` to be >= 1, got {batch_size}.")
    ensemble = ProgressiveEnsemble.load(run.root)
    shape = run.record(0)["input_shape"]
    x = torch.randn(batch_size, *shape)
    rows = []
    if teacher := run.teacher_figures():
        once = [round(teacher["latency_ms"], 3)] if batch_size == 1 else [None]
        size = teacher["activation_bytes"] if batch_size == 1 else None
        rows.append(
            _row(
                "teacher", teacher["macs"], 0, teacher["macs"], teacher["params"], teacher["weight_bytes"], size, *once
            )
        )
    for number, student in enumerate(ensemble.students):
        earlier = list(ensemble.students)[:number]
        inputs = (x, linked_features(student, earlier, x)) if links_of(student) else (x,)
        cost = measure_cost(student, inputs, uncounted="record")
        own, links = cost.macs // batch_size, cost.by_module.get("join", 0) // batch_size
        rows.append(
            _row(number + 1, own, links, ensemble.macs[number], cost.params, cost.weight_bytes, cost.activation_bytes,
                 round(latency_ms(student, inputs), 3))
        )  # fmt: skip
    return rows


def _row(stage: Any, *figures: Any) -> dict[str, Any]:
    names = ("macs", "link_macs", "cumulative_macs", "params", "weight_bytes", "activation_bytes", "latency_ms")
    return {"stage": stage, **dict(zip(names, figures, strict=True))}
