"""Makes a plain fit survive a kill: the callback behind the training of a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from bdistil.storage.checkpoint import save_epoch
from bdistil.storage.files import disk_errors
from bdistil.utils.seeding import reseed


class EpochKeeper(Checkpoint):
    """Saves a fit at the end of each epoch, and draws the randomness of each from (key, epoch, rank).

    A fit that was killed goes on with the epoch that was under way and ends as it would have ended::

        keeper = EpochKeeper(folder / "last.ckpt", seed, "teacher")
        Trainer(callbacks=[keeper]).fit(module, datamodule, ckpt_path=keeper.ckpt_path)

    The order of the samples is a function of the epoch too where the loader's sampler is, as those of
    `bdistil.data.loaders.indexed_loaders` are.

    Args:
        path: of the checkpoint; in a folder of its own.
        key: what the randomness is for, for example the seed of the run and a name.
    """

    def __init__(self, path: Path, *key: object) -> None:
        self.path, self.key = path, key
        self.epochs, self._fresh = 0, True

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint of a fit that was killed, where there is one."""
        return str(self.path) if self.path.exists() else None

    def state_dict(self) -> dict[str, Any]:
        """How many epochs are over."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint was written."""
        self.epochs = int(state_dict["epochs"])

    def _reseed(self, trainer: pl.Trainer) -> None:
        reseed(*self.key, self.epochs, trainer.global_rank)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Seeds, as configure_optimizers may make the loader."""
        self._reseed(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds the first epoch, before its loader is made."""
        self._reseed(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds the epochs after the first."""
        if not self._fresh:
            self._reseed(trainer)
        self._fresh = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves.

        Raises:
            RunError: the disk refused.
        """
        self.epochs += 1
        with disk_errors("an epoch", self.path.parent):
            save_epoch(trainer, self.path)
