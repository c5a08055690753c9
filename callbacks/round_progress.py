"""A progress bar that names the round, the epoch and the accuracy of the prefix."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from bdistil.rounds import BoostingRound


class RoundProgressBar(RichProgressBar):
    """Lightning's rich bar, for boosting runs: `round 3/6 · epoch 12/40` beside the metrics of the prefix.

    Args:
        refresh_rate: steps between two refreshes; each costs about 0.2 ms.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=False)

    def _get_train_description(self, current_epoch: int) -> str:
        module = self._trainer.lightning_module if self._trainer is not None else None
        epoch = super()._get_train_description(current_epoch).replace("Epoch", "epoch")
        if not isinstance(module, BoostingRound):
            return epoch
        return f"round {module.number + 1}/{module.settings.rounds} · {epoch}"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The logged metrics, without the version number, in short."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        names = {"val_accuracy": "prefix accuracy", "val_loss": "prefix loss", "val_rms": "prefix rms"}
        return {names.get(key, key): value for key, value in metrics.items()}
