"""Validation of a Trainer before it fits a round: strategy, precision, length and callbacks."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import Tensor, nn

from bdistil.boosting.optimization import VALIDATION_METRICS
from bdistil.boosting.settings import BoostingSettings
from bdistil.errors import UserError
from bdistil.utils import distributed

# Strategies with one device, or one process per device that runs the script from its top; `auto` chooses between them.
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
LOGGED = ("train_loss", *VALIDATION_METRICS)  # metrics of a round that callbacks may monitor
# WeightAveraging exists since lightning 2.6.
AVERAGING = (StochasticWeightAveraging, getattr(lightning_callbacks, "WeightAveraging", StochasticWeightAveraging))


def check_trainer(trainer: pl.Trainer, settings: BoostingSettings) -> None:
    """Checks the configuration of a Trainer before it is used.

    Raises:
        UserError: a round does not support the strategy, the precision or a callback, or the Trainer would not train or
            not validate.
    """
    if trainer.barebones:
        raise UserError(
            "Expected a Trainer with barebones=False: a round logs its metrics and is saved after each epoch."
        )
    check_strategy(trainer.strategy)
    _check_rank(trainer)
    check_precision(str(trainer.precision))
    _check_length(trainer)
    _check_finders(trainer)
    _check_monitors(trainer)
    if settings.keep_epoch == "best":
        _check_validation(trainer)


def check_strategy(strategy: Strategy | str) -> None:
    """Raises UserError for a strategy, given as object or name, that shards the student or starts new processes."""
    if isinstance(strategy, str):
        name, known = strategy, strategy in STRATEGIES
    else:
        started = getattr(strategy, "_start_method", "popen")  # of DDP; not public (lightning 2.6)
        name = type(strategy).__name__ if started == "popen" else f"ddp_{started}"
        whole = isinstance(strategy, DDPStrategy | SingleDeviceStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        known = whole and started == "popen"
    if known:
        return
    raise UserError(
        f"Expected `strategy` of the Trainer to be 'auto' or 'ddp', got {name}. FSDP, DeepSpeed and other strategies "
        "that split a module leave no process a whole student, which a round evaluates, commits and links to; "
        "ddp_spawn, ddp_fork and ddp_notebook start new processes for every round. Give strategy='ddp': every process "
        "then holds one student in training, and the frozen ones and the teacher in eval mode."
    )


def _check_rank(trainer: pl.Trainer) -> None:
    """Raises UserError for a single process that the environment numbers as one of several.

    Only process 0 locks the run directory, checks labels, and writes config.yaml and the report.
    """
    if isinstance(trainer.strategy, SingleDeviceStrategy) and distributed.early_rank() != 0:
        raise UserError(
            f"Expected a Trainer of several processes in process {distributed.early_rank()} of a job (as RANK, "
            "LOCAL_RANK or SLURM_PROCID in the environment says), got one of a single process. Give strategy='ddp' and "
            "the number of devices; or, if this is a run of its own, as in a sweep, unset the variable before Python "
            "starts: env -u RANK -u LOCAL_RANK -u SLURM_PROCID …"
        )


def check_precision(precision: str) -> None:
    """Raises UserError for a precision that converts weights: students are evaluated and committed in float32."""
    if precision not in ("32-true", "16-mixed", "bf16-mixed"):
        raise UserError(
            f"Expected `precision` of the Trainer to be '32-true', '16-mixed' or 'bf16-mixed', got {precision!r}. "
            "With the mixed ones the network's products are in half precision; weights, loss and ledger are float32."
        )


def _check_length(trainer: pl.Trainer) -> None:
    """Raises UserError for limits with which a Trainer performs no step, or reads other samples than the run."""
    if overfit := trainer.overfit_batches:  # type: ignore[attr-defined]
        raise UserError(
            f"Expected `overfit_batches` of the Trainer to be 0, got {overfit}: it replaces the sampler. To try a run "
            "on few batches, give limit_train_batches and limit_val_batches."
        )
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if (value := getattr(trainer, name)) == 0:
            raise UserError(
                f"Expected `{name}` of the Trainer to be at least 1, got {value}: the student of the round would be "
                "committed untrained."
            )


def _check_finders(trainer: pl.Trainer) -> None:
    """Raises UserError for callbacks that run trial fits before the ledger of the round is open."""
    for finder, found, way_out in (
        (LearningRateFinder, "learning rate", "give it as BoostingSettings(lr=…) or `optimizer`"),
        (BatchSizeFinder, "batch size", "give it to the data module"),
    ):
        if any(isinstance(callback, finder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                f"Expected a Trainer without {finder.__name__} (or Tuner) beside RoundController: it fits on trial "
                "before the teacher's logits are known. Find the "
                f"{found} with bdistil.distillation.Distillation(student, teacher), and {way_out}."
            )


def _check_monitors(trainer: pl.Trainer) -> None:
    """Raises UserError for a callback that monitors a metric which no round logs; the user's callbacks may log more."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(type(callback).__module__.partition(".")[0] not in ("lightning", "bdistil") for callback in callbacks):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        waits = isinstance(callback, ModelCheckpoint) or (isinstance(callback, EarlyStopping) and callback.strict)
        known = (
            monitor is None or monitor in (*LOGGED, "epoch", "step") or monitor.startswith("cost/")
        )  # of ComputeCost
        kept = getattr(callback, "save_top_k", 1) != 0  # a ModelCheckpoint that keeps none reads no metric
        if waits and kept and trainer.limit_val_batches == 0 and monitor in VALIDATION_METRICS:
            raise UserError(
                f"Expected a Trainer that validates, as {type(callback).__name__} monitors {monitor!r}, got "
                "limit_val_batches=0."
            )
        if waits and not known:
            raise UserError(
                f"Expected `monitor` of {type(callback).__name__} to be a metric that a round logs, one of "
                f"{', '.join(LOGGED)}, got {monitor!r}."
            )


def _check_validation(trainer: pl.Trainer) -> None:
    """Raises UserError if a Trainer does not validate, which `keep_epoch` requires."""
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise UserError(
            "Expected keep_epoch='last' beside StochasticWeightAveraging, whose average the best epoch would replace."
        )
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs or 0
    if trainer.limit_val_batches == 0 or (every is not None and 0 < epochs < every):
        raise UserError(
            "Expected a Trainer that validates, as keep_epoch='best' compares validation errors, got "
            f"limit_val_batches={trainer.limit_val_batches}, check_val_every_n_epoch={every} and max_epochs={epochs}."
        )


def check_unused(trainer: pl.Trainer) -> None:
    """Raises UserError for a Trainer that has already been used: it has reached its limits and would not train."""
    if trainer.global_step > 0:
        raise UserError(
            f"Expected a Trainer of its own for each round, got one that has trained {trainer.global_step} steps "
            "already, and would not train again. Make it inside the loop: "
            "for module in controller.rounds(datamodule): trainer = Trainer(…, callbacks=[controller])"
        )


class SharedCallbacks:
    """Tracks the callbacks of all tries, as some of Lightning's carry state from one student over to the next."""

    def __init__(self) -> None:
        self._used: dict[tuple[int, int], list[pl.Callback]] = {}

    def start(self, trainer: pl.Trainer, attempt: tuple[int, int]) -> None:
        """Resets each EarlyStopping at the start of a try, identified by (round, try).

        Raises:
            UserError: a callback that averages weights was used by the Trainer of another try.
        """
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        before = [callback for key, used in self._used.items() if key != attempt for callback in used]
        for callback in callbacks:
            if isinstance(callback, AVERAGING) and any(callback is other for other in before):
                raise UserError(
                    f"Expected a {type(callback).__name__} of its own in the Trainer of each round, got that of "
                    "another fit, which would average over students of both. Make it inside the loop."
                )
            if isinstance(callback, EarlyStopping):
                callback.wait_count, callback.stopped_epoch = 0, 0
                callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        self._used[attempt] = [callback for callback in callbacks if isinstance(callback, AVERAGING)]


def finish_averages(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Has callbacks replace the weights by their average, for a fit that was resumed after its last epoch.

    Lightning does not call `on_train_end` then.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AVERAGING) and not isinstance(callback, StochasticWeightAveraging):
            callback.on_train_end(trainer, module)


def refuse_pruning(trainer: pl.Trainer) -> None:
    """Raises UserError for ModelPruning in a resumed fit, which would prune less: its masks are in no checkpoint."""
    if any(isinstance(callback, ModelPruning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise UserError(
            "Expected a resumed fit without ModelPruning, as its masks are in no checkpoint: the pruned weights would "
            f"be trained again. Delete {trainer.ckpt_path} to train from the first epoch."
        )


def check_uncompiled(module: pl.LightningModule) -> None:
    """Raises UserError for a round that was compiled as a whole, as its steps read the ledger's files."""
    try:
        to_uncompiled(module)
    except ValueError:  # the module is not compiled
        return
    raise UserError(
        "Expected the module of a round as it is, got torch.compile(module). Compile the network that is trained: "
        "module.student.compile(), before the fit."
    )


def check_trained(steps: int, number: int, student: nn.Module, initial: Sequence[Tensor]) -> None:
    """Raises UserError for a round whose optimizer performed no step, or changed no weight.

    Args:
        steps: number of optimizer steps.
        number: index of the round, from 0.
        student: the student after the fit.
        initial: its parameters before the fit.
    """
    if steps == 0:
        raise UserError(
            f"The student of round {number + 1} was not trained: the fit ended without a step. Nothing of this round "
            "was committed. Look at the Trainer (`max_epochs`, `max_time`, `limit_train_batches`, a callback that sets "
            "`should_stop`) and at the training loader (`drop_last` with fewer samples than a batch for each process)."
        )
    if equal_parameters(student, initial):
        raise UserError(
            f"The student of round {number + 1} was not trained: {steps} steps of the optimizer changed no weight. "
            "Nothing of this round was committed. Look at the learning rate, and at callbacks that freeze, average or "
            "replace weights."
        )


def equal_parameters(module: nn.Module, values: Sequence[Tensor]) -> bool:
    """Whether the parameters of a module equal `values`, which are on the CPU."""
    now = [parameter.detach().cpu() for parameter in module.parameters()]
    return all(torch.equal(one, other) for one, other in zip(now, values, strict=True))
