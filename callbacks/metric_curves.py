"""Accuracy against cost, point by point, over any number of fits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from bdistil.errors import UserError
from bdistil.metrics.curve import curve_figures


class MetricCurves(pl.Callback):
    """Collects one (cost, accuracy) point per fit, and logs area under the curve and violations of monotony.

    Works with any LightningModule: pass one instance to the Trainers of several fits of growing cost. RoundController
    itself logs the same figures after each committed round.

    Args:
        metric: key among ``trainer.callback_metrics`` that is the accuracy of a fit.
        cost: key among them that is its cost; `ComputeCost` logs ``cost/macs``.
        tolerance: a fall of the accuracy by more than this violates monotony.
    """

    def __init__(self, metric: str = "val_accuracy", cost: str = "cost/macs", tolerance: float = 0.0) -> None:
        self.metric, self.cost, self.tolerance = metric, cost, tolerance
        self.points: list[tuple[float, float]] = []

    @property
    def state_key(self) -> str:
        """Two instances may follow two metrics."""
        return f"MetricCurves[{self.metric},{self.cost}]"

    def state_dict(self) -> dict[str, Any]:
        """The points so far, as plain numbers."""
        return {"points": [list(point) for point in self.points]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the points of a checkpoint."""
        self.points = [(float(cost), float(value)) for cost, value in state_dict["points"]]

    def add(self, cost: float, accuracy: float) -> dict[str, float]:
        """Adds a point, with more MACs than the one before and an accuracy in 0 … 1; returns the figures so far."""
        self.points.append((float(cost), float(accuracy)))
        costs, values = zip(*self.points, strict=True)
        return curve_figures(costs, values, self.tolerance)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the point of this fit, from what was logged."""
        missing = [key for key in (self.metric, self.cost) if key not in trainer.callback_metrics]
        if missing:
            raise UserError(
                f"MetricCurves found no metric {missing[0]!r}; logged were {sorted(trainer.callback_metrics)}. "
                "Log it, or give `metric` and `cost` as they are logged (ComputeCost logs cost/macs)."
            )
        figures = self.add(*(float(trainer.callback_metrics[key]) for key in (self.cost, self.metric)))
        for logger in trainer.loggers:
            logger.log_metrics({f"curve/{key}": value for key, value in figures.items()}, step=trainer.global_step)
