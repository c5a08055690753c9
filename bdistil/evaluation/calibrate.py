"""Calibration of an ensemble for early exit, on the validation part and the device at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from bdistil.boosting.labels import check_labels
from bdistil.data.loaders import first_samples, pairs_of
from bdistil.ensemble.budget import NEVER, add_votes, confidence_of
from bdistil.ensemble.calibration import Calibration, ExitFigures
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.timing import measure_times
from bdistil.errors import UserError
from bdistil.evaluation.tables import table
from bdistil.evaluation.temperature import calibration_error, fit_temperature, weighted_prefixes, winning_weights
from bdistil.evaluation.thresholds import ExitTarget, Numbers, exit_outcome, exit_stages, fit_thresholds
from bdistil.metrics.quality import class_numbers

TIMED_SAMPLES = 256


def fit_anytime(
    ensemble: ProgressiveEnsemble,
    loader: Iterable[Any],
    target: ExitTarget | None = None,
    *,
    weights: bool = False,
    device: str | torch.device = "cpu",
    labels: str | None = "labels",
) -> Calibration:
    """Fits temperatures, thresholds and weights, measures stage times, and sets `ensemble.calibration` to the result.

    Args:
        ensemble: finished; it stays on the device.
        loader: of the validation part, yields (x, y), or mappings with a key for y; its order must not change. Of soft
            labels the largest is the class; samples without a label are left out.
        target: of the thresholds.
        weights: try weighted prefixes, kept where they win on held-out halves of the validation part.
        device: for the measurements.
        labels: key of y in batches that are mappings.

    Raises:
        UserError: another task than classification; labels that are not class numbers; no stage meets the target.
    """
    if ensemble.task != "classification":
        raise UserError(
            f"Expected an ensemble of a classification, to fit exits for, got one of a {ensemble.task} task."
        )
    target, device = target or ExitTarget(), torch.device(device)
    ensemble.to(device).calibration = Calibration(len(ensemble))
    own, classes = own_logits(ensemble, loader, device, labels)
    calibration = _fit(own, classes, ensemble.macs, target, weights)
    # Times depend on the weights, and are measured without exits and temperatures.
    ensemble.calibration = replace(calibration, temperatures=(), exits=None)
    timed = move_data_to_device(first_samples(loader, TIMED_SAMPLES, labels), device)
    times = measure_times(ensemble, timed, rule=target.rule)
    ensemble.calibration = replace(calibration, times=times, device=device.type)
    return ensemble.calibration


@torch.no_grad()
def own_logits(
    ensemble: ProgressiveEnsemble, loader: Iterable[Any], device: torch.device, labels: str | None = "labels"
) -> tuple[Tensor, Tensor]:
    """Logits of each student alone, in the teacher's units, (T, N, L), and the classes (N,) of labelled samples.

    Raises:
        UserError: there are no labels, or they are no classes.
    """
    logits, classes, read = [], [], 0
    for x, y in pairs_of(loader, labels):
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
    return torch.cat(logits, 1), torch.cat(classes)


def _fit(own: Tensor, labels: Tensor, macs: Sequence[int], target: ExitTarget, weights: bool) -> Calibration:
    """Temperatures, thresholds and, if requested and better, student weights, from `own_logits`; no times."""
    chosen = winning_weights(own, labels) if weights else []
    prefixes = weighted_prefixes(own, torch.tensor(chosen or [1.0] * len(own)))
    temperatures = [fit_temperature(logits, labels) for logits in prefixes]
    return Calibration(
        len(own),
        exits=_fit_exits(own, prefixes, labels, macs, target, temperatures),
        temperatures=tuple(temperatures),
        calibration_error=tuple(
            (calibration_error(logits, labels), calibration_error(logits, labels, t))
            for logits, t in zip(prefixes, temperatures, strict=True)
        ),
        weights=tuple(chosen),
    )


def _fit_exits(
    own: Tensor,
    prefixes: Tensor,
    labels: Tensor,
    macs: Sequence[int],
    target: ExitTarget,
    temperatures: Sequence[float],
) -> ExitFigures:
    confidences, votes = [], None
    for answer, prefix, temperature in zip(own, prefixes, temperatures, strict=True):
        votes = add_votes(votes, answer)
        confidences.append(confidence_of(prefix, target.rule, temperature, votes))
    confidence, right = torch.stack(confidences).double().numpy(), (prefixes.argmax(-1) == labels).numpy()
    fits = [partial(fit_thresholds, macs=macs, target=target, shared=shared) for shared in (False, True)]
    losses = [_held_out_loss(confidence, right, fit) for fit in fits]
    best = losses.index(min(losses))  # a threshold per stage only where it loses no more on held-out samples
    thresholds = fits[best](confidence, right)
    outcome = exit_outcome(exit_stages(confidence, np.array(thresholds)), right, np.array(macs))
    return ExitFigures(
        rule=target.rule,
        thresholds=tuple(thresholds),
        target=str(target),
        decided_share=tuple((outcome.leaving / len(labels)).tolist()),
        accuracy=outcome.right / len(labels),
        full_accuracy=float(right[-1].mean()),
        average_macs=outcome.macs / len(labels),
        held_out_loss=losses[best],
    )


def _held_out_loss(confidence: Numbers, right: Numbers, fit: Callable[[Numbers, Numbers], list[float]]) -> float:
    """Points lost against all stages, with thresholds fitted on one half of the samples and applied to the other."""
    lost, even = 0, np.arange(right.shape[1]) % 2 == 0
    for half in (even, ~even):
        if half.any() and not half.all():
            stages = exit_stages(confidence[:, half], np.array(fit(confidence[:, ~half], right[:, ~half])))
            lost += int(right[-1, half].sum() - right[:, half][stages, np.arange(half.sum())].sum())
    return 100 * lost / int(right.shape[1])


def format_calibration(calibration: Calibration, macs: Sequence[int]) -> str:
    """A calibration as text: a table by stage, and the effect of the exits on the validation part."""
    rows: list[dict[str, Any]] = []
    exits = calibration.exits
    for number in range(calibration.count):
        row = {"stage": number + 1, "temperature": f"{calibration.temperature(number):.3f}"}
        if calibration.calibration_error:
            before, after = calibration.calibration_error[number]
            row |= {"ECE before": f"{before:.4f}", "ECE after": f"{after:.4f}"}
        if exits:
            threshold = exits.thresholds[number]
            row["threshold"] = "never" if threshold >= NEVER else f"{threshold:.4f}"
            row["decided"] = f"{exits.decided_share[number]:.1%}"
        rows.append(row)
    lines = [table(rows)]
    if exits:
        lines.append(
            f"\n{exits.rule}, to {exits.target}: accuracy {exits.accuracy:.4f} of {exits.full_accuracy:.4f} on "
            f"validation, {exits.average_macs:,.0f} MACs on average of {macs[-1]:,}.\nFitted on one half and applied "
            f"to the other, it loses {exits.held_out_loss:.2f} points: expect that on new samples."
        )
    if calibration.weights:
        lines.append("Weights of the students: " + "  ".join(f"{weight:.3f}" for weight in calibration.weights))
    for times in calibration.times:
        schedules = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.schedules.items())
        lines.append(f"batch {times.batch:>3}: {schedules}; all stages run {times.schedule}")
    return "\n".join(lines)
