"""Common behaviour of all commands: fewer messages, errors as one message, closed pipes handled."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import TextIO

from lightning.fabric.utilities.exceptions import MisconfigurationException

from bdistil.cli.recipe_files import install_yaml_loader
from bdistil.errors import RunError, UserError
from bdistil.utils.memory import keep_freed_memory
from bdistil.utils.signals import Interrupted

# Prefixes of messages that every Lightning Trainer prints, so a run of T rounds would print them T times.
REPEATED = ("GPU available", "TPU available", "HPU available", "💡", "`Trainer.fit` stopped", "Restor", "LOCAL_RANK")


def _filter_messages() -> None:
    """Hides messages and warnings that would be repeated in every round."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not record.getMessage().startswith(REPEATED))
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", "The .* does not have many workers")
    warnings.filterwarnings("ignore", r"It is recommended to use `self.log\(.*, sync_dist=True")  # sums of all ranks
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", "The `srun` command is available")  # in every round; see docs/cluster.md


def guarded(call: Callable[[], object]) -> int:
    """Calls a function of the command line; prints a UserError or RunError as one message.

    Returns:
        Exit status: 0, 1 for a failed run, 2 for bad arguments.
    """
    _filter_messages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for R² and µ on an ASCII-only terminal
    keep_freed_memory()
    install_yaml_loader()
    try:
        try:
            return _status(call)
        finally:
            if sys.stdout is not None:  # None if closed by the shell
                sys.stdout.flush()
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        return 0  # the reader of the pipe, such as `head`, has closed it


def _status(call: Callable[[], object]) -> int:
    try:
        call()
    except Interrupted as end:
        if isinstance(end.code, str):
            print(f"bdistil: {end.code}", file=sys.stderr)
        return 1
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        print(f"bdistil: error: {known}", file=sys.stderr)
        return 2 if isinstance(known, UserError) else 1
    return 0


def _is_closed(stream: TextIO) -> bool:
    """Whether the reader of a stream has closed it; if so, remaining and later output is discarded."""
    try:
        print(file=stream, flush=True)  # flushing an empty buffer would not fail
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _known(error: BaseException | None) -> UserError | RunError | None:
    """The UserError or RunError in a chain of exceptions, as the parser wraps them in its own."""
    while error is not None and not isinstance(error, UserError | RunError):
        if isinstance(error, MisconfigurationException):  # raised by Lightning for incompatible options
            return UserError(str(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return RunError(f"The disk is full: {error}. Free some space and give the same command again.")
        error = error.__cause__ or error.__context__
    return error
