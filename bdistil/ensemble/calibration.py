"""Calibration of an ensemble for early exit: fitted thresholds, temperatures and weights, and measured stage times.

A calibration is valid for one ensemble only: committing another round removes its file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from bdistil.ensemble.budget import Budget, Rule
from bdistil.errors import RunError, UserError
from bdistil.runner.exits import Exits, shares_at
from bdistil.runner.stage_clock import BatchTimes, StageClock
from bdistil.storage.run_directory import RunDirectory


def in_points(loss: float) -> str:
    """A loss of accuracy in percentage points, as text.

    Example:
        >>> in_points(1.0), in_points(0.5)
        ('1 point', '0.5 points')
    """
    return f"{loss:g} point{'' if loss == 1 else 's'}"


@dataclass(frozen=True)
class Promise:
    """Guarantee of fitted thresholds for new samples, see `bdistil.evaluation.risk_control`.

    Attributes:
        max_loss: largest loss of accuracy against running all stages, in percentage points.
        delta: probability that the loss is larger.
        kept: whether any thresholds satisfy the promise; if not, all stages run.
        validation: number of validation samples.
        samples: number of validation samples used to test the thresholds rather than to fit them.
        spoiled: number of tested samples that the full ensemble classifies correctly and the exits wrongly.
        bound: upper bound on the share of spoiled samples, in percentage points.
        needed: smallest number of validation samples that allows such a promise; None if no number does.
        needed_for_half: the same for half of `max_loss`.
    """

    max_loss: float
    delta: float
    kept: bool
    validation: int
    samples: int
    spoiled: int
    bound: float
    needed: int | None
    needed_for_half: int | None

    def __str__(self) -> str:
        goal = f"at most {in_points(self.max_loss)} of accuracy with probability {1 - self.delta:g}"
        if not self.kept and (self.needed is None or self.validation < self.needed):
            enough = "no number is enough" if self.needed is None else f"at least {self.needed:,} are needed"
            return f"{self.validation:,} validation samples cannot support losing {goal} ({enough}): all stages run."
        if not self.kept:
            return f"No threshold loses {goal} on new samples: all stages run."
        tighter = (
            ""
            if self.needed_for_half is None or self.needed_for_half <= self.validation
            else (
                f" A promise of {in_points(self.max_loss / 2)} needs at least {self.needed_for_half:,} validation "
                f"samples; there are {self.validation:,}."
            )
        )
        return (
            f"New samples like these lose {goal}: of {self.samples:,} that were not fitted on, exits spoil "
            f"{self.spoiled} (at most {self.bound:.2f} %, Clopper-Pearson).{tighter}"
        )


@dataclass(frozen=True)
class ExitFigures:
    """Thresholds fitted on the validation part, and their effect there.

    Attributes:
        rule: exit rule of the thresholds.
        thresholds: one per stage; a sample is decided at the first stage where its confidence reaches the threshold.
            That of the last stage is 0; a stage with `NEVER` decides no sample.
        target: target of the fit as text, such as "lose at most 0.2 points".
        decided_share: share of the validation samples decided at each stage; sums to 1.
        accuracy: accuracy with these exits, in 0 … 1.
        full_accuracy: accuracy of all stages, in 0 … 1.
        average_macs: average multiply-adds per sample with these exits.
        held_out_loss: percentage points of accuracy lost against all stages on samples not used for the fit: the
            tested samples of the promise, or the other half for a naive fit.
        promise: guarantee for new samples; None for a naive fit.
    """

    rule: Rule
    thresholds: tuple[float, ...]
    target: str
    decided_share: tuple[float, ...]
    accuracy: float
    full_accuracy: float
    average_macs: float
    held_out_loss: float = 0.0
    promise: Promise | None = None

    @property
    def outlook(self) -> str:
        """What to expect on new samples, as a sentence or two."""
        if self.promise is not None:
            return str(self.promise)
        change = "gains" if self.held_out_loss < 0 else "loses"
        return (
            f"A naive fit, which promises nothing for new samples: fitted on one half and applied to the other, it "
            f"{change} {abs(self.held_out_loss):.2f} points."
        )


@dataclass(frozen=True)
class Calibration:
    """Everything fitted and measured for early exit; an empty tuple means not fitted or not measured.

    Attributes:
        count: T, number of stages of the ensemble.
        exits: fitted thresholds.
        temperatures: one per stage: softmax(logits / temperature) is calibrated.
        calibration_error: expected calibration error of each stage on validation, before and after the temperatures.
        weights: one per student, if weighted prefixes were better on validation; empty for equal weights.
        shares: by exit rule, the share of validation samples decided at each stage with one threshold for all stages:
            a row (threshold, share of stage 1, …, share of stage T) per threshold, in ascending order.
        times: measured times by batch size, smallest first.
        device: type of the device of `times`, for example ``cpu``.
    """

    count: int
    exits: ExitFigures | None = None
    temperatures: tuple[float, ...] = ()
    calibration_error: tuple[tuple[float, float], ...] = ()
    weights: tuple[float, ...] = ()
    shares: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    times: tuple[BatchTimes, ...] = ()
    device: str = "cpu"

    def temperature(self, number: int) -> float:
        """Temperature of a stage, numbered from 0; 1 if none was fitted."""
        return self.temperatures[number] if self.temperatures else 1.0

    def schedule(self, batch: int, device: str) -> str:
        """Fastest schedule for all stages at the measured batch size nearest by ratio; `one` if not measured."""
        if not self.times or device != self.device:
            return "one"
        return min(self.times, key=lambda t: abs(math.log(t.batch / max(batch, 1)))).schedule

    @cached_property
    def native(self) -> int:
        """Largest measured batch size at which torch's own convolutions are faster than oneDNN's; 0 if none."""
        return max((times.batch for times in self.times if times.native), default=0)

    def clock(self, device: str) -> StageClock | None:
        """Clock of the measured times; None without measurements on this type of device."""
        return self._clock if self.times and device == self.device else None

    @cached_property
    def _clock(self) -> StageClock:
        return StageClock(self.times)

    def shares_at(self, rule: Rule, threshold: float) -> tuple[float, ...] | None:
        """Expected share of samples decided at each stage, interpolated between thresholds; None if unknown."""
        return shares_at(self.shares.get(rule, ()), threshold)

    def to_dict(self) -> dict[str, Any]:
        """Converts to plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Inverse of `to_dict`; converts the lists of JSON to tuples.

        Raises:
            TypeError: a key is missing or unknown.
            ValueError: the length of a list differs from the number of stages, or a temperature is not positive.
        """
        given = _tuples(values)
        if given.get("exits") is not None:
            promise = given["exits"].get("promise")
            given["exits"] = ExitFigures(**{**given["exits"], "promise": promise and Promise(**promise)})
        given["times"] = tuple(BatchTimes(**times) for times in given.get("times", ()))
        calibration = cls(**given)
        exits = calibration.exits
        lists: list[Sequence[Any]] = [calibration.temperatures, calibration.calibration_error, calibration.weights]
        lists += [exits.thresholds, exits.decided_share] if exits else []
        lists += [row[1:] for rows in calibration.shares.values() for row in rows]
        lists += [seconds for times in calibration.times for seconds in (times.stages, times.late)]
        if wrong := [len(numbers) for numbers in lists if len(numbers) not in (0, calibration.count)]:
            raise ValueError(f"{wrong[0]} numbers for {calibration.count} stages")
        if not all(temperature > 0 and math.isfinite(temperature) for temperature in calibration.temperatures):
            raise ValueError(f"temperatures that are not positive: {calibration.temperatures}")
        return calibration


def _tuples(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _tuples(value) for key, value in values.items()}
    return tuple(map(_tuples, values)) if isinstance(values, list | tuple) else values


def save_calibration(run: RunDirectory, calibration: Calibration) -> None:
    """Writes the calibration of the ensemble of the committed rounds to the run directory.

    Raises:
        UserError: the run has another number of committed rounds.
    """
    if calibration.count != run.committed():
        raise UserError(
            f"Expected a calibration of the {run.committed()} committed rounds of {run.root}, got one of "
            f"{calibration.count} stages. Give the run directory that the ensemble was loaded from."
        )
    run.write(run.calibration.stem, calibration.to_dict())


def load_calibration(run: RunDirectory) -> Calibration | None:
    """Reads the calibration of the ensemble of the committed rounds; None if there is none.

    Raises:
        RunError: the file is torn, or belongs to an ensemble with another number of stages.
    """
    path = run.calibration
    if not path.exists():
        return None
    try:
        calibration = Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
        if calibration.count != run.committed():
            raise ValueError(f"it is of {calibration.count} stages, {run.committed()} are committed")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} cannot be used ({error}). Remove it: the ensemble works without it, and "
            f"`bdistil calibrate --run_dir {run.root}` makes it again."
        ) from error
    return calibration


def exits_of(budget: Budget, calibration: Calibration) -> Exits | None:
    """Early exits of a budget; None if it sets no confidence.

    Raises:
        UserError: the budget has a rule without a confidence, or asks for fitted thresholds that do not exist or belong
            to another rule.
    """
    budget.check_rule()
    if budget.confidence is None:
        return None
    temperatures = tuple(calibration.temperature(number) for number in range(calibration.count))
    if budget.confidence != "fitted":
        rule, threshold = budget.rule or "max_prob", float(budget.confidence)
        return Exits(rule, (threshold,) * calibration.count, temperatures, calibration.shares_at(rule, threshold))
    fitted = calibration.exits
    if fitted is None:
        raise UserError(
            "Expected thresholds fitted on the validation part for confidence='fitted', but this ensemble has none. "
            "Fit them with `bdistil calibrate --run_dir DIR`, or give a number in (0, 1]."
        )
    if budget.rule not in (None, fitted.rule):
        raise UserError(
            f"The fitted thresholds are of the rule {fitted.rule!r}, but the budget has rule={budget.rule!r}. Leave "
            f"the rule out, or fit again with `bdistil calibrate --run_dir DIR --rule {budget.rule}`."
        )
    return Exits(fitted.rule, fitted.thresholds, temperatures, fitted.decided_share)
