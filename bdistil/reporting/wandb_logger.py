"""W&B for a run that is started again and again: its step never goes back, and its failures end nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from bdistil.reporting.wandb_state import FLUSH_SETTING, KEPT_SECONDS_WITHOUT, RunNotes


class RunLogger(WandbLogger):
    """Logs to a W&B run that all starts of a run directory share.

    A start that goes on trains the epoch again that was under way. What the start before has shown of it is not shown
    again, and what is shown once more of committed rounds stands where that start ended: an offline start is a folder
    of its own, and all of them together are one run. Rows that a kill left unwritten come first.

    Args:
        folder: the run directory; ``wandb_step.json`` in it keeps how far W&B is.
        options: of `WandbLogger`.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(save_dir=folder, **options)
        self.lost = False
        self._notes = RunNotes(folder)
        self._guarded(self._go_on)
        self._reached = self._notes.reached

    @rank_zero_only
    def _go_on(self) -> None:
        run, settings = self.experiment, self.experiment.settings
        if run.disabled:  # by the command `wandb disabled`: nothing is noted as logged
            self.lost = True
            return
        if not hasattr(settings, FLUSH_SETTING):
            self._notes.kept = KEPT_SECONDS_WITHOUT
        log = getattr(settings, "sync_file", None)  # W&B's own name, which may go
        missing = self._notes.begin(Path(log) if log else None, None if run.offline else run.starting_step)
        if self._notes.rows > 0:
            run.log({}, step=self._notes.rows - len(missing))
        for row in missing:
            run.log(row)

    def _guarded(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.lost:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:
            self.lose(error)

    def lose(self, error: Exception) -> None:
        """W&B is gone for the rest of this start: says so, once."""
        if not self.lost:
            self.lost = True
            rank_zero_warn(
                f"W&B is gone ({type(error).__name__}: {error}), the run goes on without it. What this start logs "
                f"after step {max(self._notes.reached, 0)} is not there. curve.csv and report.html lack nothing, and "
                "the next start of this run shows the committed rounds again, and rows before that step which W&B has "
                "not kept."
            )
            with suppress(Exception):  # or it fails when Python ends, with a traceback
                self._end()

    @rank_zero_only
    def _end(self) -> None:
        import wandb

        wandb.teardown()

    @rank_zero_only
    def finish(self, exit_code: int) -> None:
        """Ends the W&B run of this start; says so where uploads take longer than its settings allow."""
        run, started, place = self.experiment, time.monotonic(), Path(self.experiment.dir).parent
        patience = run.settings.finish_timeout
        run.finish(exit_code=exit_code)
        if run.offline:
            return
        if 0 < patience <= time.monotonic() - started:
            rank_zero_warn(
                f"W&B did not take all rows within {patience:.0f} s. They are in {place}, and the next start of this "
                "run uploads what the server lacks, also where all rounds are done."
            )
            return
        with suppress(OSError):  # the next start then looks once more
            self._notes.sent()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs a row, unless a start before has shown it of that step of a fit."""
        if step is not None:
            if "round" not in metrics and self._notes.shown(metrics, step):
                return
            step = max(step, self._reached)
        self._guarded(self._log, metrics, step)

    @rank_zero_only
    def _log(self, metrics: Mapping[str, float], step: int | None) -> None:
        super().log_metrics(self._notes.add(metrics, step), step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """As `WandbLogger`."""
        self._guarded(super().log_hyperparams, *args, **kwargs)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """As `WandbLogger`."""
        self._guarded(super().after_save_checkpoint, checkpoint_callback)

    def finalize(self, status: str) -> None:
        """As `WandbLogger`."""
        self._guarded(super().finalize, status)
