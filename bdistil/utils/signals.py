"""Stopping when asked: SIGTERM and SIGUSR1 end a run cleanly and at once, with the way to go on and status 1.

At once, and not at the end of the epoch: what a scheduler leaves between the signal and the kill may be shorter than an
epoch, and the start after it goes on from the last saved epoch anyway.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from bdistil.utils import distributed

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(SystemExit):
    """A signal asked the run to stop. Where nothing catches it, Python prints its text and ends with status 1."""


class StopSignals:
    """Raises `Interrupted` in the main thread when a signal comes, while this context is open.

    Lightning's own answers are replaced while it trains. To SIGUSR1 under SLURM it writes a checkpoint in the middle of
    an epoch, which the next round would be offered. To SIGTERM it calls the other processes from within the handler,
    and waits for ever where they are at another call.

    Args:
        text: what to say, asked for at the end.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        self.text = text
        self.asked = self.told = False
        self._before: list[dict[int, Any]] = []
        self._launcher: Any = None

    def __enter__(self) -> StopSignals:
        if not self._before:
            self.asked = self.told = False
        self._before.append({number: signal.getsignal(number) for number in SIGNALS})
        self._install(dict.fromkeys(SIGNALS, self._answer))
        return self

    def __exit__(self, *_: object) -> None:
        self._install(self._before.pop())

    def watch(self, trainer: pl.Trainer) -> None:
        """Replaces the handlers of a Trainer, which puts them back itself, and passes signals on to its processes."""
        environment: Any = getattr(trainer.strategy, "cluster_environment", None)
        if hasattr(environment, "auto_requeue"):  # of SLURM: who launched the run requeues it
            environment.auto_requeue = False
        self._launcher = trainer.strategy.launcher
        self._install(dict.fromkeys(SIGNALS, self._answer))

    def check(self) -> None:
        """Raises again where the first exception was swallowed, as in a finaliser."""
        if self.asked:
            raise self.interruption()

    def interruption(self) -> Interrupted:
        """The exception; only process 0 has something to say, and that once."""
        return Interrupted(self.text() if distributed.early_rank() == 0 and not self.told else 1)

    def tell(self) -> None:
        """Says it now: Lightning answers to Ctrl-C with an exception that says nothing."""
        self.told = True
        rank_zero_info(self.text())

    @staticmethod
    def _install(handlers: dict[int, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _answer(self, number: int, frame: Any) -> None:
        if self.asked:  # on the way out already
            return
        self.asked = True
        if hasattr(self._launcher, "procs"):  # those that Lightning started; torchrun and SLURM tell theirs themselves
            self._launcher.kill(number)
        raise self.interruption()


class StopCallback(pl.Callback):
    """Gives a Trainer without a RoundController the handlers of a run.

    Args:
        signals: of the run.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning's own answer to SLURM is not even set up."""
        self.signals.watch(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replaces Lightning's handlers."""
        self.signals.watch(trainer)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops where the exception got lost."""
        self.signals.check()
