"""The callback that turns single fits into a boosting run."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import nn

from bdistil.boosting import Boosting
from bdistil.callbacks.metric_curves import MetricCurves
from bdistil.ensemble import ProgressiveEnsemble
from bdistil.errors import RunError, UserError
from bdistil.report import write_report
from bdistil.rounds import BoostingRound
from bdistil.seeding import reseed
from bdistil.settings import BoostingSettings
from bdistil.tracking import CurveTracker


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
        config: what config.yaml keeps; the settings and the seed by default.
        uncounted: an operator whose cost is unknown is an ``error`` before training, or recorded with a warning.

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
        uncounted: Literal["error", "record"] = "record",
    ) -> None:
        self.boosting = Boosting(
            run_dir, teacher=teacher, student=student, settings=settings or BoostingSettings(), seed=seed,
            config=config, uncounted=uncounted,
        )  # fmt: skip
        self.run, self.settings, self.seed = self.boosting.run, self.boosting.settings, seed
        self.tracker: CurveTracker | None = None
        self._begin(0)

    def _begin(self, number: int) -> None:
        self.number, self.done, self.closed = number, False, False
        self.epochs, self.samples_seen, self.seconds = 0, 0, 0.0
        self._fresh, self._started = True, time.perf_counter()
        self._device = torch.device("cpu")

    # ---- the loop that a user writes

    def rounds(self, datamodule: pl.LightningDataModule) -> Iterator[BoostingRound]:
        """The modules of the rounds to come, one after the other; fit each with this callback.

        Args:
            datamodule: training and validation datasets are map-style and yield (x, y).

        Raises:
            UserError: something is wrong that can be known before training.
            RunError: a round came back without a verdict, or a committed round is torn.
        """
        self.boosting.check(datamodule)
        while (module := self.boosting.build()) is not None:
            self._begin(module.number)
            with self.boosting.loaders(datamodule):
                yield module
            tries = len(self.run.tries(module.number))
            if self.run.committed() == module.number and tries == self.boosting.attempt and not self.run.stopped:
                raise RunError(
                    f"Round {module.number} ended without a verdict. Was the module fitted to its end by a Trainer with "
                    "callbacks=[controller]?"
                )
            gc.collect()  # a Trainer lingers in reference cycles
        self.boosting.finish(datamodule, self._device)
        if rank_zero_only.rank == 0 and self.run.committed():
            write_report(self.run)
            self._show_curve()
        if self.run.stopped:
            rank_zero_info(f"Boosting stopped: {self.run.stopped}.")

    def _show_curve(self) -> None:
        if self.tracker is not None and self.run.curve.exists():
            self.tracker.curve(self.run.read_curve())

    def close_loggers(self) -> None:
        """Ends the tracker's run; for the `finally` of a program that starts no other run."""
        if self.tracker is not None:
            self.tracker.finish()

    @property
    def ckpt_path(self) -> str | None:
        """Lightning's checkpoint of the round under way, where there is one."""
        path = self.run.checkpoint(self.number)
        return str(path) if path.exists() else None

    @property
    def ensemble(self) -> ProgressiveEnsemble:
        """The ensemble of the committed rounds."""
        return self.boosting.ensemble

    # ---- state within a round: plain numbers, as a checkpoint is read with weights_only

    def state_dict(self) -> dict[str, Any]:
        """Where the round under way is."""
        return {
            "number": self.number,
            "attempt": self.boosting.attempt,
            "done": self.done,
            "epochs": self.epochs,
            "samples_seen": self.samples_seen,
            "seconds": self._elapsed(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint of this round was written.

        Raises:
            RunError: the checkpoint is of another round.
        """
        found = state_dict["number"], state_dict["attempt"]
        if found != (self.number, self.boosting.attempt):
            raise RunError(
                f"A checkpoint of round {found[0]} (try {found[1]}) was offered to round {self.number} (try "
                f"{self.boosting.attempt}). Fit with ckpt_path=controller.ckpt_path; under SLURM also with "
                "Trainer(default_root_dir=...) of its own for each round."
            )
        self.done, self.epochs = state_dict["done"], state_dict["epochs"]
        self.samples_seen, self.seconds = state_dict["samples_seen"], state_dict["seconds"]

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._started

    # ---- hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses what is not this round; seeds, as configure_optimizers may make the loader."""
        if not isinstance(pl_module, BoostingRound) or pl_module.number != self.number:
            raise UserError(
                f"RoundController expected the module of round {self.number} that `controller.rounds(datamodule)` gave, "
                f"got {type(pl_module).__name__}."
            )
        self._reseed(trainer)

    def _reseed(self, trainer: pl.Trainer) -> None:
        reseed(self.seed, self.number, self.boosting.attempt, self.epochs, trainer.global_rank)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Brings the ledger up to date; a round that had ended and was not committed trains no more."""
        assert isinstance(pl_module, BoostingRound)
        self._device = pl_module.device
        self.boosting.open(pl_module)
        self.curves = MetricCurves()
        records = [self.run.record(number) for number in range(self.number)]
        for record in records:
            self.curves.add(record["curve"]["macs"], record["curve"]["val_accuracy"])
        self._watch(trainer, records)
        # The step axis of loggers goes on where the rounds before ended, though each Trainer counts from 0.
        trainer.fit_loop.epoch_loop._batches_that_stepped = sum(record["steps"] for record in records)
        if trainer.train_dataloader is None:
            self._reseed(trainer)
        if self.done:
            trainer.should_stop = True

    def _watch(self, trainer: pl.Trainer, records: list[dict[str, Any]]) -> None:
        """Shows the run in this Trainer's loggers; after a restart the committed rounds are shown again."""
        first = self.tracker is None
        self.tracker = CurveTracker(trainer.loggers)
        for logger in trainer.loggers:
            self.tracker.define(logger)
        if first:
            self.tracker.restore(records)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seeds the epoch; the first one was, before its loader was made."""
        if not self._fresh:
            self._reseed(trainer)
        self._fresh = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts samples, for the cost of training."""
        self.samples_seen += len(batch[-1]) * trainer.world_size

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the round under way."""
        self.epochs += 1
        self.done = trainer.should_stop
        trainer.save_checkpoint(self.run.checkpoint(self.number), weights_only=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judges the student and commits it, or sends the round to a wider class."""
        self._close(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes a round that was resumed after its last epoch: it trained no more, so `on_train_end` was not called."""
        if not self.closed:
            pl_module.to(self._device)
            self._close(trainer, pl_module)
            pl_module.cpu()

    def _close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, BoostingRound)
        self.closed = True
        verdict = self.boosting.judge(pl_module, self._device)
        name = f"Round {self.number + 1} of {self.settings.rounds}, class {self.boosting.rung.name}"
        if not verdict.accepted:
            goes_on = self.boosting.reject(pl_module, verdict)
            rank_zero_info(f"{name}: rejected, {verdict.reason}. " + ("A wider class is tried." if goes_on else "Boosting stops."))
            return
        row = self.boosting.row(pl_module, verdict, samples_seen=self.samples_seen, seconds=self._elapsed())
        row |= self.curves.add(row["macs"], row["val_accuracy"])
        self.boosting.commit(pl_module, verdict, row, {"epochs": self.epochs, "steps": trainer.global_step})
        rank_zero_info(
            f"{name}: accepted, {verdict.reason}. Prefix of {self.number + 1}: accuracy {verdict.accuracy:.4f} on "
            f"validation, {row['macs']:,} MACs."
        )
        assert self.tracker is not None
        self.tracker.round(row, self.number + 1, trainer.fit_loop.epoch_loop._batches_that_stepped)
        if trainer.is_global_zero:
            self.tracker.student(self.run.folder(self.number), self.number + 1, row)
