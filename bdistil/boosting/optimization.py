"""Optimizer and schedule of a round: AdamW with a cosine schedule, or user-defined, in Lightning's convention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from bdistil.boosting.settings import BoostingSettings
from bdistil.errors import UserError
from bdistil.utils.optimizers import Interval, adamw_cosine, may_fuse, schedule_length

# As in lightning.pytorch.cli. A schedule may also be a dictionary with "scheduler", "interval", …, as returned by
# `configure_optimizers`.
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], Any]

# Number of initial learning rates by which two schedules are distinguished.
TRACE = 10
VALIDATION_METRICS = ("val_accuracy", "val_loss", "val_rms")  # that a round logs


@dataclass(frozen=True)
class Optimization:
    """Optimizer and schedule of the rounds.

    Attributes:
        optimizer: returns an optimizer of the given parameters; it replaces AdamW and `lr`, `weight_decay` and
            `schedule` of the settings. None for AdamW.
        lr_scheduler: returns a schedule of the given optimizer; None for that of the settings with AdamW, and for a
            constant rate with another optimizer.
        lr_interval: whether the schedule advances after every ``epoch`` or ``step``.

    Raises:
        UserError: an argument is not a function, or the interval is unknown.
    """

    optimizer: OptimizerCallable | None = None
    lr_scheduler: LRSchedulerCallable | None = None
    lr_interval: Interval = "epoch"

    def __post_init__(self) -> None:
        for name, wanted in (("optimizer", "parameters"), ("lr_scheduler", "optimizer")):
            value = getattr(self, name)
            if value is not None and (not callable(value) or isinstance(value, Optimizer | LRScheduler)):
                raise UserError(
                    f"Expected `{name}` to be a function of the {wanted}, got {type(value).__name__}. Each round "
                    f"makes its own: write {name}=lambda {wanted}: …"
                )
        if self.lr_interval not in ("epoch", "step"):
            raise UserError(f"Expected `lr_interval` to be 'epoch' or 'step', got {self.lr_interval!r}.")

    def configure(self, student: nn.Module, settings: BoostingSettings, trainer: pl.Trainer) -> Any:
        """Return value of `configure_optimizers` of a round."""
        if self.optimizer is None and self.lr_scheduler is None:
            constant: tuple[int, Interval] = (0, "epoch")
            length = constant if settings.schedule == "constant" else schedule_length(trainer)
            options: dict[str, Any] = {"weight_decay": settings.weight_decay, "fused": may_fuse(trainer, student)}
            return adamw_cosine(student.parameters(), settings.lr, *length, **options)
        optimizer = self._optimizer(student, settings, fused=may_fuse(trainer, student))
        schedule = self._schedule(optimizer)
        if schedule is None:
            return optimizer
        _check_length(schedule, trainer)
        _check_plateau(schedule, trainer)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _optimizer(self, student: nn.Module, settings: BoostingSettings, **options: Any) -> Optimizer:
        """The optimizer of a student.

        Raises:
            UserError: `optimizer` returned something else, or an optimizer of other parameters.
        """
        if self.optimizer is None:
            (optimizer,), _ = adamw_cosine(
                student.parameters(), settings.lr, 0, weight_decay=settings.weight_decay, **options
            )
            return optimizer
        made = self.optimizer(list(student.parameters()))  # a function may read them twice, to make groups of them
        if not isinstance(made, Optimizer):
            raise UserError(f"Expected `optimizer` to return a torch Optimizer, got {type(made).__name__}.")
        held = {id(parameter) for group in made.param_groups for parameter in group["params"]}
        if not any(id(p) in held for p in student.parameters() if p.requires_grad):
            raise UserError(
                f"Expected `optimizer` to return an optimizer of the parameters that it is given, got a "
                f"{type(made).__name__} of others: the student would not be trained."
            )
        return made

    def _schedule(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Lightning's description of the schedule, or None for a constant rate.

        Raises:
            UserError: `lr_scheduler` returned no schedule.
        """
        made = None if self.lr_scheduler is None else self.lr_scheduler(optimizer)
        if made is None:
            return None
        given = dict(made) if isinstance(made, Mapping) else {"scheduler": made}
        scheduler = given.get("scheduler")
        if not hasattr(scheduler, "step"):
            kind = type(made if scheduler is None else scheduler).__name__
            raise UserError(f"Expected `lr_scheduler` to return a schedule of torch, got {kind}.")
        defaults: dict[str, Any] = {"interval": self.lr_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            if scheduler.mode == "max" and "monitor" not in given and not hasattr(scheduler, "monitor"):
                raise UserError(
                    "Expected ReduceLROnPlateau of mode 'min', as it monitors val_rms, an error, got mode 'max'. Leave "
                    "`mode` out, or return {'scheduler': …, 'monitor': 'val_accuracy'}."
                )
            defaults["monitor"] = getattr(scheduler, "monitor", "val_rms")  # Lightning's own subclass has one
        return defaults | given

    def settings_used(self, settings: BoostingSettings) -> dict[str, Any]:
        """The settings as plain values, without those that the user's optimizer or schedule replaces."""
        replaced = [] if self.optimizer is None else ["lr", "weight_decay"]
        replaced += [] if self.optimizer is None and self.lr_scheduler is None else ["schedule"]
        return {key: value for key, value in settings.to_dict().items() if key not in replaced}

    def describe(self, student: nn.Module, settings: BoostingSettings) -> dict[str, Any]:
        """Optimizer and schedule as plain values, for config.yaml and round.json; empty for the default.

        Two schedules count as equal if class, options and the first ten learning rates are equal.

        Args:
            student: module on which they are tried; it is not trained.
            settings: settings of the run.

        Raises:
            UserError: one of the functions returns something else.
        """
        if self.optimizer is None and self.lr_scheduler is None:
            return {}
        optimizer = self._optimizer(student, settings)
        found = {} if self.optimizer is None else {"optimizer": describe_optimizer(optimizer)}
        schedule = self._schedule(optimizer)
        if schedule is None:
            return found
        scheduler, others = schedule["scheduler"], {k: v for k, v in schedule.items() if k != "scheduler"}
        return found | {"lr_scheduler": {**describe_schedule(scheduler, optimizer), **_plain(others)}}


def _check_length(schedule: Mapping[str, Any], trainer: pl.Trainer) -> None:
    """Raises UserError for a OneCycleLR that is shorter than the fit, or may be: it would fail during training."""
    scheduler, by_step = schedule["scheduler"], schedule.get("interval") == "step"
    if not isinstance(scheduler, OneCycleLR):
        return
    if trainer.max_epochs == trainer.max_steps == -1:
        raise UserError(
            "Expected a Trainer with `max_epochs` or `max_steps` for a OneCycleLR, which fails after its total_steps="
            f"{scheduler.total_steps}, got one that is limited by time alone. Give one of them as well."
        )
    if by_step and trainer.ckpt_path:  # counting steps makes the loaders, before a resumed fit knows its epoch
        return
    length = trainer.estimated_stepping_batches if by_step else trainer.max_epochs or 0
    if length > scheduler.total_steps * int(schedule.get("frequency", 1)):
        raise UserError(
            f"Expected a OneCycleLR as long as the fit, {length} {'steps' if by_step else 'epochs'}, got one with "
            f"total_steps={scheduler.total_steps}, after which it fails. Give total_steps={length}."
        )


def _check_plateau(schedule: Mapping[str, Any], trainer: pl.Trainer) -> None:
    """Raises UserError for a ReduceLROnPlateau that would need a metric of the validation before there is one."""
    monitor = schedule.get("monitor")
    if not isinstance(schedule["scheduler"], ReduceLROnPlateau) or monitor not in VALIDATION_METRICS:
        return
    if not schedule.get("strict", True):
        return
    if trainer.limit_val_batches == 0:
        raise UserError(
            f"Expected a Trainer that validates, as ReduceLROnPlateau monitors {monitor!r}, got limit_val_batches=0. "
            "Monitor 'train_loss', or validate."
        )
    every, frequency = trainer.check_val_every_n_epoch or 1, int(schedule.get("frequency", 1))
    if schedule["interval"] == "epoch" and every > frequency:
        raise UserError(
            f"Expected a validation before ReduceLROnPlateau reads {monitor!r} after epoch {frequency}, got "
            f"check_val_every_n_epoch={every}. Validate as often, or return {{'scheduler': …, 'frequency': {every}}}."
        )


def describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Class and options of an optimizer, with the deviating options of its parameter groups."""
    groups = [
        {key: value for key, value in group.items() if key != "params" and value != optimizer.defaults.get(key)}
        for group in optimizer.param_groups
    ]
    sizes = [
        {"parameters": len(group["params"]), **own} for group, own in zip(optimizer.param_groups, groups, strict=True)
    ]
    own = {"groups": _plain(sizes)} if any(groups) else {}
    return {"class": _path_of(optimizer), **_plain(optimizer.defaults), **own}


def describe_schedule(scheduler: Any, optimizer: Optimizer) -> dict[str, Any]:
    """Class, public state and first learning rates of a schedule; advances the schedule."""
    state = {key: value for key, value in scheduler.state_dict().items() if not key.startswith("_")}
    found = {"class": _path_of(scheduler), **_plain(state)}
    return found | {"rates": _trace(scheduler, optimizer)}


def _trace(scheduler: Any, optimizer: Optimizer) -> list[float]:
    """The first learning rates of a schedule, rounded so that they are the same on every machine."""
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer takes no step
        for _ in range(1 if isinstance(scheduler, ReduceLROnPlateau) else TRACE):
            rates.append(float(f"{float(optimizer.param_groups[0]['lr']):.6g}"))
            try:
                scheduler.step()
            except (TypeError, ValueError):  # the schedule needs a metric, or has ended
                break
    return rates


def _path_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _plain(value: Any) -> Any:
    """Plain values for YAML and JSON, without options that are None or False, as later versions of torch add some."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None and v is not False and not callable(v)}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value if item is not None and not callable(item)]
    if isinstance(value, Tensor):
        return value.tolist()
    kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    return type(value).__name__ if kind is None else kind(value)  # converts NumPy numbers to Python numbers
