"""A progress bar with the round, the epoch and the accuracy of the prefix."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from bdistil.boosting.round import BoostingRound
from bdistil.metrics.quality import score_name


class RoundProgressBar(RichProgressBar):
    """Lightning's RichProgressBar for boosting runs: shows the round, the epoch and the metrics of the prefix.

    Args:
        refresh_rate: steps between two refreshes; each costs about 0.2 ms.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=False)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Round, accuracy (or R²) and rms error of the prefix; for modules other than rounds, all metrics."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if isinstance(pl_module, BoostingRound):
            names = {"val_accuracy": f"prefix {score_name(pl_module.settings.task)}", "val_rms": "rms"}
            scores = {names[key]: value for key, value in metrics.items() if key in names}
            metrics = {"round": f"{pl_module.number + 1}/{pl_module.settings.rounds}", **scores}
        return metrics
