"""Shows a boosting run in the loggers of its Trainers, round after round."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from bdistil.metrics.quality import score_name
from bdistil.reporting.wandb_logger import RunLogger
from bdistil.storage.run_directory import RunDirectory


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


# A student that takes W&B as long as this to refuse is one for a server that has gone.
SLOW_SECONDS = 5.0


def _runs(loggers: Sequence[Logger]) -> list[Any]:
    """The W&B runs behind loggers, on rank zero: what can `define_metric`."""
    working = [logger for logger in loggers if not getattr(logger, "lost", False)]
    found = [getattr(logger, "experiment", None) for logger in working if getattr(rank_zero_only, "rank", 0) == 0]
    return [run for run in found if hasattr(run, "define_metric")]


class CurveTracker:
    """Shows rounds: metrics in all loggers, curve and students in W&B. Whatever fails is a warning, the first time."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers, self.step, self.warned, self.artifacts = loggers, 0, False, True
        self.defined = {"round/val_accuracy"}

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            gone = [logger for logger in self.loggers if isinstance(logger, RunLogger) and _is_gone(error)]
            for logger in gone:  # the process of W&B, which takes what is logged
                logger.lose(error)
            if not gone and not self.warned:
                self.warned = True
                rank_zero_warn(f"Tracking failed, the run goes on without. {type(error).__name__}: {error}")

    def define(self, logger: Logger) -> None:
        """Makes `round` the x axis of what is logged about rounds."""
        with self._harmless():
            for run in _runs([logger]):
                run.define_metric("round")
                run.define_metric("round/*", step_metric="round")
                run.define_metric("round/val_accuracy", step_metric="round", summary="max")

    def round(self, metrics: Mapping[str, Any], number: int, step: int, *, again: bool = False) -> None:
        """Logs `round` and `round/<key>` of metrics that are numbers. `again`: unless a W&B run has them already."""
        self.step = max(self.step, step)
        row = {f"round/{key}": float(value) for key, value in metrics.items() if isinstance(value, (int, float))}
        for logger in self.loggers:
            with self._harmless():
                self._log(logger, {"round": number, **row}, again)

    def _log(self, logger: Logger, row: dict[str, float], again: bool) -> None:
        for run in _runs([logger]):
            if again and (run.summary.get("round") or 0) >= row["round"]:
                return
            for key in row.keys() - self.defined - {"round"}:  # as W&B takes either of two globs, "*" and "round/*"
                run.define_metric(key, step_metric="round")
                self.defined.add(key)
        logger.log_metrics(row, self.step)
        logger.save()  # some write at the end of a fit only

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Logs the rounds before a restart, by `round`, `steps` and `curve` of round.json: offline runs start empty."""
        with self._harmless():
            for record, step in zip(records, accumulate(record["steps"] for record in records), strict=True):
                self.round(record["curve"], record["round"] + 1, step, again=True)

    def curve(self, rows: Sequence[Mapping[str, str]], task: str = "classification") -> None:
        """Shows the rows of curve.csv as a table, and accuracy (or R²) over MACs."""
        with self._harmless():
            for run in _runs(self.loggers):
                from wandb import Table, plot

                cells = {key: _numbers([row[key] for row in rows]) for key in rows[0]}
                table = Table(columns=[*cells], data=[[*row] for row in zip(*cells.values(), strict=True)])
                title = score_name(task).capitalize()
                line = plot.line(table, "macs", "val_accuracy", title=f"{title} over multiply-adds per sample")
                run.log({"curve": table, "accuracy_vs_macs": line})

    def student(self, folder: Path, number: int, metadata: Mapping[str, Any]) -> None:
        """Keeps the folder of a committed round as an artifact. A refusal that took long is the last one waited for."""
        started = time.monotonic()
        with self._harmless():
            runs = _runs(self.loggers) if self.artifacts else []
            try:
                for run in runs:
                    _keep(run, folder, number, metadata)
            except Exception as error:
                if _is_gone(error):
                    raise
                self.artifacts = time.monotonic() - started < SLOW_SECONDS
                later = "" if self.artifacts else ", nor will those of later rounds be"
                rank_zero_warn(
                    f"The student of round {number} is not in W&B{later}: they are in {folder.parent}. "
                    f"{type(error).__name__}: {error}"
                )

    def finish(self, exit_code: int | None = None) -> None:
        """Closes the run, for a `finally`: as failed where an exception is under way. Waits a minute for uploads."""
        code = int(sys.exc_info()[0] is not None) if exit_code is None else exit_code
        with self._harmless():
            for logger in self.loggers:
                for run in _runs([logger]):
                    (logger if isinstance(logger, RunLogger) else run).finish(exit_code=code)


def _keep(run: Any, folder: Path, number: int, metadata: Mapping[str, Any]) -> None:
    from wandb import Artifact

    artifact = Artifact(f"student-{run.id}", type="student", metadata=dict(metadata))
    for file in sorted(folder.iterdir()):  # a committed file never changes, so W&B need not copy it
        artifact.add_file(str(file), name=file.name, policy="immutable")
    run.log_artifact(artifact, aliases=[f"round-{number}", "latest"])


def _is_gone(error: Exception) -> bool:
    """Whether the process of W&B has ended: its socket is broken, or it has gone while something waited for it."""
    return isinstance(error, OSError) or type(error).__module__.startswith("wandb.sdk.mailbox.")


def _numbers(cells: Sequence[str]) -> Sequence[float | str | None]:
    """A column as numbers where all cells are, else as text: a W&B table has one type a column."""
    try:
        return [float(cell) if cell else None for cell in cells]
    except ValueError:
        return [cell or None for cell in cells]
