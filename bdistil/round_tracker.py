"""Shows a boosting run in the loggers of its Trainers, round after round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from bdistil.run_logger import RunLogger
from bdistil.storage.run_directory import RunDirectory
from bdistil.tracking import CurveTracker


def shown_step(trainer: pl.Trainer) -> int:
    """Where the step axis of the loggers is: it goes on over the rounds of a run, `trainer.global_step` does not."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


class RoundTracker:
    """One curve over the fits of all rounds.

    Args:
        run: the run directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._tracker: CurveTracker | None = None
        self._loggers: list[Logger] | None = None

    def start(self, trainer: pl.Trainer, number: int) -> None:
        """Takes the loggers of this round's Trainer; after a restart the committed rounds are shown again."""
        records = [self.run.record(t) for t in range(number)]
        first = self._tracker is None
        if self._loggers != trainer.loggers:
            self._tracker, self._loggers = CurveTracker(trainer.loggers), trainer.loggers
        assert self._tracker is not None
        for logger in trainer.loggers:
            self._tracker.define(logger)
        if first:
            self._tracker.restore(records)
        # Each Trainer counts its steps from 0; the step axis of the loggers goes on where the rounds before ended.
        # There is no public way to say so, or to ask for it (lightning 2.6).
        trainer.fit_loop.epoch_loop._batches_that_stepped = sum(record["steps"] for record in records)

    def catch_up(self, logger: RunLogger) -> None:
        """Shows the rounds of a finished run that the server of W&B lacks; nothing where it is out of reach."""
        tracker = CurveTracker([logger])
        if logger.lost or logger.experiment.offline:
            tracker.finish()
            return
        self._tracker, self._loggers = tracker, [logger]
        tracker.define(logger)
        tracker.restore([self.run.record(t) for t in range(self.run.committed())])

    def committed(self, trainer: pl.Trainer, row: Mapping[str, Any], number: int) -> None:
        """Shows a committed round: its row, and its student as an artifact."""
        assert self._tracker is not None
        self._tracker.round(row, number + 1, shown_step(trainer))
        if trainer.is_global_zero:
            self._tracker.student(self.run.folder(number), number + 1, row)

    def finish(self) -> None:
        """Shows table and plot of the whole curve."""
        if self._tracker is not None and self.run.curve.exists():
            self._tracker.curve(self.run.read_curve(), self.run.task)

    def close(self) -> None:
        """Ends the tracker's run."""
        if self._tracker is not None:
            self._tracker.finish()
