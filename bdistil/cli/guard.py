"""What every process of the command line does: quieter messages, one line for an error, a clean end of a pipe."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import TextIO

from lightning.fabric.utilities.exceptions import MisconfigurationException

from bdistil.cli.recipe_files import refuse_duplicate_keys
from bdistil.errors import RunError, UserError
from bdistil.utils.memory import keep_freed_memory
from bdistil.utils.signals import Interrupted

# Beginnings of the messages that every Lightning Trainer prints, and a run of T rounds would print T times.
REPEATED = ("GPU available", "TPU available", "HPU available", "💡", "`Trainer.fit` stopped", "Restor", "LOCAL_RANK")


def _filter_messages() -> None:
    """Hides messages and warnings that every round would repeat."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not record.getMessage().startswith(REPEATED))
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", "The .* does not have many workers")
    warnings.filterwarnings("ignore", r"It is recommended to use `self.log\(.*, sync_dist=True")  # of sums of all ranks
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", "The `srun` command is available")  # in every round; see docs/cluster.md


def guarded(call: Callable[[], object]) -> int:
    """Calls a function of the command line; its errors for the user become one message.

    Returns:
        Exit status: 0, 1 for a failed run, 2 for bad arguments.
    """
    _filter_messages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # R² and µ on a terminal that has only ASCII
    keep_freed_memory()
    refuse_duplicate_keys()
    try:
        try:
            return _status(call)
        finally:
            if sys.stdout is not None:  # closed by the shell
                sys.stdout.flush()
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        return 0  # the reader of a pipe, such as `head`, has all that it wanted


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
    """Whether nobody reads a stream any more; what is left in it, or written later, goes nowhere."""
    try:
        print(file=stream, flush=True)  # an empty buffer would say nothing
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def _known(error: BaseException | None) -> UserError | RunError | None:
    """The error for the user in a chain of exceptions; the parser wraps it in one of its own."""
    while error is not None and not isinstance(error, UserError | RunError):
        if isinstance(error, MisconfigurationException):  # Lightning's word for options that do not go together
            return UserError(str(error))
        error = error.__cause__ or error.__context__
    return error
