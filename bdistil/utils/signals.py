"""Handlers of SIGTERM and SIGUSR1 that end a run cleanly and immediately, with a message and exit status 1.

They do not wait for the end of the epoch: a scheduler may kill the process before that, and the next start resumes
from the last saved epoch anyway.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from bdistil.utils import distributed

LOOK = 1.0  # seconds between checks that the parent is alive
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def end_with_parent() -> None:
    """Sends SIGTERM to this process once its parent has ended, even if the parent was killed.

    Otherwise it would keep running as an orphan and hold resources that the next start needs.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class Interrupted(SystemExit):
    """Raised when a signal stops the run. If uncaught, Python prints its message and exits with status 1."""


class StopSignals(pl.Callback):
    """Context in which a signal raises `Interrupted` in the main thread; also a callback of Trainers inside it.

    Lightning's own handlers are replaced during training. Under SLURM, its SIGUSR1 handler writes a checkpoint in the
    middle of an epoch, which the next round would load. Its SIGTERM handler makes a collective call, which deadlocks
    if the other processes are in a different one.

    Args:
        text: returns the message; called only when needed.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        self.text = text
        self.received = self.printed = False
        self._before: list[dict[int, Any]] = []
        self._launcher: Any = None
        self._process = os.getpid()

    def __enter__(self) -> StopSignals:
        if not self._before:
            self.received = self.printed = False
        self._process = os.getpid()
        self._before.append({number: signal.getsignal(number) for number in SIGNALS})
        self._install(dict.fromkeys(SIGNALS, self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._install(self._before.pop())

    @contextmanager
    def ending_with_message(self) -> Iterator[None]:
        """Context that also turns Ctrl-C, and any failure that a signal has caused, into an `Interrupted`."""
        try:
            with self:
                yield
        except BaseException as end:  # Ctrl-C is SystemExit in Lightning; ranks that lost a peer fail in any way
            if self.received or isinstance(end, SystemExit | KeyboardInterrupt):
                raise self.interruption() from end
            raise

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
        """Raises the exception again if it was lost."""
        self.check()

    def check(self) -> None:
        """Raises again if the first exception was lost, for example in a finaliser."""
        if self.received:
            raise self.interruption()

    def interruption(self) -> Interrupted:
        """The exception to raise; on process 0 with the message, unless that was printed already."""
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
        if os.getpid() != self._process:  # a worker that was forked and is ended by its pool or loader
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.received:  # stopping already
            return
        self.received = True
        if hasattr(self._launcher, "procs"):  # started by Lightning; torchrun and SLURM signal their own
            self._launcher.kill(number)
        raise self.interruption()
