"""Calibration of an ensemble for early exit, on the validation part and the current device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from bdistil.boosting.labels import check_labels
from bdistil.data.loaders import first_samples, pairs_of
from bdistil.ensemble.budget import RULES, Rule, add_votes, confidence_of
from bdistil.ensemble.calibration import Calibration, ExitFigures
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.timing import measure_times
from bdistil.errors import UserError
from bdistil.evaluation.risk_control import held_back, promised_thresholds
from bdistil.evaluation.temperature import calibration_error, fit_temperature, weighted_prefixes, winning_weights
from bdistil.evaluation.thresholds import ExitTarget, exit_outcome, exit_stages, fit_thresholds
from bdistil.metrics.quality import UNLABELLED, class_numbers
from bdistil.reporting.report import stages_table
from bdistil.reporting.tables import format_table
from bdistil.runner.confidence import Array

TIMED_SAMPLES = 256
LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)  # thresholds at which decided samples are counted


def fit_anytime(
    ensemble: ProgressiveEnsemble,
    loader: Iterable[Any],
    target: ExitTarget | None = None,
    *,
    weights: bool = False,
    device: str | torch.device = "cpu",
    labels: str | None = "labels",
    ignore_index: int = UNLABELLED,
) -> Calibration:
    """Fits temperatures, thresholds and weights, measures stage times, and sets `ensemble.calibration` to the result.

    Args:
        ensemble: finished ensemble; it stays on the device.
        loader: loader of the validation part, read more than once in the same order; yields (x, y), or mappings with a
            key for y. The class of soft labels is their largest entry; samples without a label are skipped.
        target: target of the thresholds.
        weights: try weighted prefixes, and keep them if they are better on held-out halves of the fitting samples.
        device: device for the measurements.
        labels: key of y in batches that are mappings.
        ignore_index: class number of samples without a label, as in `BoostingSettings`.

    Raises:
        UserError: the task is not classification, labels are not class numbers, the loader can be read only once, or no
            stage meets the target.
    """
    if ensemble.task != "classification":
        raise UserError(
            f"Expected an ensemble of a classification, to fit exits for, got one of a {ensemble.task} task."
        )
    if isinstance(loader, Iterator):  # the first pass would take some of its samples
        raise UserError(
            f"Expected a loader that can be read more than once, got a {type(loader).__name__}. Give a DataLoader or a "
            "list of batches."
        )
    target, device, before = target or ExitTarget(), torch.device(device), ensemble.calibration
    if target.naive and not any(ensemble.macs):
        raise UserError(
            f"Expected an ensemble whose `macs` are known, to {target}, got one without. Give "
            "ProgressiveEnsemble(students, macs=[…])."
        )
    ensemble.to(device).calibration = Calibration(len(ensemble))
    try:
        timed = move_data_to_device(first_samples(loader, TIMED_SAMPLES, labels), device)
        own, classes = own_logits(ensemble, loader, device, labels, ignore_index)
        calibration = fit_calibration(own, classes, ensemble.macs, target, weights)
        # Times depend on the weights, but must be measured without exits and temperatures.
        ensemble.calibration = replace(calibration, temperatures=(), exits=None)
        times = measure_times(ensemble, timed, rule=target.rule)
    except BaseException:
        ensemble.calibration = before
        raise
    ensemble.calibration = replace(calibration, times=times, device=device.type)
    return ensemble.calibration


@torch.no_grad()
def own_logits(
    ensemble: ProgressiveEnsemble,
    loader: Iterable[Any],
    device: torch.device,
    labels: str | None = "labels",
    ignore_index: int = UNLABELLED,
) -> tuple[Tensor, Tensor]:
    """Logits of each student alone, in the teacher's units, (T, N, L), and the classes (N,) of labelled samples.

    Raises:
        UserError: there are no labels, or they are not classes.
    """
    logits, classes, read = [], [], 0
    for x, y in pairs_of(loader, labels, ignore_index):
        if y is None:
            raise UserError(
                "Expected labels (N,) of the validation part, to fit thresholds and temperatures on, got none."
            )
        totals = torch.stack([stage.total for stage in ensemble.stages(move_data_to_device(x, device))]).float().cpu()
        check_labels(y, np.arange(read, read + len(y)), "the loader", "classification", totals.shape[-1])
        read += len(y)
        own, y = totals.diff(dim=0, prepend=torch.zeros_like(totals[:1])) * ensemble.scale, class_numbers(y)
        logits.append(own[:, y >= 0])
        classes.append(y[y >= 0])
    if not sum(map(len, classes)):
        raise UserError(
            f"Expected a loader that can be read more than once, with labelled samples, got {read} samples and no "
            "label. Give a DataLoader or a list of batches."
        )
    return torch.cat(logits, 1), torch.cat(classes)


def fit_calibration(
    own: Tensor, labels: Tensor, macs: Sequence[int], target: ExitTarget, weights: bool = False
) -> Calibration:
    """Fits temperatures, thresholds and, if requested and better, student weights to `own_logits`; measures no times.

    For a promise, temperatures and weights are fitted on the samples that are not used for the test.
    """
    tested = np.zeros(len(labels), bool) if target.naive else held_back(len(labels), target.points, target.risk)
    learn = torch.from_numpy(~tested)
    rest = ~learn if tested.any() else learn
    chosen = winning_weights(own[:, learn], labels[learn]) if weights else []
    prefixes = weighted_prefixes(own, torch.tensor(chosen or [1.0] * len(own)))
    temperatures = [fit_temperature(logits[learn], labels[learn]) for logits in prefixes]
    confidences = {rule: _confidence(own, prefixes, rule, temperatures) for rule in RULES}
    right = (prefixes.argmax(-1) == labels).numpy()
    return Calibration(
        len(own),
        exits=_fit_exits(confidences[target.rule], right, tested, macs, target),
        temperatures=tuple(temperatures),
        calibration_error=tuple(
            (calibration_error(logits[rest], labels[rest]), calibration_error(logits[rest], labels[rest], t))
            for logits, t in zip(prefixes, temperatures, strict=True)
        ),
        weights=tuple(chosen),
        shares={rule: tuple(_shares(found, level) for level in LEVELS) for rule, found in confidences.items()},
    )


def _confidence(own: Tensor, prefixes: Tensor, rule: Rule, temperatures: Sequence[float]) -> Array:
    """Confidences (T, N) of the prefixes; `own` and `prefixes` are logits (T, N, L) of single students and prefixes."""
    confidences, votes = [], None
    for answer, prefix, temperature in zip(own, prefixes, temperatures, strict=True):
        votes = add_votes(votes, answer) if rule == "agreement" else None
        confidences.append(confidence_of(prefix, rule, temperature, votes))
    found: Array = torch.stack(confidences).double().numpy()
    return found


def _shares(confidence: Array, level: float) -> tuple[float, ...]:
    """The threshold `level`, followed by the share of samples that it decides at each stage."""
    stages = exit_stages(confidence, np.full(len(confidence), level))
    return level, *(np.bincount(stages, minlength=len(confidence)) / len(stages)).tolist()


def _fit_exits(confidence: Array, right: Array, tested: Array, macs: Sequence[int], target: ExitTarget) -> ExitFigures:
    """Fits thresholds to confidences (T, N) and correctness (T, N) of the prefixes, and summarises their effect."""
    promise = None
    if target.naive:
        thresholds, loss = _naive_thresholds(confidence, right, macs, target)
    else:
        thresholds, promise = promised_thresholds(confidence, right, tested, target.points, target.risk)
        loss = _loss(confidence[:, tested], right[:, tested], thresholds)
    count = right.shape[1]
    outcome = exit_outcome(exit_stages(confidence, np.array(thresholds)), right, np.array(macs))
    return ExitFigures(
        rule=target.rule,
        thresholds=tuple(thresholds),
        target=str(target),
        decided_share=tuple((outcome.leaving / count).tolist()),
        accuracy=outcome.right / count,
        full_accuracy=float(right[-1].mean()),
        average_macs=outcome.macs / count,
        held_out_loss=loss,
        promise=promise,
    )


def _naive_thresholds(
    confidence: Array, right: Array, macs: Sequence[int], target: ExitTarget
) -> tuple[list[float], float]:
    """The best thresholds on these samples, and the percentage points that such a fit loses on held-out halves."""
    fits = [partial(fit_thresholds, macs=macs, target=target, shared=shared) for shared in (False, True)]
    losses = [_held_out_loss(confidence, right, fit) for fit in fits]
    best = losses.index(min(losses))  # a threshold per stage only where it loses no more on held-out samples
    return fits[best](confidence, right), losses[best]


def _held_out_loss(confidence: Array, right: Array, fit: Callable[[Array, Array], list[float]]) -> float:
    """Percentage points lost against all stages, with thresholds fitted on one half and applied to the other."""
    even = np.arange(right.shape[1]) % 2 == 0
    if even.all():
        return 0.0
    losses = [
        _loss(confidence[:, h], right[:, h], fit(confidence[:, ~h], right[:, ~h])) * h.mean() for h in (even, ~even)
    ]
    return float(sum(losses))


def _loss(confidence: Array, right: Array, thresholds: Sequence[float]) -> float:
    """Percentage points lost against all stages; 0 if there are no samples."""
    stages = exit_stages(confidence, np.array(thresholds))
    lost = right[-1].astype(int) - right[stages, np.arange(right.shape[1])]
    return 100 * float(lost.mean()) if len(lost) else 0.0


def format_calibration(calibration: Calibration, macs: Sequence[int]) -> str:
    """Formats a calibration as a table by stage, and the effect of the exits on the validation part."""
    lines, exits = [format_table(*stages_table(calibration))], calibration.exits
    if exits:
        lines.append(
            f"\n{exits.rule}, to {exits.target}: accuracy {exits.accuracy:.4f} on validation, where all "
            f"stages have {exits.full_accuracy:.4f}; {exits.average_macs:,.0f} of {macs[-1]:,} MACs on average.\n"
            f"{exits.outlook}"
        )
    for times in calibration.times:
        schedules = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.schedules.items())
        lines.append(f"batch {times.batch:>3}: {schedules}; all stages run {times.schedule}")
    return "\n".join(lines)
