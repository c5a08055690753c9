"""The callback that turns single fits into a boosting run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from bdistil.boosting.commit import close_round
from bdistil.boosting.curve_rows import Uncounted
from bdistil.boosting.round import BoostingRound
from bdistil.boosting.round_state import RoundState
from bdistil.boosting.run import Boosting
from bdistil.boosting.settings import BoostingSettings
from bdistil.boosting.trainer_checks import check_precision, check_strategy
from bdistil.data.loaders import distinct_samples
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.errors import UserError
from bdistil.reporting.curve_tracker import RoundTracker
from bdistil.reporting.report import write_report
from bdistil.storage.checkpoint import save_epoch
from bdistil.storage.files import disk_errors
from bdistil.utils import distributed
from bdistil.utils.seeding import reseed
from bdistil.utils.signals import StopSignals


class RoundController(Checkpoint):
    """Boosts: a fresh module and a fresh Trainer a round, and this one callback in all of them.

    It asks the teacher once, adds the index to the batches, decides whether a student is accepted, widens the class of
    students when it is not, commits student, ledger and metrics in one piece, logs cost and curve of every prefix, and
    goes on where a run stopped. It is a ``Checkpoint``, so its hooks run after those of all other callbacks.

    Args:
        run_dir: the run directory; a run found there goes on.
        teacher: any module, x -> logits (B, L).
        student: ``make_student(round)``, rounds from 0; a `Student` also takes links.
        settings: of the run.
        seed: all randomness of the run is a function of it, the round, the epoch and the rank.
        config: what config.yaml keeps, as nested plain values; settings and seed by default.
        uncounted: an operator whose multiply-adds are not known is an ``error`` before training, or recorded with a
            warning.

    Example::

        controller = RoundController("runs/mine", teacher=teacher, student=make_student, settings=settings)
        for round_module in controller.rounds(datamodule):
            trainer = L.Trainer(max_epochs=20, callbacks=[controller])
            trainer.fit(round_module, datamodule, ckpt_path=controller.ckpt_path)
        ensemble = controller.ensemble
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        teacher: nn.Module,
        student: Callable[..., nn.Module],
        settings: BoostingSettings | None = None,
        seed: int = 0,
        config: Mapping[str, Any] | None = None,
        uncounted: Uncounted = "record",
    ) -> None:
        self.settings = settings or BoostingSettings()
        self.boosting = Boosting(
            run_dir, teacher=teacher, student=student, settings=self.settings, seed=seed, config=config,
            uncounted=uncounted,
        )  # fmt: skip
        self.run = self.boosting.run
        self.tracker, self.signals = RoundTracker(self.run), StopSignals(self.how_to_go_on)
        self.begin(0)

    def rounds(self, datamodule: pl.LightningDataModule) -> Iterator[BoostingRound]:
        """The modules of the rounds to come, one after the other; fit each with this callback.

        Args:
            datamodule: training and validation datasets are map-style and yield (x, y).

        Raises:
            UserError: something is wrong that can be known before training.
            RunError: a round came back without a verdict, or a committed round is torn.
        """
        with self.signals:
            for module in self.boosting.rounds(datamodule):
                self.begin(module.number)
                yield module
            self.boosting.finish(datamodule, self.device)
            if distributed.early_rank() == 0 and self.run.committed():
                write_report(self.run)
                self.tracker.finish()

    def how_to_go_on(self) -> str:
        """What to say when the run is interrupted."""
        return (
            f"The run in {self.run.root} was interrupted with {self.run.committed()} of {self.settings.rounds} rounds "
            "committed. Give the same command again: it goes on from there."
        )

    @property
    def ckpt_path(self) -> str | None:
        """Lightning's checkpoint of the round under way, where there is one."""
        path = self.run.checkpoint(self.number)
        return str(path) if path.exists() else None

    @property
    def ensemble(self) -> ProgressiveEnsemble:
        """The ensemble of the committed rounds."""
        return self.boosting.ensemble

    # ---- hooks

    def begin(self, number: int) -> None:
        """A round begins; its state is that of no other."""
        self.state = RoundState(number, self.boosting.attempt)
        self.closed, self.fresh, self.read, self.device = False, True, 0, torch.device("cpu")

    @property
    def number(self) -> int:
        """The round under way, from 0."""
        return self.state.number

    def state_dict(self) -> dict[str, Any]:
        """Where the round under way is."""
        return self.state.plain()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint of this round was written."""
        self.state.load(state_dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses what is not this round; seeds, as configure_optimizers may make the loader."""
        check_strategy(trainer.strategy)
        check_precision(str(trainer.precision))
        self.signals.watch(trainer)
        if not isinstance(pl_module, BoostingRound) or pl_module.number != self.number:
            raise UserError(
                "RoundController expected the module that `controller.rounds(datamodule)` gave for round "
                f"{self.number + 1}, got {type(pl_module).__name__}."
            )
        self._reseed(trainer)

    def _reseed(self, trainer: pl.Trainer) -> None:
        reseed(self.boosting.seed, self.number, self.state.attempt, self.state.epochs, trainer.global_rank)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Brings the ledger up to date; a round that had ended and was not committed trains no more."""
        assert isinstance(pl_module, BoostingRound)
        self.device = pl_module.device
        with disk_errors(f"the ledger of round {self.number}", self.run.root):
            self.boosting.open(pl_module)
        self.tracker.start(trainer, self.number)
        self._reseed(trainer)
        trainer.should_stop |= self.state.done

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answers signals in place of the Trainer."""
        self.signals.watch(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds the epoch; the first one was, before its loader was made."""
        if not self.fresh:
            self._reseed(trainer)
        self.fresh, self.read = False, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts samples, for the cost of training."""
        self.read += len(batch[-1])
        self.signals.check()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the round under way."""
        read = int(distributed.all_sum(torch.tensor(self.read)))
        self.state.samples_seen += distinct_samples(trainer.train_dataloader, read)
        self.state.epochs += 1
        self.state.done = trainer.should_stop
        with disk_errors(f"round {self.number}", self.run.root):
            save_epoch(trainer, self.run.checkpoint(self.number))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judges the student and commits it, or sends the round to a wider class."""
        assert isinstance(pl_module, BoostingRound)
        self._close(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes a round that was resumed after its last epoch, for which `on_train_end` is not called."""
        if not self.closed:
            assert isinstance(pl_module, BoostingRound)
            self._close(trainer, pl_module.to(self.device))
            pl_module.cpu()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Says how to go on after Ctrl-C, to which Lightning answers."""
        if isinstance(exception, KeyboardInterrupt):
            self.signals.tell()

    def _close(self, trainer: pl.Trainer, module: BoostingRound) -> None:
        self.closed = True
        row = close_round(self.boosting, module, self.state, self.device, steps=trainer.global_step)
        if row is not None:
            self.tracker.committed(trainer, row, self.number)
