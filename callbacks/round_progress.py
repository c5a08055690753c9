"""A progress bar with the round, the epoch and the accuracy of the prefix."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from bdistil.boosting.round import BoostingRound
from bdistil.metrics.quality import score_name


class RoundProgressBar(RichProgressBar):
    """Lightning's rich bar, for boosting runs: `round 3/6 · epoch 12/40` beside the metrics of the prefix.

    Args:
        refresh_rate: steps between two refreshes; each costs about 0.2 ms.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=False)

    def _get_train_description(self, current_epoch: int) -> str:
        module, epochs = self.trainer.lightning_module, self.trainer.max_epochs
        epoch = f"epoch {current_epoch + 1}" + (f"/{epochs}" if epochs and epochs > 0 else "")
        if isinstance(module, BoostingRound):
            return f"round {module.number + 1}/{module.settings.rounds} · {epoch}"
        return epoch

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The accuracy (or R²) of the prefix and its rms error to the teacher; all metrics of other modules."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if isinstance(pl_module, BoostingRound):
            names = {"val_accuracy": f"prefix {score_name(pl_module.settings.task)}", "val_rms": "rms"}
            metrics = {names[key]: value for key, value in metrics.items() if key in names}
        return metrics
