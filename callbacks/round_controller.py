"""The callback that runs boosting rounds: one fit per round, with acceptance, commit, logging and resumption."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from bdistil.boosting.checks.batches import check_fit, indexed
from bdistil.boosting.checks.trainer import (
    SharedCallbacks,
    check_trained,
    check_trainer,
    check_uncompiled,
    check_unused,
    equal_parameters,
)
from bdistil.boosting.commit import close_round
from bdistil.boosting.costs import Uncounted
from bdistil.boosting.optimization import LRSchedulerCallable, Optimization, OptimizerCallable
from bdistil.boosting.round import BoostingRound, RoundState
from bdistil.boosting.run import Boosting, RoundPlan
from bdistil.boosting.settings import BoostingSettings
from bdistil.callbacks.epoch_keeper import EpochKeeper
from bdistil.data.loaders import check_drawn, distinct_samples
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.reporting.report import write_report
from bdistil.reporting.round_tracker import RoundTracker
from bdistil.storage.files import disk_errors, save_epoch, warn_of_unreadable
from bdistil.storage.run_directory import RunConfig
from bdistil.utils import distributed
from bdistil.utils.optimizers import Interval
from bdistil.utils.signals import StopSignals


class RoundController(EpochKeeper):
    """Runs boosting, with a new module and a new Trainer for each round and this callback in all of them.

    It evaluates the teacher once, adds the index to the batches, accepts or rejects each student, tries a wider class
    of students after a rejection, commits student, ledger and metrics together, logs cost and curve of every prefix,
    and resumes a run. It saves a round after each epoch, as any `EpochKeeper`.

    Args:
        run_dir: the run directory; a run found there is resumed.
        teacher: any module, x -> logits (B, L); or the logits of all samples, see `bdistil.OfflineTeacher`.
        student: ``make_student(round)``, rounds from 0; a `Student` also takes links.
        settings: settings of the run.
        optimizer: function from a student's parameters to an optimizer, Lightning's ``OptimizerCallable``:
            ``lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9)``. It replaces AdamW and `lr`,
            `weight_decay` and `schedule` of the settings.
        lr_scheduler: function from an optimizer to a schedule, Lightning's ``LRSchedulerCallable``, or to a dictionary
            with ``scheduler`` as returned by `configure_optimizers`. Without it, a custom optimizer runs at a constant
            rate.
        lr_interval: whether that schedule advances after every ``epoch`` or ``step``.
        seed: determines, with round, epoch and rank, all randomness of the run.
        config: content of config.yaml, as nested plain values; settings and seed by default. A
            `bdistil.storage.run_directory.RunConfig` also says which of them may differ when a run goes on.
        uncounted: whether an operator with unknown multiply-adds raises an ``error`` before training, or is omitted
            from the count with a warning (``record``).
        reads_test: whether the test part, if there is one, is evaluated at the end of the run.

    Example:
        >>> import tempfile, torch, lightning as L
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from bdistil import BoostingSettings, Student
        >>> data = TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
        >>> class Data(L.LightningDataModule):
        ...     def train_dataloader(self):
        ...         return DataLoader(data, batch_size=16, shuffle=True)
        ...     def val_dataloader(self):
        ...         return DataLoader(data, batch_size=16)
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> folder = tempfile.TemporaryDirectory()
        >>> controller = RoundController(
        ...     folder.name,
        ...     teacher=nn.Linear(4, 2),
        ...     student=lambda round: Student(nn.Linear(4, 3), nn.Linear(3, 2)),
        ...     settings=BoostingSettings(rounds=1),
        ... )
        >>> datamodule = Data()
        >>> for round_module in controller.rounds(datamodule):
        ...     trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[controller], **quiet)
        ...     trainer.fit(round_module, datamodule, ckpt_path=controller.ckpt_path)
        >>> len(controller.ensemble)
        1
        >>> folder.cleanup()
    """

    state: RoundState

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        teacher: Any,
        student: Callable[..., nn.Module],
        settings: BoostingSettings | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        seed: int = 0,
        config: Mapping[str, Any] | RunConfig | None = None,
        uncounted: Uncounted = "record",
        reads_test: bool = True,
    ) -> None:
        self.settings = settings or BoostingSettings()
        if not isinstance(self.settings, BoostingSettings):
            raise UserError(f"Expected `settings` to be BoostingSettings(…), got a {type(settings).__name__}.")
        self.boosting = Boosting(
            run_dir, teacher=teacher, student=student, settings=self.settings, seed=seed, config=config,
            uncounted=uncounted, reads_test=reads_test, optimization=Optimization(optimizer, lr_scheduler, lr_interval),
        )  # fmt: skip
        self.run = self.boosting.run
        self.tracker, self.signals = RoundTracker(self.run), StopSignals(self.resume_message)
        self.device, self._shared = torch.device("cpu"), SharedCallbacks()
        self._plan: RoundPlan | None = None
        self._datamodule: pl.LightningDataModule | None = None
        self._begun = False  # a fit of the round
        self._final: list[torch.Tensor] = []  # weights of the evaluated student
        super().__init__(self.run.checkpoint(0))

    def begin(self) -> None:
        """Begins a fit of the current round, whose checkpoint is loaded later."""
        super().begin()
        self.state = RoundState()
        if self._plan is not None:
            self.state = RoundState(number=self._plan.module.number, attempt=self._plan.attempt)
        self.path = self.run.checkpoint(self.number)
        self.key = (self.boosting.seed, self.number, self.state.attempt)
        self._read = 0  # samples of the epoch under way, in this process
        self._saved: list[torch.Tensor] = []  # weights of the student in the checkpoint of this fit's last epoch

    def rounds(self, datamodule: pl.LightningDataModule) -> Iterator[BoostingRound]:
        """Yields the modules of the remaining rounds; fit each with this callback before requesting the next.

        Args:
            datamodule: training and validation datasets are map-style; batches are (x, y), or mappings with a key for
                y, see `BoostingSettings.labels`.

        Raises:
            UserError: an argument is invalid; raised before training.
            RunError: a round was fitted without reaching a verdict, or a committed round is torn.
        """
        self._datamodule = datamodule
        with self.signals, self.run.in_use():
            for plan in self.boosting.rounds(datamodule):
                self._plan, self._begun = plan, False
                self.begin()
                try:
                    yield plan.module
                except GeneratorExit:  # the loop was left, by `break` or by an error in its body
                    self._tell_of_no_fit()
                    raise
            if self.boosting.rehearsed is not None:
                return
            self.boosting.finish(datamodule, self.device)
            if distributed.early_rank() == 0 and self.run.committed():
                write_report(self.run)
                self.tracker.finish()

    def _tell_of_no_fit(self) -> None:
        """Logs an explanation if the loop was left before any hook of this callback ran.

        Lightning rejects a Trainer without checkpointing before it calls any hook, with a message about another
        callback. This is no warning, as a warning turned into an error would be lost in a closing generator.
        """
        if not self._begun:
            rank_zero_info(
                f"Round {self.number + 1} was not trained: the loop over `controller.rounds(datamodule)` was left "
                "before its fit began. If Lightning refused the Trainer: RoundController saves the round under way, so "
                "it needs `enable_checkpointing=True` and `barebones=False`, their defaults."
            )

    def resume_message(self) -> str:
        """Message printed by an interrupted run."""
        return (
            f"The run in {self.run.root} was interrupted with {self.run.committed()} of {self.settings.rounds} rounds "
            "committed. Give the same command again: it goes on from there."
        )

    @property
    def plan(self) -> RoundPlan:
        """The current round."""
        assert self._plan is not None
        return self._plan

    @property
    def number(self) -> int:
        """Index of the current round, from 0."""
        return self.state.number

    @property
    def ensemble(self) -> ProgressiveEnsemble:
        """The ensemble of the committed rounds."""
        return self.boosting.ensemble

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks Trainer and module of a fit."""
        if stage != "fit":
            return
        self._begun = True
        check_unused(trainer)
        check_trainer(trainer, self.settings)
        self.signals.watch(trainer)
        if distributed.early_rank() == 0:
            self.run.lock.acquire()  # an earlier failed fit has released it
        if self._plan is None or pl_module is not self._plan.module:
            raise UserError(
                "RoundController expected the module that `controller.rounds(datamodule)` gave for round "
                f"{self.number + 1}, got another module ({type(pl_module).__name__})."
            )
        if self._ended:
            raise UserError(
                f"Expected one fit for round {self.number + 1}, got a second one: take the next module from the loop."
            )
        check_fit(trainer, self._datamodule)
        check_uncompiled(pl_module)
        self._shared.start(trainer, (self.number, self.state.attempt))
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the ledger."""
        self.device = pl_module.device
        with disk_errors(f"the ledger of round {self.number + 1}", self.run.root):
            self.boosting.open(self.plan)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.tracker.start(trainer, self.number)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over signal handling from the Trainer."""
        self.signals.watch(trainer)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compares some training samples with those on which the teacher was evaluated."""
        self.plan.checked.parts.train.compare_batch(indexed(batch))

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Compares some validation samples with those on which the teacher was evaluated."""
        self.plan.checked.parts.val.compare_batch(indexed(batch))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts samples for the cost of training."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._read += len(batch[-1])
        self.signals.check()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Completes the checks and the counts of the epoch, and saves it."""
        if self._has_batches:
            check_drawn(trainer.train_dataloader)
            read, self._read = int(distributed.all_sum(torch.tensor(self._read))), 0
            self.state.samples_seen += distinct_samples(trainer.train_dataloader, read)
        super().on_train_epoch_end(trainer, pl_module)

    def save(self, trainer: pl.Trainer) -> None:
        """Saves the round under way, except a fast_dev_run."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with disk_errors(f"round {self.number + 1}", self.run.root):
            save_epoch(trainer, self.path)
            if trainer.is_global_zero and not self._saved:
                warn_of_unreadable(self.path)
        self._saved = _parameters(self.plan.module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the weights that other callbacks leave, such as an average; commits or rejects the student."""
        super().on_train_end(trainer, pl_module)
        if self._saved and not equal_parameters(self.plan.module.student, self._saved):
            self.save(trainer)
        self._close(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes a round that was resumed after its last epoch.

        Otherwise warns if another callback has changed the weights after the evaluation.
        """
        if not self._ended:
            pl_module.to(self.device)
            super().on_fit_end(trainer, pl_module)
            pl_module.cpu()
        elif not equal_parameters(self.plan.module.student, self._final):
            rank_zero_warn(
                f"A callback changed the weights of the student of round {self.number + 1} in `on_fit_end`, after it "
                "was judged and committed, so the run does not have them. Change weights in `on_train_end` at the "
                "latest."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Releases the run directory; prints how to resume after Ctrl-C, which Lightning handles."""
        self.run.lock.release()  # the traceback may keep the loop alive, as in a notebook
        if isinstance(exception, ValueError) and "too many values to unpack" in str(exception):
            rank_zero_warn(
                "Batches of a round are (x, y, index), also for hooks of other callbacks: take `x, y = batch[:2]`."
            )
        if isinstance(exception, KeyboardInterrupt):
            self.signals.print()

    def _close(self, trainer: pl.Trainer) -> None:
        module = self.plan.module
        if (best := module.best) is not None:
            best.restore(module.student)
            if best.epoch is None:
                rank_zero_warn(
                    f"Round {self.number + 1} keeps its last epoch, not the best: its fit ended before the first "
                    "validation. Let the Trainer validate more often (check_val_every_n_epoch, val_check_interval)."
                )
        check_trained(trainer.global_step, self.number, module.student, module.initial)
        self._final = _parameters(module)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.boosting.rehearsed = self.plan
            return
        row = close_round(self.boosting, self.plan, self.state, self.device, steps=trainer.global_step)
        if row is not None:
            self.tracker.committed(trainer, row, self.number)


def _parameters(module: BoostingRound) -> list[torch.Tensor]:
    """Copies of the student's parameters on the CPU."""
    return [parameter.detach().cpu().clone() for parameter in module.student.parameters()]
