"""A whole boosting run in one call."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import nn

from bdistil.boosting.checks.trainer import check_strategy, check_trainer
from bdistil.boosting.optimization import LRSchedulerCallable, OptimizerCallable
from bdistil.boosting.settings import BoostingSettings
from bdistil.callbacks.round_controller import RoundController
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.utils.optimizers import Interval


def distill(
    teacher: nn.Module,
    student: Callable[..., nn.Module],
    datamodule: pl.LightningDataModule,
    *,
    run_dir: str | os.PathLike[str],
    rounds: int | None = None,
    settings: BoostingSettings | None = None,
    seed: int = 0,
    optimizer: OptimizerCallable | None = None,
    lr_scheduler: LRSchedulerCallable | None = None,
    lr_interval: Interval = "epoch",
    **trainer_options: Any,
) -> ProgressiveEnsemble:
    """Distils a teacher into an ordered ensemble of students: the loop over `RoundController.rounds` in one call.

    Each round has its own Trainer, with copies of the objects in `trainer_options` (callbacks, plugins, a strategy);
    loggers are shared by all rounds, and the copies hold your `datamodule` and `teacher` themselves. An existing run in
    `run_dir` is resumed, a finished one is loaded. Use a `RoundController` if you need access to the Trainers.

    Args:
        teacher: any module, x -> logits (B, L).
        student: ``make_student(round)``, rounds from 0.
        datamodule: training and validation datasets are map-style and yield (x, y).
        run_dir: the run directory.
        rounds: T, the largest number of students; that of `settings` by default.
        settings: settings of the run.
        seed: seed of all randomness of the run.
        optimizer: see `RoundController`.
        lr_scheduler: see `RoundController`.
        lr_interval: see `RoundController`.
        trainer_options: arguments of Lightning's Trainer, such as ``max_epochs=20``. `logger` and
            `enable_model_summary` are off by default.

    Returns:
        The ensemble of the committed rounds.

    Raises:
        UserError: an argument is invalid; raised before training.
        RunError: a file of the run is torn, or a loss is NaN.

    Example::

        ensemble = distill(teacher, make_student, datamodule, run_dir="runs/mine", rounds=6, max_epochs=20)
    """
    settings = settings or BoostingSettings()
    settings = settings if rounds is None else replace(settings, rounds=rounds)
    controller = RoundController(
        run_dir, teacher=teacher, student=student, settings=settings, seed=seed, optimizer=optimizer,
        lr_scheduler=lr_scheduler, lr_interval=lr_interval,
    )  # fmt: skip
    given = trainer_options.get("logger")
    shared = [datamodule, teacher, *(given if isinstance(given, list | tuple) else [given])]
    check_trainer(_trainer(controller, trainer_options, shared), settings)
    for module in controller.rounds(datamodule):
        trainer = _trainer(controller, trainer_options, shared, default_root_dir=controller.run.work(module.number))
        trainer.fit(module, datamodule, ckpt_path=controller.ckpt_path)
    return controller.ensemble


def _trainer(
    controller: RoundController, options: dict[str, Any], shared: Sequence[Any], **defaults: Any
) -> pl.Trainer:
    """A new Trainer with copies of all options; `shared` objects, which callbacks may hold, are not copied.

    Raises:
        UserError: an option is unknown to the Trainer, or incompatible with the controller.
    """
    if options.get("enable_checkpointing") is False or options.get("barebones"):
        raise UserError(
            "Expected `enable_checkpointing=True` and `barebones=False` of the Trainer, as the round under way is "
            "saved after each epoch. Leave both out: nothing else is saved."
        )
    if isinstance(strategy := options.get("strategy"), str):
        check_strategy(strategy)  # before Lightning looks for its devices
    copied = {key: copy.deepcopy(value, {id(kept): kept for kept in shared}) for key, value in options.items()}
    given = copied.pop("callbacks", None) or []
    callbacks: Sequence[pl.Callback] = [given] if isinstance(given, pl.Callback) else given
    quiet = {"logger": False, "enable_model_summary": False, **defaults}
    try:
        return pl.Trainer(callbacks=[*callbacks, controller], **{**quiet, **copied})
    except TypeError as error:
        raise UserError(f"Expected options of Lightning's Trainer beside those of `distill`: {error}.") from error
