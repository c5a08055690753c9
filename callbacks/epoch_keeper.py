"""A callback that saves a fit after each epoch, so that it can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from bdistil.boosting.checks.trainer import finish_averages, refuse_pruning
from bdistil.data.loaders import begin_epoch
from bdistil.errors import UserError
from bdistil.storage.files import disk_errors, save_epoch
from bdistil.utils.resumption import FitProgress, advance_plateaus, plateau_metrics, uncount_empty_epoch
from bdistil.utils.seeding import reseed


class EpochKeeper(Checkpoint):
    """Saves a fit at the end of each epoch, and seeds each epoch from (key, epoch, rank).

    A killed fit resumes with the interrupted epoch, and gives the same result as an uninterrupted one::

        keeper = EpochKeeper(folder / "last.ckpt", seed, "teacher")
        Trainer(callbacks=[keeper]).fit(module, datamodule, ckpt_path=keeper.ckpt_path)

    This requires that the order of the samples is also a function of the epoch, as with
    `bdistil.data.loaders.indexed_loaders`. It is a ``Checkpoint``, so Lightning calls its hooks after those of other
    callbacks. The teacher of a recipe is trained with it, and `RoundController` is one.

    Args:
        path: path of the checkpoint, in a folder used for nothing else.
        key: values hashed into all seeds, for example the seed of the run and a name.
    """

    def __init__(self, path: Path, *key: object) -> None:
        self.path, self.key = path, key
        self.begin()

    def begin(self) -> None:
        """Begins a fit, whose checkpoint is loaded later."""
        self.state = FitProgress()
        self._first_epoch = True
        self._has_batches = False  # the epoch under way
        self._ended = False  # the training

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint of an interrupted fit; None if there is none."""
        return str(self.path) if self.path.exists() else None

    def state_dict(self) -> dict[str, Any]:
        """Progress of the fit."""
        return self.state.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the progress from a checkpoint."""
        self.state.load(state_dict)

    def _reseed(self, trainer: pl.Trainer) -> None:
        reseed(*self.key, self.state.epochs, trainer.global_rank)

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begins and seeds a fit, as configure_optimizers may create the loader."""
        if stage == "fit":
            self.begin()
            self._reseed(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds the first epoch, before its loader is created; a fit resumed after its end is not trained further."""
        self.state.restart_clock()
        self._reseed(trainer)
        trainer.should_stop |= self.state.done

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Advances schedules by the metrics of the last saved epoch.

        Raises:
            UserError: the checkpoint was written by another callback, before this one had counted the epoch; or a
                resumed fit has a callback whose state is in no checkpoint.
        """
        current: Any = trainer.fit_loop.epoch_progress.current
        trained = current.processed
        if trainer.ckpt_path is not None and trained != self.state.epochs:
            raise UserError(
                f"Expected the checkpoint that {type(self).__name__} writes, got one of another callback, in which it "
                f"has counted {self.state.epochs} of {trained} epochs: the order of the samples would repeat. Fit with "
                "its `ckpt_path`."
            )
        if self.state.epochs:
            refuse_pruning(trainer)
        advance_plateaus(trainer, self.state.metrics)
        self.state.metrics = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds the epochs after the first, and sets the order of the samples."""
        begin_epoch(trainer.train_dataloader, self.state.epochs)
        if not self._first_epoch:
            self._reseed(trainer)
        self._first_epoch = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records that the epoch has a batch: a fit resumed with `max_steps` first ends the last epoch again."""
        self._has_batches = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts and saves the epoch, unless it was empty."""
        if not self._has_batches:
            uncount_empty_epoch(trainer)
            return
        self._has_batches = False
        self.state.epochs += 1
        self.state.done, self.state.metrics = trainer.should_stop, plateau_metrics(trainer)
        self.save(trainer)
        self.state.metrics = []

    def save(self, trainer: pl.Trainer) -> None:
        """Saves a checkpoint; a disk error becomes a RunError."""
        with disk_errors("an epoch", self.path.parent):
            save_epoch(trainer, self.path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records the end of the training."""
        self._ended = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends a fit that was resumed after its end, for which Lightning does not call `on_train_end`."""
        if not self._ended:
            finish_averages(trainer, pl_module)
            self.on_train_end(trainer, pl_module)
