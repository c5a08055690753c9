"""Logs the rounds of a boosting run to the loggers of its Trainers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from bdistil.metrics.quality import score_name
from bdistil.reporting.tracking import RunLogger
from bdistil.storage.run_directory import RunDirectory


def logger_step(trainer: pl.Trainer) -> int:
    """Current step of the loggers, which continues over the rounds of a run, unlike `trainer.global_step`."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


class RoundTracker:
    """Logs committed rounds: metrics to all loggers; curve and students to W&B. Failures are warnings.

    Args:
        run: the run directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.loggers: Sequence[Logger] = ()
        self._started, self._warned, self._keep_students = False, False, True

    def start(self, trainer: pl.Trainer, number: int) -> None:
        """Uses the loggers of this round's Trainer; the first call in a process logs the committed rounds again.

        Args:
            trainer: Trainer of the round.
            number: index of the round, from 0.
        """
        records = [self.run.record(t) for t in range(number)]
        tries = [record.get("spent_on_tries", {}).get("steps", 0) for record in records]
        steps = [0, *accumulate(record["steps"] + extra for record, extra in zip(records, tries, strict=True))]
        self.loggers = trainer.loggers
        if not self._started:
            self._started = True
            for record, step in zip(records, steps[1:], strict=True):
                self.log_round(record["curve"], record["round"] + 1, step)
        # Each Trainer counts its steps from 0; the step axis of the loggers continues where the last round ended.
        # No public API sets or reads it (lightning 2.6).
        trainer.fit_loop.epoch_loop._batches_that_stepped = steps[-1] + int(self.run.spent(number)["steps"])

    def committed(self, trainer: pl.Trainer, row: Mapping[str, Any], number: int) -> None:
        """Logs a committed round: its row of the curve, and its student as an artifact.

        Args:
            trainer: Trainer of the round.
            row: row of curve.csv.
            number: index of the round, from 0.
        """
        self.log_round(row, number + 1, logger_step(trainer))
        self._log_student(self.run.folder(number), number + 1, row)

    def log_round(self, row: Mapping[str, Any], number: int, step: int) -> None:
        """Logs `round` and `round/<key>` for each number in a row of the curve, with `round` as x axis.

        Args:
            row: row of curve.csv; non-numeric cells are skipped.
            number: number of the round, from 1.
            step: step of the loggers at which the round ended.
        """
        metrics = {f"round/{key}": float(value) for key, value in row.items() if isinstance(value, (int, float))}
        for logger in self.loggers:
            with self._harmless(logger):
                for run in _wandb_runs([logger]):
                    run.define_metric("round")
                    for key in metrics:  # one by one: W&B would apply the glob "*" to some of them, not "round/*"
                        summary = "max" if key == "round/val_accuracy" else None
                        run.define_metric(key, step_metric="round", summary=summary)
                logger.log_metrics({"round": number, **metrics}, step)
                logger.save()  # some loggers write only at the end of a fit

    def _log_student(self, folder: Path, number: int, metadata: Mapping[str, Any]) -> None:
        try:
            for run in _wandb_runs(self.loggers) if self._keep_students else ():
                _log_artifact(run, folder, number, metadata)
        except Exception as error:
            self._keep_students = False  # each further attempt could wait for a minute
            rank_zero_warn(
                f"The student of round {number} was not logged to W&B, and those of later rounds will not be: they are "
                f"in {folder.parent}. {type(error).__name__}: {error}"
            )

    def finish(self) -> None:
        """Logs the rows of curve.csv as a W&B table, and accuracy (or R²) over MACs as a line plot.

        The summary of the W&B run becomes that of the ensemble: the student logged last may have been rejected.
        """
        if not self.run.curve.exists():
            return
        try:
            for run in _wandb_runs(self.loggers):
                _log_curve(run, self.run.read_curve(), score_name(self.run.task))
                run.summary.update(_final_figures(self.run.rows()[-1]))
        except Exception as error:
            rank_zero_warn(f"The curve was not logged to W&B: {self.run.curve}. {type(error).__name__}: {error}")

    def close(self) -> None:
        """Ends the W&B run; call it in a `finally` block, so that an exception marks the run as failed."""
        failed = sys.exc_info()[0] is not None
        for logger in self.loggers:
            with self._harmless(logger):
                for run in _wandb_runs([logger]):
                    run.finish(exit_code=int(failed))

    @contextmanager
    def _harmless(self, logger: Logger) -> Iterator[None]:
        """Turns an exception into a warning, once."""
        try:
            yield
        except Exception as error:
            if isinstance(logger, RunLogger):
                logger.lose(error)
            elif not self._warned:
                self._warned = True
                rank_zero_warn(f"{type(logger).__name__} failed, training continues. {type(error).__name__}: {error}")


def _wandb_runs(loggers: Sequence[Logger]) -> list[Any]:
    """W&B runs of the loggers, on rank zero; loggers that have failed are skipped."""
    working = [logger for logger in loggers if isinstance(logger, WandbLogger) and not getattr(logger, "lost", False)]
    return [logger.experiment for logger in working if getattr(rank_zero_only, "rank", 0) == 0]


def _log_artifact(run: Any, folder: Path, number: int, metadata: Mapping[str, Any]) -> None:
    from wandb import Artifact

    artifact = Artifact(f"student-{run.id}", type="student", metadata=dict(metadata))
    for file in sorted(folder.iterdir()):  # a committed file never changes, so W&B need not copy it
        artifact.add_file(str(file), name=file.name, policy="immutable")
    run.log_artifact(artifact, aliases=[f"round-{number}", "latest"])


def _log_curve(run: Any, rows: Sequence[Mapping[str, str]], score: str) -> None:
    from wandb import Table, plot

    cells = {key: _numbers([row[key] for row in rows]) for key in rows[0]}
    table = Table(columns=[*cells], data=[[*row] for row in zip(*cells.values(), strict=True)])
    line = plot.line(table, "macs", "val_accuracy", title=f"{score.capitalize()} over multiply-adds per sample")
    run.log({"curve": table, "accuracy_vs_macs": line})


def _final_figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row of the curve under the keys of an epoch."""
    keys = {"val_accuracy": "val_accuracy", "val_loss": "val_loss", "val_rms": "rms_error"}
    return {key: row[column] for key, column in keys.items() if column in row}


def _numbers(cells: Sequence[str]) -> Sequence[float | str | None]:
    """A column as numbers if all cells are numeric, else as text: a W&B table has one type per column."""
    try:
        return [float(cell) if cell else None for cell in cells]
    except ValueError:
        return [cell or None for cell in cells]
