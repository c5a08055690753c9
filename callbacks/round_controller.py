"""The callback that turns single fits into a boosting run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import nn

from bdistil.boosting.curve_rows import Uncounted
from bdistil.boosting.round import BoostingRound
from bdistil.boosting.run import Boosting
from bdistil.boosting.settings import BoostingSettings
from bdistil.ensemble.ensemble import ProgressiveEnsemble
from bdistil.reporting.curve_tracker import RoundTracker
from bdistil.reporting.report import write_report
from bdistil.round_hooks import RoundHooks
from bdistil.utils import distributed
from bdistil.utils.signals import StopSignals


class RoundController(RoundHooks):
    """Boosts: a fresh module and a fresh Trainer a round, and this one callback in all of them.

    It asks the teacher once, adds the index to the batches, decides whether a student is accepted, widens the class of
    students when it is not, commits student, ledger and metrics in one piece, logs cost and curve of every prefix, and
    goes on where a run stopped. Its hooks run after those of all other callbacks; they are in `bdistil.round_hooks`.

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
        boosting = Boosting(
            run_dir, teacher=teacher, student=student, settings=self.settings, seed=seed, config=config,
            uncounted=uncounted,
        )  # fmt: skip
        super().__init__(boosting, RoundTracker(boosting.run), StopSignals(self.how_to_go_on))

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
