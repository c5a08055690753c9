"""What was fitted and measured of a finished ensemble, so that it can stop early: one small file of plain numbers.

The figures are of one ensemble: a further round makes them stale, so the commit of a round removes the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bdistil.ensemble.exit_rules import Rule
from bdistil.errors import RunError
from bdistil.storage.run_directory import RunDirectory


@dataclass(frozen=True)
class ExitFigures:
    """Thresholds fitted on the validation part, and what they gave there.

    Attributes:
        rule: exit rule that the thresholds are of.
        thresholds: one a stage; a sample is decided where its confidence reaches it. That of the last stage is 0, and a
            stage of `exit_rules.NEVER` decides nobody.
        target: what was asked for, in words: "lose at most 0.2 points".
        decided_share: of the validation samples, one a stage; sums to 1.
        accuracy: with these exits, in 0 … 1.
        full_accuracy: of all stages.
        average_macs: multiply-adds a sample with these exits.
        held_out_loss: points of accuracy lost against all stages, where thresholds are fitted on one half of the
            samples and used on the other.
    """

    rule: Rule
    thresholds: tuple[float, ...]
    target: str
    decided_share: tuple[float, ...]
    accuracy: float
    full_accuracy: float
    average_macs: float
    held_out_loss: float = 0.0


@dataclass(frozen=True)
class BatchTimes:
    """Seconds measured, warm, with a batch of one size.

    Attributes:
        batch: samples.
        stages: of each stage, one after the other; like all but `late` the lower quartile of the repeats.
        late: 99th percentile of each stage, by which deadlines are kept.
        check: of asking an exit rule once.
        compact: of taking the decided samples out of the batch once.
        schedules: of all stages by schedule; a schedule that the students cannot run is not there.
        schedule: the one to take where all stages are to run.
    """

    batch: int
    stages: tuple[float, ...]
    late: tuple[float, ...]
    check: float
    compact: float
    schedules: Mapping[str, float] = field(default_factory=dict)
    schedule: str = "one"


@dataclass(frozen=True)
class Calibration:
    """Everything that an ensemble knows of stopping early. Empty tuples stand for what was not fitted or measured.

    Attributes:
        count: T, the stages of the ensemble that the figures are of.
        exits: fitted thresholds.
        temperatures: one a stage: softmax(logits / temperature) is calibrated.
        calibration_error: expected calibration error of each stage on validation, before and after the temperatures.
        weights: one a student, where weighted prefixes won on validation; empty: all weigh the same.
        times: by batch size, smallest first.
        device: that `times` were measured on, for example ``cpu``.
    """

    count: int
    exits: ExitFigures | None = None
    temperatures: tuple[float, ...] = ()
    calibration_error: tuple[tuple[float, float], ...] = ()
    weights: tuple[float, ...] = ()
    times: tuple[BatchTimes, ...] = ()
    device: str = "cpu"

    def temperature(self, number: int) -> float:
        """Temperature of a stage, from 0; 1 where none was fitted."""
        return self.temperatures[number] if self.temperatures else 1.0

    def schedule(self, batch: int, device: str) -> str:
        """The schedule for a whole run: that of the size measured nearest to a batch, by their ratio."""
        if not self.times or device != self.device:
            return "one"
        return min(self.times, key=lambda t: abs(math.log(t.batch / max(batch, 1)))).schedule

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """What `to_dict` gave, also after JSON made lists of the tuples.

        Raises:
            TypeError: a key is missing or unknown.
            ValueError: as many numbers as stages were expected, and others came.
        """
        given = dict(values)
        if given.get("exits") is not None:
            given["exits"] = ExitFigures(**_tuples(given["exits"]))
        given["times"] = tuple(BatchTimes(**_tuples(times)) for times in given.get("times", ()))
        calibration = cls(**_tuples(given))
        calibration._check()
        return calibration

    def _check(self) -> None:
        exits = self.exits
        lists: list[Sequence[Any]] = [self.temperatures, self.calibration_error, self.weights]
        lists += [exits.thresholds, exits.decided_share] if exits else []
        lists += [numbers for times in self.times for numbers in (times.stages, times.late)]
        if wrong := [len(numbers) for numbers in lists if len(numbers) not in (0, self.count)]:
            raise ValueError(f"{wrong[0]} numbers for {self.count} stages")


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _tuple(value) for key, value in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list | tuple) else value


def save_calibration(run: RunDirectory, calibration: Calibration) -> None:
    """Writes the calibration of the ensemble of the committed rounds to the run directory."""
    run.keep_calibration(calibration.to_dict())


def load_calibration(run: RunDirectory) -> Calibration | None:
    """Reads the calibration of the ensemble of the committed rounds; None where there is none.

    Raises:
        RunError: the file is torn, or of an ensemble of another number of stages.
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
