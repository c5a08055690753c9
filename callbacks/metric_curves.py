"""Area under the curve of accuracy against cost, over several fits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from bdistil.errors import UserError
from bdistil.metrics.curve import curve_figures


class MetricCurves(pl.Callback):
    """Collects one (cost, accuracy) point for each fit, and logs the area under the curve and its falls.

    Works with any LightningModule: give one instance to the Trainers of several fits of increasing cost. The
    RoundController logs the same figures after each committed round.

    Args:
        metric: key of the accuracy in ``trainer.callback_metrics``.
        cost: key of the cost in them; `ComputeCost` logs ``cost/macs``.
        tolerance: a decrease of the accuracy by more than this counts as a fall.

    Example:
        >>> curves = MetricCurves()
        >>> figures = curves.add(cost=1000, accuracy=0.8)
        >>> figures = curves.add(cost=10_000, accuracy=0.9)
        >>> {name: round(value, 4) for name, value in figures.items()}
        {'area': 0.85, 'violations': 0.0}
    """

    def __init__(self, metric: str = "val_accuracy", cost: str = "cost/macs", tolerance: float = 0.0) -> None:
        self.metric, self.cost, self.tolerance = metric, cost, tolerance
        self.points: list[tuple[float, float]] = []

    @property
    def state_key(self) -> str:
        """Distinct for instances with different metrics in one Trainer."""
        return f"MetricCurves[{self.metric},{self.cost}]"

    def state_dict(self) -> dict[str, Any]:
        """The points so far."""
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
        """Adds the point of this fit from the logged metrics."""
        missing = [key for key in (self.metric, self.cost) if key not in trainer.callback_metrics]
        if missing:
            raise UserError(
                f"MetricCurves expected {missing[0]!r} among logged metrics, got {sorted(trainer.callback_metrics)}. "
                "Log it, or set `metric` and `cost` to logged names (ComputeCost logs cost/macs)."
            )
        figures = self.add(*(float(trainer.callback_metrics[key]) for key in (self.cost, self.metric)))
        for logger in trainer.loggers:
            logger.log_metrics({f"curve/{key}": value for key, value in figures.items()}, step=trainer.global_step)
