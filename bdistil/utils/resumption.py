"""What Lightning leaves out when a fit is resumed from the checkpoint of an epoch's end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
from torch.optim.lr_scheduler import ReduceLROnPlateau


def plateau_metrics(trainer: pl.Trainer) -> list[float | None]:
    """The metric with which each ReduceLROnPlateau will advance after this epoch; None for a schedule that will not.

    Lightning advances them after `on_train_epoch_end`, where checkpoints are saved, and not in a resumed fit.
    """
    epoch, metrics = trainer.current_epoch + 1, []
    for config in trainer.lr_scheduler_configs:
        due = config.reduce_on_plateau and config.interval == "epoch" and epoch % config.frequency == 0
        value = trainer.callback_metrics.get(str(config.monitor)) if due else None
        metrics.append(None if value is None else float(value))
    return metrics


def advance_plateaus(trainer: pl.Trainer, metrics: Sequence[float | None]) -> None:
    """Advances the schedules that have a metric: the step that a checkpoint of an epoch lacks."""
    for config, metric in zip(trainer.lr_scheduler_configs, metrics, strict=False):
        if metric is not None:
            cast(ReduceLROnPlateau, config.scheduler).step(metric)


def uncount_empty_epoch(trainer: pl.Trainer) -> None:
    """Takes back the count of an epoch that ended without a batch at the start of a resumed fit.

    With `max_steps`, Lightning ends the last epoch again there, and counts it twice.
    """
    if trainer.fit_loop.restarting:
        progress: Any = trainer.fit_loop.epoch_progress
        progress.current.processed -= 1
        progress.total.processed -= 1
