"""Fits and measures what an ensemble needs to stop early, on the validation part and the device at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdistil.ensemble.budget import NEVER, Rule, add_votes, confidence_of
from bdistil.ensemble.calibration import Calibration, ExitFigures
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.ensemble.timing import measure_times
from bdistil.errors import UserError
from bdistil.evaluation.run_data import first_samples
from bdistil.evaluation.temperature import calibration_error, temperatures_of, weighted_prefixes, winning_weights
from bdistil.evaluation.thresholds import Array, exit_stages, fit_thresholds, outcome

TIMED_SAMPLES = 256


@dataclass(frozen=True)
class ExitTarget:
    """What thresholds are fitted for; one of the two numbers.

    Attributes:
        rule: exit rule.
        max_loss: points of accuracy that may be lost on the validation part; 0.2 where nothing is said.
        average_macs: multiply-adds that a sample may cost on average.
    """

    rule: Rule = "max_prob"
    max_loss: float | None = None
    average_macs: float | None = None

    def __post_init__(self) -> None:
        if self.max_loss is not None and self.average_macs is not None:
            raise UserError(
                f"Give one of `max_loss` and `average_macs`, got {self.max_loss} and {self.average_macs}: thresholds "
                "cannot be fitted for both."
            )
        if self.max_loss is None and self.average_macs is None:
            object.__setattr__(self, "max_loss", 0.2)

    def __str__(self) -> str:
        if self.max_loss is not None:
            return f"lose at most {self.max_loss:g} points"
        return f"average at most {self.average_macs:,.0f} MACs"


@torch.no_grad()
def own_answers(ensemble: ProgressiveEnsemble, loader: Iterable[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits of the students alone, in the teacher's units, (T, N, L), and the labels (N,).

    Args:
        ensemble: on the device, its students weighing the same.
        loader: yields (x, y).
        device: of the ensemble.

    Raises:
        UserError: the labels are no class numbers.
    """
    answers, labels = [], []
    for x, y in loader:
        if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point():
            raise UserError(
                "Expected class numbers (N,) as labels of the validation part, to fit thresholds and temperatures on, "
                f"got {f'{y.dtype} {tuple(y.shape)}' if isinstance(y, Tensor) else type(y).__name__}."
            )
        totals = torch.stack([stage.total for stage in ensemble.stages(x.to(device))]).float().cpu()
        answers.append(totals.diff(dim=0, prepend=torch.zeros_like(totals[:1])) * ensemble.scale)
        labels.append(y)
    return torch.cat(answers, 1), torch.cat(labels)


def fit_figures(
    own: Tensor, labels: Tensor, macs: Sequence[int], target: ExitTarget, *, weights: bool = False
) -> Calibration:
    """Temperatures, thresholds and, where they are asked for and win, weights; nothing is measured.

    Args:
        own: (T, N, L), of the students alone, in the teacher's units.
        labels: (N,).
        macs: cumulative, one number a stage.
        target: of the thresholds.
        weights: try weighted prefixes.

    Raises:
        UserError: no stage fits the target.
    """
    chosen = winning_weights(own, labels) if weights else []
    prefixes = weighted_prefixes(own, torch.tensor(chosen or [1.0] * len(own)))
    temperatures = temperatures_of(prefixes, labels)
    errors = [
        (calibration_error(logits, labels), calibration_error(logits, labels, t))
        for logits, t in zip(prefixes, temperatures, strict=True)
    ]
    return Calibration(
        len(own),
        exits=_fit_exits(own, prefixes, labels, macs, target, temperatures),
        temperatures=tuple(temperatures),
        calibration_error=tuple(errors),
        weights=tuple(chosen),
    )


def _fit_exits(
    own: Tensor, logits: Tensor, labels: Tensor, macs: Sequence[int], target: ExitTarget, temperatures: Sequence[float]
) -> ExitFigures:
    sure, right = _sureness(own, logits, target.rule, temperatures), (logits.argmax(-1) == labels).numpy()
    limits = partial(fit_thresholds, macs=macs, max_loss=target.max_loss, average_macs=target.average_macs)
    fits = [partial(limits, shared=shared) for shared in (False, True)]
    losses = [_held_out_loss(sure, right, fit) for fit in fits]
    best = losses.index(min(losses))  # thresholds of their own for the stages only where they keep their word as well
    thresholds = fits[best](sure, right)
    result = outcome(exit_stages(sure, np.array(thresholds)), right, np.array(macs))
    return ExitFigures(
        rule=target.rule,
        thresholds=tuple(thresholds),
        target=str(target),
        decided_share=tuple((result.leaving / len(labels)).tolist()),
        accuracy=result.right / len(labels),
        full_accuracy=float(right[-1].mean()),
        average_macs=result.macs / len(labels),
        held_out_loss=losses[best],
    )


def _sureness(own: Tensor, logits: Tensor, rule: Rule, temperatures: Sequence[float]) -> Array:
    """(T, N) float64 of every prefix."""
    rows, votes = [], None
    for answer, prefix, temperature in zip(own, logits, temperatures, strict=True):
        votes = add_votes(votes, answer)
        rows.append(confidence_of(prefix, rule, temperature, votes))
    sure: Array = torch.stack(rows).double().numpy()
    return sure


def _held_out_loss(sure: Array, right: Array, fit: Callable[[Array, Array], list[float]]) -> float:
    """Points lost against all stages where thresholds are fitted on one half of the samples and used on the other."""
    lost, even = 0, np.arange(right.shape[1]) % 2 == 0
    for there in (even, ~even):
        if there.any() and not there.all():
            stages = exit_stages(sure[:, there], np.array(fit(sure[:, ~there], right[:, ~there])))
            lost += int(right[-1, there].sum() - right[:, there][stages, np.arange(there.sum())].sum())
    return 100 * lost / int(right.shape[1])


def fit_anytime(
    ensemble: ProgressiveEnsemble,
    loader: Iterable[Any],
    target: ExitTarget | None = None,
    *,
    weights: bool = False,
    device: str | torch.device = "cpu",
) -> Calibration:
    """Fits and measures all figures of an ensemble, and gives them to it.

    Args:
        ensemble: finished; it stays on the device.
        loader: of the validation part, yields (x, y) with class numbers y; its order must not change.
        target: of the thresholds.
        weights: try weighted prefixes, kept where they win on held-out halves of the validation part.
        device: to measure on.

    Raises:
        UserError: the labels are no class numbers, or no stage fits the target.
    """
    target, device = target or ExitTarget(), torch.device(device)
    ensemble.to(device).calibration = Calibration(len(ensemble))
    own, labels = own_answers(ensemble, loader, device)
    figures = fit_figures(own, labels, ensemble.macs, target, weights=weights)
    ensemble.calibration = replace(figures, temperatures=(), exits=None)  # only the weights: what a stage has to do
    x = first_samples(loader, TIMED_SAMPLES).to(device)
    times = measure_times(ensemble, x, rule=target.rule)
    ensemble.calibration = replace(figures, times=times, device=device.type)
    return ensemble.calibration


def format_calibration(figures: Calibration, macs: Sequence[int]) -> str:
    """Figures for the terminal: a table by stage, and what the exits gave on the validation part."""
    lines = [f"{'stage':>5}  {'temperature':>11}  {'ECE before':>10}  {'after':>6}  {'threshold':>9}  {'decided':>7}"]
    exits = figures.exits
    for number in range(figures.count):
        before, after = figures.calibration_error[number] if figures.calibration_error else (0.0, 0.0)
        lines.append(
            f"{number + 1:>5}  {figures.temperature(number):>11.3f}  {before:>10.4f}  {after:>6.4f}"
            + (f"  {_threshold(exits.thresholds[number]):>9}  {exits.decided_share[number]:>7.1%}" if exits else "")
        )
    if exits:
        lines.append(
            f"\n{exits.rule}, to {exits.target}: accuracy {exits.accuracy:.4f} of {exits.full_accuracy:.4f} on "
            f"validation, {exits.average_macs:,.0f} MACs on average of {macs[-1]:,}.\nFitted on one half and used on "
            f"the other, it loses {exits.held_out_loss:.2f} points: expect that on new samples."
        )
    if figures.weights:
        lines.append("Weights of the students: " + "  ".join(f"{weight:.3f}" for weight in figures.weights))
    for times in figures.times:
        shown = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in times.schedules.items())
        lines.append(f"batch {times.batch:>3}: {shown}; all stages run {times.schedule}")
    return "\n".join(lines)


def _threshold(value: float) -> str:
    return "never" if value >= NEVER else f"{value:.4f}"
