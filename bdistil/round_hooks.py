"""What a boosting run does in the hooks of a round's Trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from bdistil.boosting.commit import close_round
from bdistil.boosting.round import BoostingRound
from bdistil.boosting.round_state import RoundState
from bdistil.boosting.run import Boosting
from bdistil.boosting.trainer_checks import check_precision, check_strategy
from bdistil.data.loaders.checks import distinct_samples
from bdistil.errors import UserError
from bdistil.reporting.curve_tracker import RoundTracker
from bdistil.storage.checkpoint import save_epoch
from bdistil.storage.files import disk_errors
from bdistil.utils import distributed
from bdistil.utils.seeding import reseed
from bdistil.utils.signals import StopSignals


class RoundHooks(Checkpoint):
    """The hooks of the RoundController: from the check of the Trainer to the verdict on the student.

    It is a ``Checkpoint``, so its hooks run after those of all other callbacks.

    Args:
        boosting: the run.
        tracker: shows it.
        signals: end it.
    """

    def __init__(self, boosting: Boosting, tracker: RoundTracker, signals: StopSignals) -> None:
        self.boosting, self.run, self.tracker, self.signals = boosting, boosting.run, tracker, signals
        self.begin(0)

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
