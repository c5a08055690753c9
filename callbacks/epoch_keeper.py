"""A callback that saves a fit after each epoch, so that it can be resumed; used to train teachers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from bdistil.boosting.checks.trainer import finish_averages
from bdistil.data.loaders import begin_epoch
from bdistil.storage.files import disk_errors, save_epoch
from bdistil.utils.resumption import advance_plateaus, plateau_metrics, uncount_empty_epoch
from bdistil.utils.seeding import reseed


class EpochKeeper(Checkpoint):
    """Saves a fit at the end of each epoch, and seeds each epoch from (key, epoch, rank).

    A killed fit resumes with the interrupted epoch, and gives the same result as an uninterrupted one::

        keeper = EpochKeeper(folder / "last.ckpt", seed, "teacher")
        Trainer(callbacks=[keeper]).fit(module, datamodule, ckpt_path=keeper.ckpt_path)

    This requires that the order of the samples is also a function of the epoch, as with
    `bdistil.data.loaders.indexed_loaders`.

    Args:
        path: path of the checkpoint, in a folder used for nothing else.
        key: values hashed into all seeds, for example the seed of the run and a name.
    """

    def __init__(self, path: Path, *key: object) -> None:
        self.path, self.key = path, key
        self._begin()

    def _begin(self) -> None:
        self.epochs, self._first, self._trained, self._ended = 0, True, False, False
        self._before, self._started = 0.0, time.perf_counter()
        self._done, self._metrics = False, list[float | None]()  # as in `RoundState`

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint of an interrupted fit; None if there is none."""
        return str(self.path) if self.path.exists() else None

    def elapsed(self) -> float:
        """Wall seconds since the training began, plus those of earlier starts up to their last epoch."""
        return self._before + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Finished epochs, elapsed seconds, whether the fit is over, and metrics that its schedules have yet to see."""
        return {"epochs": self.epochs, "seconds": self.elapsed(), "done": self._done, "metrics": self._metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the values of a checkpoint."""
        self.epochs, self._before = int(state_dict["epochs"]), float(state_dict["seconds"])
        self._done, self._metrics = bool(state_dict["done"]), list(state_dict["metrics"])

    def _reseed(self, trainer: pl.Trainer) -> None:
        reseed(*self.key, self.epochs, trainer.global_rank)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begins a fit, whose checkpoint is loaded later; seeds it, as configure_optimizers may create the loader."""
        if stage == "fit":
            self._begin()
        self._reseed(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds the first epoch, before its loader is created; a fit resumed after its end is not trained further."""
        self._reseed(trainer)
        trainer.should_stop |= self._done

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock; advances schedules by the metrics of the last saved epoch."""
        self._started = time.perf_counter()
        advance_plateaus(trainer, self._metrics)
        self._metrics = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds the epochs after the first, and sets the order of the samples."""
        begin_epoch(trainer.train_dataloader, self.epochs)
        if not self._first:
            self._reseed(trainer)
        self._first = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records that the epoch has a batch: a fit resumed with `max_steps` first ends the last epoch again."""
        self._trained = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves a checkpoint; a disk error becomes a RunError."""
        if not self._trained:
            uncount_empty_epoch(trainer)
            return
        self.epochs, self._trained = self.epochs + 1, False
        self._done, self._metrics = trainer.should_stop, plateau_metrics(trainer)
        with disk_errors("an epoch", self.path.parent):
            save_epoch(trainer, self.path)
        self._metrics = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records that callbacks have replaced the weights by their average."""
        self._ended = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replaces the weights by their average in a fit that was resumed after its end."""
        if not self._ended:
            finish_averages(trainer, pl_module)
