"""Fitting of one stage of MEKD: saves every epoch, keeps the weights of the best one, and resumes after a restart."""

from __future__ import annotations

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from bdistil.data.loaders import indexed_loaders
from bdistil.errors import RunError, UserError
from bdistil.storage.files import disk_errors, save_epoch, write_atomically
from bdistil.storage.weights import load_weights, save_weights
from bdistil.utils.seeding import seed_of

MakeTrainer = Callable[..., pl.Trainer]
GRID = 64  # samples in a picture


class EmulationStage(pl.LightningModule, ABC):
    """Base of the two stages."""

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The network trained by the stage, with the weights to save."""

    @abstractmethod
    def score(self, metrics: Mapping[str, float]) -> float:
        """Score of an epoch from the logged metrics; smaller is better."""

    def preview(self, count: int) -> Tensor | None:
        """Generated samples (count, ...) for a picture; None for a stage that generates none."""
        return None

    def on_fit_start(self) -> None:
        """Rejects several processes, whose latents and discriminators would diverge."""
        if self.trainer.world_size > 1:
            raise UserError("Expected one device for the stages of MEKD. Give the Trainer devices=1.")


class StageKeeper(Checkpoint):
    """Saves a stage after every epoch, keeps the weights of its best epoch, and draws generated samples.

    The best epoch is the first with the smallest score on the validation part. `pictures` is the number of epochs
    between two pictures.
    """

    def __init__(self, folder: Path, pictures: int = 10) -> None:
        self.folder, self.pictures = folder, pictures
        self.best, self.best_epoch = math.inf, -1

    def state_dict(self) -> dict[str, Any]:
        """The best epoch so far and its score."""
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best epoch so far."""
        self.best, self.best_epoch = state_dict["best"], state_dict["best_epoch"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scores the epoch, then saves the stage."""
        assert isinstance(pl_module, EmulationStage)
        score = pl_module.score({name: float(value) for name, value in trainer.callback_metrics.items()})
        epoch = trainer.current_epoch
        if not math.isfinite(score):
            raise RunError(
                f"Epoch {epoch} of {self.folder.name} ended with NaN or infinity on the validation part. The last good "
                "epoch is kept. Lower `lr`, and start again in a new `run_dir`."
            )
        with disk_errors(f"epoch {epoch} of {self.folder.name}", self.folder):
            if score < self.best:
                self.best, self.best_epoch = score, epoch
                save_weights(pl_module.trained, self.folder / "best.safetensors")
            save_epoch(trainer, self.folder / "last.ckpt")
        if epoch % self.pictures == 0 or epoch + 1 == trainer.max_epochs:
            samples = pl_module.preview(GRID)
            if samples is not None:
                show_samples(trainer, samples, self.folder / "samples.png")


def run_stage(
    stage: EmulationStage,
    data: pl.LightningDataModule,
    folder: Path,
    *,
    epochs: int,
    seed: int,
    make_trainer: MakeTrainer,
) -> dict[str, Any]:
    """Fits or resumes a stage unless it is finished; then loads the weights of its best epoch into it.

    `seed` determines the order of the samples. Returns the best epoch, its score, and the number of epochs.

    Raises:
        UserError: the Trainer does not validate after each epoch.
        RunError: the fit was interrupted, or an epoch ended with NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, last = folder / "done.json", folder / "last.ckpt"
    if not done.exists():
        resumed = ", resumed" if last.exists() else ""
        rank_zero_info(f"MEKD, {folder.name}{resumed}: training (max_epochs={epochs}) …")
        keeper = StageKeeper(folder)
        trainer = make_trainer(callbacks=[keeper], max_epochs=epochs, default_root_dir=str(folder))
        _check_validation(trainer)
        with indexed_loaders(data, seed_of(seed, folder.name)):
            trainer.fit(stage, data, ckpt_path=str(last) if last.exists() else None)
        if trainer.interrupted:
            raise RunError(f"{folder.name} was interrupted. Give the same command again: it goes on from there.")
        write_atomically(done, json.dumps({"epoch": keeper.best_epoch, "score": keeper.best, "epochs": epochs}))
        last.unlink(missing_ok=True)
        shutil.rmtree(folder / "lightning_logs", ignore_errors=True)
    load_weights(stage.trained, folder / "best.safetensors", f"the {folder.name} of this run")
    stage.cpu().eval()
    return dict(json.loads(done.read_text()))


def _check_validation(trainer: pl.Trainer) -> None:
    """Raises UserError for a Trainer that does not validate after each epoch."""
    every, batches = trainer.check_val_every_n_epoch, trainer.limit_val_batches
    if every != 1 or batches == 0:
        raise UserError(
            "Expected the Trainer of MEKD to validate after each epoch, as its stages keep the best one, got "
            f"check_val_every_n_epoch={every} and limit_val_batches={batches}. Leave both out."
        )


def show_samples(trainer: pl.Trainer, samples: Tensor, path: Path) -> None:
    """Writes samples (N, C, H, W), or sequences (N, steps, channels), as one picture; logs it if a logger can."""
    from torchvision.utils import save_image

    images = samples if samples.ndim == 4 else samples.transpose(1, 2).unsqueeze(1)
    images = images if images.shape[1] in (1, 3) else images[:, :1]
    with disk_errors(f"the picture {path.name}", path.parent):
        save_image(images, path, nrow=8, padding=1, normalize=True)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key="mekd/samples", images=[str(path)], step=trainer.global_step)
