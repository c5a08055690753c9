"""Area under the curve of accuracy against cost, over several fits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from bdistil.boosting.round import BoostingRound
from bdistil.callbacks.fit_state import FitState
from bdistil.errors import UserError
from bdistil.metrics.curve import curve_figures, merge_points
from bdistil.reporting.round_tracker import logger_step

NOT_IN_ROUNDS = (
    "Expected MetricCurves in fits of whole models, got it beside RoundController, where the accuracy is that of all "
    "students so far, and ComputeCost measures one. Leave it out: the controller logs the same figures, and writes the "
    "points to curve.csv."
)


class MetricCurves(FitState):
    """Collects one (cost, accuracy) point for each fit, and logs the area under the curve and its falls.

    Works with any LightningModule: pass one instance to the Trainers of several fits, in any order of cost. Fits of
    equal cost, such as other seeds or folds, count as one point with their mean accuracy. The RoundController logs the
    same statistics after each committed round.

    Args:
        metric: key of the accuracy in ``trainer.callback_metrics``.
        cost: key of the cost in ``trainer.callback_metrics``; `ComputeCost` logs ``cost/macs``.
        tolerance: a larger decrease of the accuracy from one cost to the next counts as a fall.

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
        self._validated = False
        self._number, self._module = 0, 0  # place of the fit among the points, and id of its module
        self._latest: tuple[float, float] | None = None  # the point of the fit, if it ended now

    @property
    def state_key(self) -> str:
        """Distinguishes instances with different metrics in one Trainer."""
        return f"MetricCurves[{self.metric},{self.cost}]"

    def state_dict(self) -> dict[str, Any]:
        """The points so far, and that of the fit in progress."""
        return {"points": [list(point) for point in self.points], "latest": self._latest, "number": self._number}

    def restore(self, state_dict: dict[str, Any]) -> None:
        """Restores the points of earlier fits, unless this instance has more: those of fits since the checkpoint."""
        if len(state_dict["points"]) > len(self.points):
            self.points = [(float(cost), float(value)) for cost, value in state_dict["points"]]
        self._latest, self._number = state_dict.get("latest"), state_dict.get("number", len(self.points))

    def add(self, cost: float, accuracy: float) -> dict[str, float]:
        """Adds a point with a cost > 0 and an accuracy in 0 … 1; returns area and falls so far."""
        self.points.append((float(cost), float(accuracy)))
        return curve_figures(*merge_points(self.points), self.tolerance)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses a boosting run, whose accuracy is that of the prefix, but the cost that of one student."""
        super().setup(trainer, pl_module, stage)
        self._latest = None
        # A fit that goes on with the same module replaces its point.
        if stage == "fit" and (trainer.global_step == 0 or id(pl_module) != self._module):
            self._number, self._module = len(self.points), id(pl_module)
        if stage == "fit" and isinstance(pl_module, BoostingRound):
            raise UserError(NOT_IN_ROUNDS)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resets the state before the first validation of this fit."""
        self._validated = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns of a metric that the first epoch of a fit without validation has not logged."""
        if trainer.current_epoch == 1 and not trainer.enable_validation and (fault := self._fault(trainer)):
            rank_zero_warn(fault)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Records that a validation has logged its metrics."""
        self._validated = not trainer.sanity_checking
        if self._validated:
            self._keep_latest(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the metrics after the first validated epoch, instead of at the end of training."""
        self._keep_latest(trainer, strict=self._validated)

    def _keep_latest(self, trainer: pl.Trainer, *, strict: bool = False) -> None:
        """Keeps the logged figures, also for a fit that is resumed after its end.

        Raises:
            UserError: with `strict`, if metric or cost was not logged, or the cost is not positive.
        """
        fault = self._fault(trainer)
        if fault is None:
            metrics = trainer.callback_metrics
            self._latest = float(metrics[self.cost]), float(metrics[self.metric])
        elif strict:
            raise UserError(fault)

    def _fault(self, trainer: pl.Trainer) -> str | None:
        metrics = trainer.callback_metrics
        missing = [key for key in (self.metric, self.cost) if key not in metrics]
        if missing:
            return (
                f"MetricCurves expected {missing[0]!r} among logged metrics, got {sorted(metrics)}. "
                "Log it, or set `metric` and `cost` to logged names (ComputeCost logs cost/macs)."
            )
        if float(metrics[self.cost]) <= 0:
            return f"MetricCurves expected {self.cost!r} to be > 0, got {float(metrics[self.cost]):g}."
        return None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the metrics at the end of training."""
        self._keep_latest(trainer, strict=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the point of this fit; none for a `fast_dev_run`."""
        if self._latest is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.points[self._number : self._number + 1] = []
        figures = self.add(*self._latest)
        for logger in trainer.loggers:
            logger.log_metrics({f"curve/{key}": value for key, value in figures.items()}, step=logger_step(trainer))
