"""Atomic writes of files and checkpoints, checksums and disk error messages."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError

from bdistil.errors import RunError

# Errors of file systems that cannot flush a folder, such as network mounts.
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)


@contextmanager
def disk_errors(doing: str, root: Path) -> Iterator[None]:
    """Converts an OSError, or the SafetensorError that wraps one, from a write to the run directory `root`.

    Raises:
        RunError: the write failed; the message names it (`doing`), the cause, the data that are safe, and the fix.
        FileNotFoundError: a file outside of `root` is missing.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        file = error.filename if isinstance(error, FileNotFoundError) else None
        if file and not Path(str(file)).absolute().is_relative_to(root.absolute()):
            raise  # such as a file of the user's dataset
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        cause = "the disk is full" if full else str(error)
        way_out = "Free some space" if full else "Fix that (a permission, a disk that became read-only)"
        raise RunError(
            f"Could not finish {doing} in {root}: {cause}. Every round committed before is intact. "
            f"{way_out} and give the same command again: it goes on from there."
        ) from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Writes a file, or a new folder, atomically: yields a temporary path beside it, renamed when the block ends.

    After a kill or a power cut, a reader finds either the old or the complete new content. An exception in the block
    removes the temporary path and leaves the old content.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)  # left by a killed process
    try:
        yield temporary
        publish(temporary, path)
    finally:
        _remove(temporary)


def publish(temporary: Path, path: Path) -> None:
    """Flushes a finished file or folder to the disk and renames it, in the same folder, to its final name."""
    for inner in temporary.rglob("*"):
        sync(inner)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file with `atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_epoch(trainer: pl.Trainer, path: Path) -> None:
    """Saves a checkpoint of the Trainer at the end of an epoch, atomically; called on all ranks, rank 0 writes.

    An `AsyncCheckpointIO` is replaced by the plugin that it wraps for this call: the file has to be complete before it
    is renamed.
    """
    beside, strategy = path.with_name(f"{path.name}.tmp"), trainer.strategy
    plugin: Any = strategy.checkpoint_io
    synchronous = plugin
    while isinstance(synchronous, AsyncCheckpointIO):
        synchronous = synchronous.checkpoint_io
    strategy.checkpoint_io = synchronous
    try:
        trainer.save_checkpoint(beside, weights_only=False)
    finally:
        strategy.checkpoint_io = plugin
    if trainer.is_global_zero:
        publish(beside, path)


def warn_of_unreadable(path: Path) -> None:
    """Warns if Lightning will not load a checkpoint without ``weights_only=False``, while nothing is lost yet."""
    if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
        rank_zero_warn(
            f"{path} cannot be resumed as it is: the state of an optimizer, a schedule or a callback holds {names[0]}, "
            "not only numbers, text and tensors. Convert it in `state_dict`, or fit with weights_only=False."
        )


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk; a folder only if the file system allows it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def digest(path: Path) -> str:
    """Sha256 of a file, as hexadecimal digits."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
