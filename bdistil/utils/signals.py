"""Handlers of SIGTERM and SIGUSR1, which end a run cleanly and at once, with a message and status 1.

At once and not at the end of the epoch: the time between a scheduler's signal and its kill may be shorter than an
epoch, and the next start goes on from the last saved epoch anyway.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from bdistil.utils import distributed

LOOK = 1.0  # seconds between two looks at whether the parent is still there
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


def end_with_parent() -> None:
    """Has this process get SIGTERM once the process that started it is gone, also if that was killed outright.

    Otherwise it would go on alone, and hold on to what the next start needs.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class Interrupted(SystemExit):
    """A signal stopped the run. Where nothing catches it, Python prints its text and exits with status 1."""


class StopSignals(pl.Callback):
    """Context in which a signal raises `Interrupted` in the main thread; also a callback of Trainers inside it.

    Lightning's own handlers are replaced during training. Its handler of SIGUSR1 under SLURM writes a checkpoint in the
    middle of an epoch, which the next round would load. That of SIGTERM makes a collective call, which waits for ever
    where the other processes are in another one.

    Args:
        text: returns the message, when it is needed.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        self.text = text
        self.received = self.printed = False
        self._before: list[dict[int, Any]] = []
        self._launcher: Any = None

    def __enter__(self) -> StopSignals:
        if not self._before:
            self.received = self.printed = False
        self._before.append({number: signal.getsignal(number) for number in SIGNALS})
        self._install(dict.fromkeys(SIGNALS, self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._install(self._before.pop())

    def watch(self, trainer: pl.Trainer) -> None:
        """Replaces the handlers of a Trainer, which restores them itself, and forwards signals to its processes."""
        environment: Any = getattr(trainer.strategy, "cluster_environment", None)
        if hasattr(environment, "auto_requeue"):  # SLURM: the job script requeues the run
            environment.auto_requeue = False
        self._launcher = trainer.strategy.launcher
        self._install(dict.fromkeys(SIGNALS, self._handle))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replaces the handlers of the Trainer before Lightning sets up its own for SLURM."""
        self.watch(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replaces the handlers that Lightning has set up since."""
        self.watch(trainer)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops where the exception was lost."""
        self.check()

    def check(self) -> None:
        """Raises again where the first exception was lost, as in a finaliser."""
        if self.received:
            raise self.interruption()

    def interruption(self) -> Interrupted:
        """The exception, with the message on process 0 unless it is printed already."""
        return Interrupted(self.text() if distributed.early_rank() == 0 and not self.printed else 1)

    def print(self) -> None:
        """Prints the message now: on Ctrl-C Lightning raises an exception without one."""
        self.printed = True
        rank_zero_info(self.text())

    @staticmethod
    def _install(handlers: dict[int, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received:  # stopping already
            return
        self.received = True
        if hasattr(self._launcher, "procs"):  # started by Lightning; torchrun and SLURM signal theirs
            self._launcher.kill(number)
        raise self.interruption()
