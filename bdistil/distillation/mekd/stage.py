"""One stage of MEKD as a fit of its own: saved after every epoch, its best epoch kept, finished once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bdistil.data.loaders.attach import indexed_loaders
from bdistil.distillation.mekd import Deprivatization, MappingEmulation
from bdistil.errors import RunError
from bdistil.storage.checkpoint import save_epoch
from bdistil.storage.files import disk_errors, write_atomically
from bdistil.storage.weights import load_weights, save_weights
from bdistil.utils.seeding import seed_of

Stage = Deprivatization | MappingEmulation
MakeTrainer = Callable[..., pl.Trainer]
GRID = 64  # samples in a picture


class StageKeeper(Checkpoint):
    """Saves the stage under way, keeps the weights of its best epoch, and shows what a generator makes.

    The best epoch is the one of the smallest score on the validation part; the first of equals.

    Args:
        folder: of the stage.
        score: smaller is better; of the metrics that the stage logged.
        pictures: epochs between two pictures.
    """

    def __init__(self, folder: Path, score: Callable[[dict[str, float]], float], pictures: int = 10) -> None:
        self.folder, self.score, self.pictures = folder, score, pictures
        self.best, self.best_epoch = math.inf, -1

    def state_dict(self) -> dict[str, Any]:
        """The best epoch so far."""
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint of this stage was written."""
        self.best, self.best_epoch = state_dict["best"], state_dict["best_epoch"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judges the epoch, then saves the stage."""
        assert isinstance(pl_module, Stage)
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        score, epoch = self.score(figures), trainer.current_epoch
        if not math.isfinite(score):
            raise RunError(
                f"Epoch {epoch} of {self.folder.name} ended with NaN or infinity on the validation part. The last good "
                "epoch is kept. Lower `lr`, and start again in a new `run_dir`."
            )
        last = epoch + 1 == trainer.max_epochs
        with disk_errors(f"epoch {epoch} of {self.folder.name}", self.folder):
            if score < self.best:
                self.best, self.best_epoch = score, epoch
                save_weights(pl_module.kept, self.folder / "best.safetensors")
            save_epoch(trainer, self.folder / "last.ckpt")
        if isinstance(pl_module, Deprivatization) and (last or epoch % self.pictures == 0):
            show_samples(trainer, pl_module.preview(GRID), self.folder / "samples.png")


def run_stage(
    stage: Stage,
    data: pl.LightningDataModule,
    folder: Path,
    *,
    epochs: int,
    seed: int,
    score: Callable[[dict[str, float]], float],
    make_trainer: MakeTrainer,
) -> dict[str, Any]:
    """Fits a stage, or goes on with it, or finds it finished; its best weights are loaded into it.

    Args:
        stage: the module.
        data: training and validation loaders yield (x, y).
        folder: of the stage; made here.
        epochs: of the stage.
        seed: of the order of samples.
        score: of an epoch's figures; smaller is better.
        make_trainer: takes arguments of a Trainer.

    Returns:
        The best epoch and its score.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, last = folder / "done.json", folder / "last.ckpt"
    if not done.exists():
        begun = ", which was begun before" if last.exists() else ""
        rank_zero_info(f"MEKD, {folder.name}{begun}: training for {epochs} epochs …")
        keeper = StageKeeper(folder, score)
        trainer = make_trainer(callbacks=[keeper], max_epochs=epochs, default_root_dir=str(folder))
        with indexed_loaders(data, seed_of(seed, folder.name)):
            trainer.fit(stage, data, ckpt_path=str(last) if last.exists() else None)
        if trainer.interrupted:
            raise RunError(f"{folder.name} was interrupted. Give the same command again: it goes on from there.")
        write_atomically(done, json.dumps({"epoch": keeper.best_epoch, "score": keeper.best, "epochs": epochs}))
        last.unlink(missing_ok=True)
        shutil.rmtree(folder / "lightning_logs", ignore_errors=True)
    load_weights(stage.kept, folder / "best.safetensors", f"the {folder.name} of this run")
    stage.cpu().eval()
    return dict(json.loads(done.read_text()))


def sample_grid(samples: Tensor, columns: int = 8) -> np.ndarray:
    """Samples (N, C, H, W), or sequences (N, steps, channels), as one picture (rows, columns[, 3]) in 0 … 1."""
    pictures = samples.float().cpu()
    pictures = pictures if pictures.ndim == 4 else pictures.transpose(1, 2).unsqueeze(1)
    pictures = pictures if pictures.shape[1] in (1, 3) else pictures[:, :1]
    low, high = pictures.amin(), pictures.amax()
    pictures = (pictures - low) / (high - low).clamp_min(1e-12)
    pictures = torch.nn.functional.pad(pictures, (1, 1, 1, 1))
    rows = [torch.cat(list(row), 2) for row in pictures[: len(pictures) // columns * columns].split(columns)]
    grid = torch.cat(rows, 1).movedim(0, -1).numpy()
    return grid[..., 0] if grid.shape[-1] == 1 else grid


def show_samples(trainer: pl.Trainer, samples: Tensor, path: Path) -> None:
    """Writes a picture of generated samples, and gives it to the loggers that take pictures."""
    from matplotlib.image import imsave

    grid = sample_grid(samples)
    with disk_errors(f"the picture {path.name}", path.parent):
        imsave(path, np.repeat(grid[..., None], 3, -1) if grid.ndim == 2 else grid)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key="mekd/samples", images=[str(path)], step=trainer.global_step)
