"""Progress of a fit that is saved after each epoch, and what Lightning leaves out when such a fit is resumed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

import lightning.pytorch as pl
from torch.optim.lr_scheduler import ReduceLROnPlateau


@dataclass
class FitProgress:
    """Progress of a fit, as plain numbers stored in its checkpoints.

    Attributes:
        epochs: number of finished epochs.
        seconds: wall time before this start.
        done: whether the last epoch is finished.
        metrics: metrics with which schedules have yet to advance, see `plateau_metrics`.
    """

    epochs: int = 0
    seconds: float = 0.0
    done: bool = False
    metrics: list[float | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the time before this call, for example that of checks, from this start."""
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Wall seconds of all starts."""
        return self.seconds + time.perf_counter() - self._started

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self) | {"seconds": self.elapsed()}

    def load(self, values: dict[str, Any]) -> None:
        """Restores the values of a checkpoint."""
        for name in (known.name for known in fields(self) if known.name in values):  # older versions have fewer
            setattr(self, name, values[name])


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
